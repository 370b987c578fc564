"""Commands against the real servers, and against none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from features.clock import now_ms
from features.events import decode_event, stable_id
from features.redis import CatalogueStore, Pointers, StateStore, Trending, connect
from streams.kafka import KafkaConfig, ensure_topics
from streams.topics import Topics
from tests.cli.conftest import assert_one_sentence
from tests.scoring.states import write_clicks
from tests.small import SMALL
from tests.streams.support import read_all
from tests.waiting import until
from tests.worker.running import SESSION_TIMEOUT_MS, caught_up

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from compose.local.stack import LocalStack
    from tests.cli.conftest import Moveline

NOWHERE = "127.0.0.1:9"
CSV = "household,product,when,kind\n7,11,{0},click\nada,12,{0},view\n7,13,{0},impression\n"
MAPS = ("--map", "user_id=household", "--map", "item_id=product", "--map", "event_time_ms=when")


@pytest.fixture
def topics(triton_stack: LocalStack) -> Topics:
    """Topics nobody else uses, on the broker of the whole stack."""
    fresh = Topics(f"t{uuid.uuid4().hex[:12]}")
    ensure_topics(KafkaConfig(triton_stack.addresses.kafka), fresh.specs(2))
    return fresh


@pytest.fixture
def state(triton_stack: LocalStack, generation: int) -> Iterator[StateStore]:
    """An empty Redis of the whole stack, and a generation in it."""
    client = connect(triton_stack.addresses.redis)
    client.flushall()
    store = StateStore(client, generation, SMALL)
    store.claim_generation()
    yield store
    client.close()


@pytest.fixture
def here(triton_stack: LocalStack, topics: Topics, state: StateStore) -> dict[str, str]:
    """Where a command finds all of it."""
    addresses = triton_stack.addresses
    return {
        "KAFKA__BOOTSTRAP": addresses.kafka,
        "KAFKA__PREFIX": topics.prefix,
        "REDIS__URL": addresses.redis,
        "TRITON__GRPC": addresses.triton_grpc,
        "GENERATION": f"g{state.generation}",
    }


def test_status_against_the_stack(
    moveline: Moveline, here: dict[str, str], topics: Topics, state: StateStore
) -> None:
    write_clicks(state, 5, [1])
    CatalogueStore(state.client).put_pointers(Pointers(4, state.generation))
    done = moveline("status", **here)
    assert done.returncode == 0, done
    for word in (
        topics.events,
        topics.dead_letters,
        f"1 users in g{state.generation}",
        "model version 4",
        "recommend",
        "READY",
        "lake: 0 files",
        "freshness",
    ):
        assert word in done.stdout


def test_status_against_nothing(moveline: Moveline) -> None:
    """Each part says for itself that it is away, and what was looked for."""
    done = moveline(
        "status", KAFKA__BOOTSTRAP=NOWHERE, REDIS__URL=f"redis://{NOWHERE}/0", TRITON__GRPC=NOWHERE
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    for word in ("No Kafka broker answered", "Redis did not answer", "listing models", "lake: 0"):
        assert word in done.stdout


def test_produce_from_stdin(moveline: Moveline, here: dict[str, str], topics: Topics) -> None:
    text = CSV.format(now_ms())
    done = moveline(
        "produce", "-", "--format", "csv", *MAPS, "--map", "action=kind", stdin=text, **here
    )
    assert done.returncode == 0, done
    assert "3 events acknowledged" in done.stderr
    messages = read_all(KafkaConfig(here["KAFKA__BOOTSTRAP"]), topics.events)
    events = [decode_event(message.value()) for message in messages]
    assert sorted((event.user_id, event.item_id, event.action) for event in events) == sorted(
        [(7, 11, "click"), (stable_id("ada"), 12, "view"), (7, 13, "impression")]
    )


def test_produce_says_what_is_wrong_with_a_file(
    moveline: Moveline, here: dict[str, str], tmp_path: Path
) -> None:
    assert_one_sentence(moveline("produce", "absent.csv", **here), "absent.csv")
    (tmp_path / "bad.csv").write_text("user_id,item_id,action,event_time_ms\n1,2,click,noon\n")
    assert_one_sentence(moveline("produce", "bad.csv", **here), "row 1", "noon")
    assert_one_sentence(moveline("produce", "bad.csv", "--map", "user_id", **here), "user_id")


def test_produce_without_a_broker(moveline: Moveline, tmp_path: Path) -> None:
    """It ends before the file is read: which topic takes events, only the broker can say."""
    (tmp_path / "one.csv").write_text(
        f"user_id,item_id,action,event_time_ms\n1,2,click,{now_ms()}\n"
    )
    done = moveline("produce", "one.csv", KAFKA__BOOTSTRAP=NOWHERE)
    assert_one_sentence(done, "No Kafka broker answered", NOWHERE)
    assert done.stderr.count("refused") < 5, "a broker that is away is said once, not many times"


def test_features_of_a_known_and_an_unknown_user(
    moveline: Moveline, here: dict[str, str], state: StateStore
) -> None:
    write_clicks(state, 5, [101, 102])
    known = moveline("features", "5", **here)
    assert known.returncode == 0, known
    for word in ("user 5", f"generation g{state.generation}", "2 events", "101", "102", "click"):
        assert word in known.stdout
    unknown = moveline("features", "somebody", **here)
    assert unknown.returncode == 1
    assert f"user {stable_id('somebody')} has no state" in unknown.stdout
    away = moveline("features", "5", "--redis", f"redis://{NOWHERE}/0", **here)
    assert_one_sentence(away, "Redis did not answer")


def test_recommend_prints_answers_for_programs_too(
    moveline: Moveline, here: dict[str, str], state: StateStore
) -> None:
    CatalogueStore(state.client).put_trending(Trending((7, 8, 9), (3.0, 2.0, 1.0)))

    def ask() -> dict[str, object]:
        done = moveline("recommend", "nobody", "-k", "2", "--json", "--deadline", "10", **here)
        assert done.returncode == 0, done
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    wanted = [
        {"item_id": 7, "original_id": None, "name": None, "score": 3.0},
        {"item_id": 8, "original_id": None, "name": None, "score": 2.0},
    ]
    # Not followed yet, or Redis was late: asked again.
    until(lambda: (said := ask())["items"] == wanted and said["degraded"] == 1)
    assert_one_sentence(moveline("recommend", "1", "-k", "0", **here), "k=0")
    away = moveline("recommend", "1", "--triton", NOWHERE, **here)
    assert_one_sentence(away, NOWHERE)


def test_worker_from_start_to_ctrl_c(
    moveline: Moveline, here: dict[str, str], topics: Topics, state: StateStore, tmp_path: Path
) -> None:
    """A real process: it takes what is there, commits, and ends with exit code 0."""
    sizes = {
        f"STATE__{name.upper()}": str(getattr(SMALL, name))
        for name in ("recent", "mid", "chunk", "dedup_window")
    }
    text = CSV.format(now_ms())
    moveline("produce", "-", "--format", "csv", *MAPS, "--map", "action=kind", stdin=text, **here)
    # A worker that a busy machine holds up keeps its partitions.
    sizes["WORKER__SESSION_TIMEOUT_MS"] = str(SESSION_TIMEOUT_MS)
    variables = {f"MOVELINE_{name}": value for name, value in {**here, **sizes}.items()}
    command = [sys.executable, "-m", "compose.cli", "worker", "--metrics-port", "0"]
    log = tmp_path / "worker.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            command, env={**os.environ, **variables}, stderr=output, stdout=output
        )
        try:
            kafka = KafkaConfig(here["KAFKA__BOOTSTRAP"])
            until(lambda: process.poll() is not None or caught_up(kafka, topics, state.generation))
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0, log.read_text()
        finally:
            process.kill()
            process.wait()
    assert "metrics at" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert state.load([7])[7].next_ordinal == 1


def test_a_worker_that_cannot_start_says_why(
    moveline: Moveline, here: dict[str, str], state: StateStore
) -> None:
    """The recorded rules win over the settings, so that only another Redis can contradict."""
    del state
    done = moveline("worker", "--metrics-port", "0", **{**here, "KAFKA__PREFIX": "absent"})
    assert_one_sentence(done, "absent.control", "does not exist")


def test_commands_without_their_input_name_the_next_one(
    moveline: Moveline, here: dict[str, str]
) -> None:
    assert_one_sentence(moveline("evaluate", **here), "moveline train")
    assert_one_sentence(moveline("publish", **here), "moveline train")


def test_topics_are_created_once(moveline: Moveline, here: dict[str, str]) -> None:
    fresh = {**here, "KAFKA__PREFIX": f"t{uuid.uuid4().hex[:12]}"}
    first = moveline("topics", "create", **fresh)
    assert first.returncode == 0
    assert first.stderr.count(fresh["KAFKA__PREFIX"]) == len(Topics().specs())
    second = moveline("topics", "create", **fresh)
    assert "none, all were there" in second.stderr
    other = moveline("topics", "create", **{**fresh, "KAFKA__PARTITIONS": "9"})
    assert_one_sentence(other, "partitions", "9")
