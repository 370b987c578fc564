"""Goal: whatever ends a command, at whatever moment, nothing it started is left running.

Method: a real command with real servers is hit by real signals; survivors are found by a mark in
    their environment, or their log, so that one which lost its parent is found as well.
"""

from __future__ import annotations

import random
import signal
import subprocess
from typing import TYPE_CHECKING

import pytest
import redis

from compose.local.stack import LocalStack
from tests.local_stack.marked import Marked, wait_until
from tests.servers import local_stack

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Start = Callable[..., Marked]

pytestmark = [pytest.mark.servers, pytest.mark.timeout(600)]

ALL = "redis,kafka,triton"
EXIT_CODES = {"SIGINT": -signal.SIGINT, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize("number", list(EXIT_CODES))
def test_a_signal_while_running_stops_everything(start: Start, number: str) -> None:
    command = start("--services", ALL)
    url = command.line_with("up redis://").split()[1]
    with redis.Redis.from_url(url) as client:
        client.set("kept", number)
    # The command, three servers, the door before the broker and the worker.
    assert len(command.survivors()) == 6

    command.child.send_signal(signal.Signals[number])

    code, _ = command.end()
    assert code == EXIT_CODES[number]
    assert command.survivors() == []
    assert _stored(start) == number.encode()


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("form", ["foreground", "detached"])
@pytest.mark.parametrize(
    "moment",
    [
        "redis is starting",
        "redis is ready",
        "kafka is starting",
        "triton is starting",
        "triton is ready",
    ],
)
def test_a_signal_in_the_middle_of_up(
    start: Start, tmp_path: Path, moment: str, form: str, number: str
) -> None:
    detached = ["--detached"] if form == "detached" else []
    command = start("--services", ALL, "--signal", number, "--signal-at", moment, *detached)
    code, _ = command.end()
    assert code == EXIT_CODES[number]
    assert command.survivors() == []
    assert not (tmp_path / "stack.json").exists()


@pytest.mark.parametrize("seed", range(6))
def test_signals_at_random_moments_even_several(start: Start, seed: int) -> None:
    moments = random.Random(seed)
    command = start("--services", ALL)
    command.line_with("redis is starting")
    for _ in range(3):
        try:
            command.child.wait(timeout=moments.uniform(0.0, 0.3))
        except subprocess.TimeoutExpired:
            command.child.send_signal(moments.choice([signal.SIGINT, signal.SIGTERM]))
    command.end()
    assert command.survivors() == []


def test_sigkill_of_a_foreground_command_leaves_nothing(start: Start, tmp_path: Path) -> None:
    command = start("--services", ALL)
    url = command.line_with("up redis://").split()[1]
    with redis.Redis.from_url(url) as client:
        client.set("kept", "SIGKILL")

    command.child.kill()

    command.end()
    wait_until(lambda: not command.survivors(), "no server of the killed command is left")
    # The record of the dead stack is still there; the next one takes over from it.
    assert (tmp_path / "stack.json").exists()
    assert _stored(start) == b"SIGKILL"


def test_sigkill_in_the_middle_of_a_foreground_start_leaves_nothing(
    start: Start,
) -> None:
    command = start("--services", ALL, "--signal", "SIGKILL", "--signal-at", "kafka is starting")
    code, _ = command.end()
    assert code == -signal.SIGKILL
    wait_until(lambda: not command.survivors(), "no server of the killed command is left")


def test_sigkill_in_the_middle_of_a_detached_start_can_be_cleaned_up(
    start: Start, tmp_path: Path
) -> None:
    command = start(
        *("--services", "redis,kafka", "--detached"),
        *("--signal", "SIGKILL", "--signal-at", "kafka is starting"),
    )
    command.end()
    # Redis was up, and on record before it ran.
    assert [(left.name, left.alive) for left in LocalStack(tmp_path).running()] == [("redis", True)]
    assert len(command.survivors()) == 1

    LocalStack(tmp_path).down()

    assert command.survivors() == []


def _stored(start: Start) -> bytes | None:
    """What a fresh Redis finds in the data folder of an earlier one."""
    command = start("--services", ALL)
    url = command.line_with("up redis://").split()[1]
    with redis.Redis.from_url(url) as client:
        value = client.get("kept")
    command.child.terminate()
    command.end()
    assert command.survivors() == []
    assert value is None or isinstance(value, bytes)
    return value


def test_the_fixture_form_ends_with_its_block(tmp_path: Path) -> None:
    with local_stack({"redis"}, run_dir=tmp_path) as stack:
        assert [(process.name, process.alive) for process in stack.running()] == [("redis", True)]
    assert stack.running() == []
