"""The operator's commands, as processes: what they print, how they end, what Ctrl-C does.

Method: the whole story of a backfill on one installation, command by command.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from streams.kafka import make_producer
from tests.replay.rows import everything
from tests.waiting import until
from tests.worker.test_state import worker_environment

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from tests.replay.conftest import Place

Moveline = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def environment(stack: LocalStack, place: Place, tmp_path: Path) -> dict[str, str]:
    """Where the commands find the installation."""
    return {
        **os.environ,
        **worker_environment(stack, place.topics, place.live),
        "MOVELINE_RUN_DIR": str(tmp_path),
        "COLUMNS": "200",
    }


@pytest.fixture
def moveline(environment: dict[str, str]) -> Moveline:
    """A function that runs a command to its end."""

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "compose.cli", *words],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    return run


def said(done: subprocess.CompletedProcess[str], code: int = 0) -> str:
    """Return everything printed, as one line, after the exit code was right."""
    text = re.sub(r"\s+", " ", done.stdout + done.stderr)
    assert done.returncode == code, text
    return text


def test_a_backfill_from_dry_run_to_drop(place: Place, moveline: Moveline) -> None:
    place.produce(2_000)
    place.catch_up()
    live, new = f"g{place.live.generation}", f"g{place.fresh().generation}"
    said(moveline("promote", live))
    dry = said(moveline("replay", "--into", new, "--dry-run"))
    assert "0 different, 0 missing, 0 extra" in dry
    assert new not in said(moveline("generations"))
    assert f"{new} is built" in said(moveline("replay", "--into", new))
    again = said(moveline("replay", "--into", new))
    assert "0 records" in again
    refused = said(moveline("replay", "--into", new, "--from", "lake"), code=1)
    assert "repeat the former to resume" in refused
    audited = said(moveline("audit", new, "--users", "50"))
    assert "0 not" in audited
    assert f"compared with {live} (same rules)" in audited
    assert f"{new} is live; before: {live}" in said(moveline("promote", new))
    assert re.search(rf"{new} [^g]*live", said(moveline("generations")))
    assert "is live" in said(moveline("drop", new), code=1)
    assert f"{live} is live; before: {new}" in said(moveline("demote"))
    assert "is gone" in said(moveline("drop", new))
    assert new not in said(moveline("generations"))


def test_an_audit_that_finds_something_fails(place: Place, moveline: Moveline) -> None:
    place.produce(500)
    place.catch_up()
    key = next(iter(place.live.client.keys("moveline:*:row:*")))
    place.live.client.setrange(key, 0, b"\x07\x07\x07")
    found = said(moveline("audit", f"g{place.live.generation}"), code=1)
    assert "1 not" in found
    assert "item_id of an event" in found


def test_times_users_and_names_that_are_none_are_refused(moveline: Moveline) -> None:
    assert "is not a time" in said(moveline("replay", "--into", "g2", "--from", "noon"), code=2)
    assert "names nobody" in said(moveline("replay", "--into", "g2", "--users", ","), code=2)
    assert "is not a generation" in said(moveline("promote", "two"), code=2)
    follow = moveline("replay", "--into", "g2", "--follow", "--dry-run")
    assert "--follow goes with" in said(follow, code=2)


def test_ctrl_c_pauses_a_replay_and_follow_goes_on(
    stack: LocalStack, place: Place, environment: dict[str, str]
) -> None:
    place.produce(4_000)
    place.catch_up()
    new = place.fresh()
    command = [sys.executable, "-m", "compose.cli", "replay", "--into", f"g{new.generation}"]
    slow = stack.spawn("slow", [*command, "--rate", "500"], env=environment)
    until(lambda: everything(new).rows, what=slow.log)
    os.kill(slow.pid, signal.SIGINT)
    until(lambda: "the same command goes on" in re.sub(r"\s+", " ", slow.log.read_text()))
    stack.stop("slow")
    assert 0 < place.here.lag(new) < len(place.sent)
    follower = stack.spawn("follow", [*command, "--follow"], env=environment)
    until(lambda: "following as worker" in follower.log.read_text(), what=follower.log)
    place.produce(1_000)
    place.catch_up()
    until(lambda: everything(new) == everything(place.live), what=follower.log)
    stack.stop("follow")


def test_dead_letters_from_list_to_redrive(place: Place, moveline: Moveline) -> None:
    producer = make_producer(place.kafka)
    for value in (b"{broken \xff", b"[1, 2]", b"{torn"):
        producer.produce(place.topics.events, value, b"7", headers=[("trace", b"a1")])
    assert not producer.flush(30)
    place.catch_up()
    listed = said(moveline("dlq", "list"))
    assert re.search(r"malformed │ +2 │ +0", listed)
    assert re.search(r"wrong_type │ +1 │ +0", listed)
    only = said(moveline("dlq", "list", "--reason", "wrong_type", "--limit", "5"))
    assert "malformed" not in only
    assert "malformed" not in said(moveline("dlq", "list", "--since", "2999-01-01"))
    place_of = [m[1] for m in re.finditer(r"(0:\d+) │ 20\S+ │ malformed", listed)]
    shown = said(moveline("dlq", "show", place_of[-1]))
    for part in (r"{broken \xff", "header trace a1", "malformed", place.topics.events):
        assert part in shown
    assert "no dead letter 0:99" in said(moveline("dlq", "show", "0:99"), code=1)
    assert "not PARTITION:OFFSET" in said(moveline("dlq", "show", "x"), code=2)
    planned = said(moveline("dlq", "redrive", "--dry-run"))
    assert "would be sent: 2 malformed, 1 wrong_type" in planned
    assert "sent: 2 malformed;" in said(moveline("dlq", "redrive", "--reason", "malformed"))
    assert "sent: 1 wrong_type; sent before: 2" in said(moveline("dlq", "redrive"))
    assert re.search(r"malformed │ +2 │ +2", said(moveline("dlq", "list")))
