"""Beside a real worker: withdrawn items leave answers, and positions of events are reached."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import uuid
from typing import TYPE_CHECKING

import pytest

from features.clock import now_ms
from features.events import Event
from scoring.signature import Degraded
from streams.kafka import KafkaConfig, ensure_topics
from streams.producer import EventProducer
from streams.topics import Topics
from tests.asking import answered, whole
from tests.scoring.states import write_clicks
from tests.scoring.tiny import ITEM_IDS
from tests.small import REPOSITORY
from tests.waiting import until
from tests.worker.running import SESSION_TIMEOUT_MS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.redis import StateStore
    from scoring.client import Recommender
    from streams.producer import Delivery

pytestmark = pytest.mark.servers
# Of whom nothing is written: the worker's own.
OTHER_USER = 9
# From the end of the load on, the worker running: what is promised.
WITHDRAWN_S_MAX = 10.0


@pytest.fixture
def topics(triton_stack: LocalStack) -> Topics:
    """Topics of the test's own, on the broker beside Triton."""
    fresh = Topics(f"t{uuid.uuid4().hex[:12]}")
    ensure_topics(KafkaConfig(triton_stack.addresses.kafka), fresh.specs(2))
    return fresh


@pytest.fixture
def environment(
    triton_stack: LocalStack, served_store: StateStore, topics: Topics, tmp_path: Path
) -> dict[str, str]:
    """What the commands are told."""
    addresses = triton_stack.addresses
    return {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "MOVELINE_KAFKA__BOOTSTRAP": addresses.kafka,
        "MOVELINE_KAFKA__PREFIX": topics.prefix,
        "MOVELINE_KAFKA__PARTITIONS": "2",
        "MOVELINE_REDIS__URL": addresses.redis,
        "MOVELINE_TRITON__GRPC": addresses.triton_grpc,
        "MOVELINE_GENERATION": f"g{served_store.generation}",
        "MOVELINE_WORKER__METRICS_PORT": "0",
        # A worker that a busy machine holds up keeps its partitions.
        "MOVELINE_WORKER__SESSION_TIMEOUT_MS": str(SESSION_TIMEOUT_MS),
        "MOVELINE_RUN_DIR": str(tmp_path),
    }


@pytest.fixture
def worker(environment: dict[str, str], tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A `moveline worker` that keeps the state and the catalogue which answers are read from."""
    with (tmp_path / "worker.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "compose.cli", "worker"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    yield process
    process.send_signal(signal.SIGTERM)
    process.wait(30)


def click(event_id: str, user: int, action: str = "click") -> Event:
    return Event(event_id=event_id, user_id=user, item_id=1, action=action, event_time_ms=now_ms())


def is_reached(recommender: Recommender, user: int, sent: Delivery) -> Callable[[], object]:
    """Return a condition: an answer has seen the event."""

    def reached() -> bool:
        answer = whole(lambda: recommender.recommend(user, min_position=sent.position))
        return Degraded.POSITION_NOT_REACHED not in answer.provenance.degraded

    return answered(reached)


def load_items(environment: dict[str, str], path: Path, rows: dict[int, bool]) -> None:
    """Run `moveline items load`."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["item_id", "name", "available"])
        writer.writerows((item, f"item {item}", available) for item, available in rows.items())
    subprocess.run(
        [sys.executable, "-m", "compose.cli", "items", "load", str(path)],
        env=environment,
        check=True,
        capture_output=True,
        timeout=60,
    )


def test_a_withdrawn_item_leaves_every_answer(
    environment: dict[str, str],
    topics: Topics,
    worker: subprocess.Popen[bytes],
    recommender: Recommender,
    served_store: StateStore,
    go_live: Callable[..., None],
    version: int,
    tmp_path: Path,
) -> None:
    write_clicks(served_store, 5, ITEM_IDS[:8])
    go_live(version)
    first = whole(lambda: recommender.recommend(5, k=5)).items[0].item_id
    gone = {first, 7}

    def shown() -> set[int]:
        asked = [
            *whole(lambda: recommender.recommend_many([5, 6], k=30)),
            whole(lambda: recommender.recommend(5, k=30, candidates=[*ITEM_IDS, 7])),
        ]
        return {item.item_id for answer in asked for item in answer.items}

    assert gone <= shown()
    kafka = KafkaConfig(environment["MOVELINE_KAFKA__BOOTSTRAP"])
    with EventProducer(kafka, topics.events) as producer:
        sent = producer.send_and_wait(click("first", OTHER_USER), 30)
    until(is_reached(recommender, OTHER_USER, sent), what="the worker has started")
    load_items(environment, tmp_path / "items.csv", dict.fromkeys(gone, False))
    until(lambda: not gone & shown(), WITHDRAWN_S_MAX, what="withdrawn items are gone")
    # Whichever instance answers; twenty rounds take a busy machine a while.
    until(
        lambda: all(not gone & shown() for _ in range(20)), 30, what="every instance has followed"
    )
    assert worker.poll() is None


def test_positions_of_repeats_and_of_what_enters_no_stream_are_reached(
    triton_stack: LocalStack,
    topics: Topics,
    worker: subprocess.Popen[bytes],
    recommender: Recommender,
    go_live: Callable[..., None],
) -> None:
    go_live(None)
    twice = click("twice", 5)
    with EventProducer(KafkaConfig(triton_stack.addresses.kafka), topics.events) as producer:
        sent = producer.send_and_wait(twice, 30)
        # The first answer waits for the worker to start.
        until(is_reached(recommender, 5, sent), what="the first event")
        repeat = producer.send_and_wait(twice, 30)
        until(is_reached(recommender, 5, repeat), 30, what="the repeat's position")
        assert whole(lambda: recommender.recommend(5)).provenance.ordinal == 1
        other = producer.send_and_wait(click("seen", 5, "impression"), 30)
    # Nothing of it enters the bucket: it is reached when idle buckets are brought up.
    until(is_reached(recommender, 5, other), what="the impression's position")
    assert worker.poll() is None
