"""Goal: no process runs unrecorded, and none that is not ours is ever signalled.

Method: real processes; a pid that was given to somebody else is a record with another start time.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from compose.local import processes
from compose.local.launch import NOT_STARTED
from compose.local.processes import Identity, Launch
from compose.local.stack import LocalStack
from compose.local.state import (
    STATE_VERSION,
    ProcessRecord,
    Request,
    StackState,
    boot_id,
    read_state,
    write_state,
)
from tests.local_stack.marked import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_WAIT = [sys.executable, "-c", "import signal; signal.pause()"]


def _launch(log: Path, *argv: str) -> Launch:
    return Launch(argv=argv, environment=dict(os.environ), log=log, tied=False)


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """A process that is none of the stack's."""
    with subprocess.Popen(_WAIT, start_new_session=True) as process:
        yield process
        process.kill()


def test_a_process_that_could_not_be_recorded_never_runs(tmp_path: Path) -> None:
    proof = tmp_path / "it ran"
    seen: list[Identity] = []

    def fail(identity: Identity) -> None:
        seen.append(identity)
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        processes.start(_launch(tmp_path / "log", "touch", str(proof)), record=fail)

    wait_until(lambda: not processes.is_alive(seen[0]), "the launcher has given up")
    assert processes.stop(seen, timeout_s=1.0) == []
    assert not proof.exists()


def test_a_tied_process_whose_starter_is_gone_never_runs(tmp_path: Path) -> None:
    """Its starter wrote the word and died before the launcher could ask for its signal."""
    proof = tmp_path / "it ran"
    launcher = str(processes._LAUNCHER)
    not_our_pid = str(os.getpid() + 1)
    read_end, write_end = os.pipe()
    os.write(write_end, b"g")
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-I", "-S", launcher, not_our_pid, "15", "touch", str(proof)],
        dict(os.environ),
        file_actions=[(os.POSIX_SPAWN_DUP2, read_end, processes.GO_FD)],
    )
    _, status = os.waitpid(pid, 0)
    os.close(read_end)
    os.close(write_end)
    assert os.waitstatus_to_exitcode(status) == NOT_STARTED
    assert not proof.exists()


def test_stop_ends_one_that_ignores_sigterm_and_what_it_left(tmp_path: Path) -> None:
    script = """
import signal, subprocess, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
print(child.pid, flush=True)
signal.pause()
"""
    log = tmp_path / "log"
    leader = processes.start(
        _launch(log, sys.executable, "-c", script), record=lambda _identity: None
    )
    wait_until(lambda: log.read_text().endswith("\n"), "its child runs")
    child = processes._identify(int(log.read_text()))

    assert processes.stop([leader], timeout_s=0.1) == []

    assert not processes.is_alive(leader)
    assert not processes.is_alive(child)


def test_a_recycled_pid_is_left_alone(tmp_path: Path, stranger: subprocess.Popen[bytes]) -> None:
    real = processes._identify(stranger.pid)
    record = ProcessRecord(
        name="redis",
        pid=real.pid,
        start_ticks=real.start_ticks - 1,
        log="",
        stop_timeout_s=1.0,
        is_server=True,
    )
    request = Request(services=["redis"], model_repository="", kafka_home="", triton_environment={})
    state = StackState(
        version=STATE_VERSION,
        boot_id=boot_id(),
        request=request,
        owner_pid=real.pid,
        owner_start_ticks=real.start_ticks - 1,
        shm_prefix="moveline_test_",
        processes=(record,),
    )
    write_state(tmp_path, state)
    stack = LocalStack(tmp_path)
    assert [process.alive for process in stack.running()] == [False]
    assert not state.is_owned()

    stack.down()

    assert processes.is_alive(real)
    # Nothing is believed that was written before the last boot, whatever its numbers.
    write_state(tmp_path, msgspec.structs.replace(state, boot_id="another boot"))
    assert read_state(tmp_path) is None
