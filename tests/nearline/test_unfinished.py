"""Goal: a hint whose offset was committed although its work never ended costs nothing.

faust-streaming/faust#606: the first event of a partition is slow, later ones are acknowledged, the
process is killed, and the group's offset has passed the unfinished event: nobody gets it again.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from features.nearline import TileStore
from streams.kafka import committed, make_producer
from streams.nearline import Hint, Work, encode_hint
from tests.nearline.apps import REPOSITORY, app_running
from tests.nearline.test_tiles import counted, events_of, expected
from tests.nearline.traffic import Recent
from tests.waiting import until
from tests.worker.traffic import publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.nearline_config import NearlineConfig
    from streams.topics import Topics


@contextmanager
def child_running(
    module: str, config: NearlineConfig, log_path: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A Faust app of the tests inside the block; killed after it."""
    command = [sys.executable, "-m", "faust", "-A", f"tests.nearline.{module}", "worker"]
    environment = os.environ | config.to_environment() | {"PYTHONPATH": str(REPOSITORY)}
    with log_path.open("ab") as log:
        child = subprocess.Popen(
            [*command, "--without-web"], cwd=REPOSITORY, env=environment, stdout=log, stderr=log
        )
    try:
        yield child
    finally:
        child.kill()
        child.wait()


def send_hints(kafka: KafkaConfig, topics: Topics) -> None:
    """Put a hint for each partition into the first partition of the topic."""
    producer = make_producer(kafka)
    for partition in range(3):
        value = encode_hint(Hint(Work.TILES, partition))
        producer.produce(topics.nearline, value=value, partition=0)
    assert not producer.flush(30)


def test_an_offset_committed_past_unfinished_work(
    config: NearlineConfig,
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    tmp_path: Path,
) -> None:
    store.claim_generation()
    sent = Recent(seed=31, num_users=60, num_events=2_000).make(2_000)
    publish(kafka, topics.events, sent)
    send_hints(kafka, topics)
    tiles = TileStore(store.client, store.generation)
    log_path = tmp_path / "app.log"
    with child_running("unfinished_child", config, log_path) as child:
        until(
            lambda: (
                child.poll() is not None
                or committed(kafka, config.app_id, topics.nearline).get(0, 0) == 3
            ),
            what="an offset past all three hints",
        )
        assert child.poll() is None, log_path.read_text()
    # All three are done, says Kafka. The first is not, and nobody will be given it again.
    assert tiles.marks(0).next_offset is None
    assert tiles.marks(1).next_offset
    assert tiles.marks(2).next_offset
    events = events_of(kafka, topics, sent, store)
    with app_running(config, log_path):
        # The child is still a member of the group until its session has run out.
        until(lambda: counted(tiles, 3) == expected(events), 150, what="every event counted once")


def test_an_app_that_owns_partitions_and_hears_nothing_ends(
    config: NearlineConfig, store: StateStore, tmp_path: Path
) -> None:
    store.claim_generation()
    log_path = tmp_path / "app.log"
    with child_running("silent_child", replace(config, metrics_port=0), log_path) as child:
        assert child.wait(150) != 0
    assert "although partitions are assigned" in log_path.read_text()
