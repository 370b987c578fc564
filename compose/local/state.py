"""stack.json: what runs for one folder, written before it runs, trusted on the same boot only."""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from compose.errors import StackBusyError, StateUnreadableError
from compose.local.processes import Identity, is_alive

if TYPE_CHECKING:
    from collections.abc import Iterator

STATE_VERSION = 1
_LOCK_POLL_S = 0.05
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class Addresses(msgspec.Struct, frozen=True, kw_only=True):
    """Where the servers answer; the empty string for one that this stack was not asked to start."""

    kafka: str = ""  # bootstrap, host:port
    redis: str = ""  # redis://host:port/0
    triton_grpc: str = ""  # host:port
    triton_http: str = ""  # host:port
    triton_metrics: str = ""  # host:port


class ProcessRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One process that was started for the stack."""

    name: str
    pid: int
    start_ticks: int
    log: str
    stop_timeout_s: float
    is_server: bool  # servers are stopped one after the other, after everything that talks to them

    @property
    def identity(self) -> Identity:
        """What tells this process from a later one with its pid."""
        return Identity(pid=self.pid, start_ticks=self.start_ticks)


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the stack was asked to be: a second `up` gets it only if it asks for the same."""

    services: list[str]
    model_repository: str
    kafka_home: str
    triton_environment: dict[str, str]


class StackState(msgspec.Struct, frozen=True, kw_only=True):
    """All that a later command needs to find the stack, and to stop it and nothing else."""

    version: int
    boot_id: str
    request: Request
    owner_pid: int | None  # of the foreground command that stops the stack when it ends
    owner_start_ticks: int | None
    shm_prefix: str  # every shared-memory region of this stack's Triton begins with it
    addresses: Addresses = Addresses()
    processes: tuple[ProcessRecord, ...] = ()  # in the order of their start

    def is_owned(self) -> bool:
        """Whether a foreground command that still runs will stop this stack."""
        if self.owner_pid is None or self.owner_start_ticks is None:
            return False
        return is_alive(Identity(pid=self.owner_pid, start_ticks=self.owner_start_ticks))


def boot_id() -> str:
    """Return what changes with every boot; pids and start times mean nothing across it."""
    return _BOOT_ID.read_text(encoding="ascii").strip()


def read_state(run_dir: Path) -> StackState | None:
    """Return what is recorded, or None where nothing can be running from it.

    Raises:
        StateUnreadableError: the file exists and is not one of ours.
    """
    path = _path(run_dir)
    try:
        state = msgspec.json.decode(path.read_bytes(), type=StackState)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError as error:
        raise StateUnreadableError(path, reason=str(error)) from error
    if state.version != STATE_VERSION:
        reason = f"version {state.version}, this program reads {STATE_VERSION}"
        raise StateUnreadableError(path, reason=reason)
    return state if state.boot_id == boot_id() else None


def write_state(run_dir: Path, state: StackState) -> None:
    """Replace the record in one step: a reader sees the old one or the new one, whole."""
    path = _path(run_dir)
    draft = path.with_suffix(".json.draft")
    draft.write_bytes(msgspec.json.format(msgspec.json.encode(state), indent=2))
    draft.replace(path)


def remove_state(run_dir: Path) -> None:
    """Nothing is recorded for the folder."""
    _path(run_dir).unlink(missing_ok=True)


@contextmanager
def locked(run_dir: Path, *, wait_s: float) -> Iterator[None]:
    """Hold the folder's lock; the kernel frees it even if this process is killed.

    Raises:
        StackBusyError: another process held it for longer than `wait_s`.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + wait_s
    with (run_dir / "stack.lock").open("ab") as lock:
        while not _try_lock(lock.fileno()):
            if time.monotonic() > deadline:
                raise StackBusyError(run_dir)
            time.sleep(_LOCK_POLL_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _path(run_dir: Path) -> Path:
    return Path(os.path.abspath(run_dir)) / "stack.json"  # noqa: PTH100 - resolve() would follow links
