"""The command as operators type it, in processes of its own, and a worker killed in the middle."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.waiting import until
from tests.worker.test_state import num_writes, worker_environment

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from tests.repartition.conftest import Log


@pytest.fixture
def environment(stack: LocalStack, log: Log, tmp_path: Path) -> dict[str, str]:
    """Where the commands find the installation."""
    return {
        **os.environ,
        **worker_environment(stack, log.topics, log.live),
        "MOVELINE_RUN_DIR": str(tmp_path),
        "COLUMNS": "200",
    }


def moveline(environment: dict[str, str], *words: str, code: int = 0) -> str:
    """Return everything a command printed, as one line, after the exit code was right."""
    done = subprocess.run(
        [sys.executable, "-m", "compose.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    text = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert done.returncode == code, text
    return text


def test_an_operator_repartitions(log: Log, environment: dict[str, str], tmp_path: Path) -> None:
    events = tmp_path / "events.jsonl"
    events.write_text(
        '{"event_id":"a","user_id":1,"item_id":2,"action":"click","event_time_ms":1763700000000}\n'
    )
    moveline(environment, "produce", str(events))
    old, new = log.topics.events, log.topics.at(1).events
    said = moveline(environment, "repartition", "--partitions", "2")
    assert f"{old} has ended; the log goes on in {new}, 2 partitions" in said
    assert f"point the producers at {new}" in said
    assert "has 2 partitions already" in moveline(environment, "repartition", "--partitions", "2")
    events.write_text(events.read_text().replace('"a"', '"b"'))
    moveline(environment, "produce", str(events))
    log.produce(5, source=0)
    # Triton is not up here; the other parts answer.
    status = moveline(environment, "status", code=1)
    assert f"{old} has ended, the log goes on in {new}; since: 5 not looked at" in status
    assert "5 late records moved" in moveline(environment, "repartition", "--late")
    assert "since: none" in moveline(environment, "status", code=1)
    assert "give either --partitions N or --late" in moveline(environment, "repartition", code=2)
    assert "created: none" in moveline(environment, "topics", "create")
    assert "events written" in moveline(environment, "lake", "--until-end")


def test_workers_killed_on_both_sides_of_the_switch(
    stack: LocalStack, log: Log, environment: dict[str, str]
) -> None:
    """SIGKILL at seeded moments: while the old topic is read, completed, and behind it."""
    log.produce(10_000, source=0)
    source = random.Random(8)
    command = [sys.executable, "-m", "compose.cli", "worker", "--instance", "killed"]
    command += ["--metrics-port", "0"]
    for attempt in range(6):
        if attempt == 2:
            log.repartition(4)
            log.produce(10_000, source=1)
        before = num_writes(log.live.client)
        process = stack.spawn("worker", command, env=environment)
        more = source.randrange(200, 4_000)
        until(
            lambda b=before, m=more: (
                num_writes(log.live.client) >= b + m or log.is_applied(log.live)
            ),
            what=process.log,
        )
        os.kill(process.pid, signal.SIGKILL)
        stack.stop("worker")
    process = stack.spawn("worker", command, env=environment)
    until(lambda: log.is_applied(log.live), what=process.log)
    stack.stop("worker")
    log.assert_exact()
    log.assert_nothing_lost()
