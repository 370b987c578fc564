"""Redis that goes back under a running worker, with no rebalance: it notices, reads again, agrees.

Method: every key is dumped and put back in one transaction on real servers. What Kafka has deleted
by then comes from a lake that the real sink has written.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from features.redis import CHECKPOINT_DIFFERS, CatalogueStore, StateStore
from streams.errors import LogHoleError, StateContendedError
from streams.kafka import watermarks
from streams.lake import LakeSink
from tests.conftest import NUM_PARTITIONS
from tests.streams.support import read_all
from tests.waiting import TIMEOUT_S, until
from tests.worker.running import Running, running, wait_caught_up
from tests.worker.traffic import (
    Sent,
    Traffic,
    accepted_of,
    assert_equals_oracle,
    assert_holds,
    expected_of,
    publish,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    import redis

    from features.redis import BucketWrite
    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# One script, for a snapshot is of one moment.
DUMP_ALL = """
local found = {}
for _, key in ipairs(redis.call('KEYS', '*')) do
  found[#found + 1] = key
  found[#found + 1] = redis.call('DUMP', key)
end
return found
"""
ALL_DOMAINS = {"home", "brot & käse", "search"}


def dump_all(client: redis.Redis) -> dict[bytes, bytes]:
    """Return every key's bytes at one moment."""
    found: Any = client.eval(DUMP_ALL, 0)
    return dict(zip(found[::2], found[1::2], strict=True))


def go_back(client: redis.Redis, snapshot: Mapping[bytes, bytes]) -> None:
    """Make Redis what it was, at once for everybody; connections and scripts stay."""
    pipeline = client.pipeline(transaction=True)
    pipeline.flushdb()
    for key, dumped in snapshot.items():
        pipeline.restore(key, 0, dumped)
    pipeline.execute()


def wait_holds(
    store: StateStore, worker: Running, by_user: Mapping[int, Sequence[Accepted]]
) -> None:
    """Return once Redis has everybody's row, and then compare everything."""
    rows: list[bytes | None] = [expected_of(log, store.config).row for log in by_user.values()]
    until(lambda: worker.errors or store.read_rows(list(by_user)) == rows, what="all rows")
    if worker.errors:
        raise worker.errors[0]
    assert_holds(store, by_user)


def num_garbage(sent: Sequence[Sent]) -> int:
    return sum(one.event is None for one in sent)


def test_redis_goes_back_while_events_flow(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    """Users who have no event after that moment get theirs back too."""
    traffic = Traffic(seed=31)
    sent = traffic.make(6_000)
    publish(kafka, topics.events, sent)
    with running(kafka, topics, store, batch_max=100) as worker:
        worker.wait("events_total", 500)
        snapshot = dump_all(store.client)
        worker.wait("events_total", 2_000)
        go_back(store.client, snapshot)
        more = traffic.make(500)
        publish(kafka, topics.events, more)
        by_user = accepted_of(kafka, topics, [*sent, *more], store.config)
        wait_holds(store, worker, by_user)
        wait_caught_up(kafka, topics, worker)
    assert worker.counted("refused_writes_total") >= 1
    assert worker.counted("store_pauses_total") == 0
    assert_equals_oracle(store, kafka, topics, [*sent, *more])
    assert set(CatalogueStore(store.client).get_domains().values()) == ALL_DOMAINS


@pytest.mark.parametrize("lost", ["some", "everything"])
def test_redis_goes_back_while_nothing_happens(
    kafka: KafkaConfig, topics: Topics, store: StateStore, lost: str
) -> None:
    """No record comes that could be refused, and dead letters are not sent again."""
    traffic = Traffic(seed=32)
    parts = traffic.make(1_000), traffic.make(1_000)
    snapshot: dict[bytes, bytes] = {}
    with running(kafka, topics, store) as worker:
        publish(kafka, topics.events, parts[0])
        wait_caught_up(kafka, topics, worker)
        if lost == "some":
            snapshot = dump_all(store.client)
        publish(kafka, topics.events, parts[1])
        wait_caught_up(kafka, topics, worker)
        by_user = accepted_of(kafka, topics, [*parts[0], *parts[1]], store.config)
        assert_holds(store, by_user)
        go_back(store.client, snapshot)
        wait_holds(store, worker, by_user)
    assert worker.counted("refused_writes_total") >= 1
    assert len(read_all(kafka, topics.dead_letters)) == num_garbage([*parts[0], *parts[1]])
    assert set(CatalogueStore(store.client).get_domains().values()) == ALL_DOMAINS


@dataclass(frozen=True)
class Log:
    """A topic of which the lake has the older part.

    Attributes:
        sent: all of it.
        ends: by partition, the offset after the part that is in the lake.
    """

    lake: Path
    sent: list[Sent]
    kafka: KafkaConfig
    topics: Topics
    ends: dict[int, int]

    def forget(self) -> None:
        """Let Kafka delete what the lake has."""
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap})
        places = [TopicPartition(self.topics.events, *end) for end in self.ends.items()]
        for future in admin.delete_records(places).values():
            future.result()
        lows = {number: end for number, end in self.ends.items() if end}
        until(lambda: self.lows() == lows, what="deleted")
        assert len(lows) == NUM_PARTITIONS

    def lows(self) -> dict[int, int]:
        """Return Kafka's oldest offset of each partition."""
        bounds = watermarks(self.kafka, self.topics.events)
        return {number: low for number, (low, _) in bounds.items()}


@pytest.fixture
def log(kafka: KafkaConfig, topics: Topics, tmp_path: Path) -> Log:
    """A topic whose first two thirds are in the lake."""
    traffic = Traffic(seed=33)
    parts = traffic.make(2_000), traffic.make(1_000)
    publish(kafka, topics.events, parts[0])
    report = LakeSink(kafka, topics.events, tmp_path / "lake").run(until_end=True)
    publish(kafka, topics.events, parts[1])
    return Log(tmp_path / "lake", [*parts[0], *parts[1]], kafka, topics, report.ends)


def test_what_kafka_has_no_more_comes_from_the_lake(log: Log, store: StateStore) -> None:
    """Redis loses everything under a running worker after Kafka has deleted most of the log."""
    kafka, topics = log.kafka, log.topics
    by_user = accepted_of(kafka, topics, log.sent, store.config)
    with running(kafka, topics, store, lake=log.lake) as worker:
        wait_caught_up(kafka, topics, worker)
        assert_holds(store, by_user)
        log.forget()
        go_back(store.client, {})
        wait_holds(store, worker, by_user)
    assert len(read_all(kafka, topics.dead_letters)) == num_garbage(log.sent)
    assert set(CatalogueStore(store.client).get_domains().values()) == ALL_DOMAINS


def test_a_first_worker_begins_in_the_lake(log: Log, store: StateStore) -> None:
    by_user = accepted_of(log.kafka, log.topics, log.sent, store.config)
    log.forget()
    with running(log.kafka, log.topics, store, lake=log.lake) as worker:
        wait_caught_up(log.kafka, log.topics, worker)
    assert worker.counted("refused_writes_total") == 0
    assert_holds(store, by_user)


def test_what_neither_has_ends_the_worker(log: Log, store: StateStore, tmp_path: Path) -> None:
    """Rather than states with a hole in them."""
    log.forget()
    for lake in (None, tmp_path / "empty"):
        with (
            pytest.raises(LogHoleError, match=r"next offset .* is 0"),
            running(log.kafka, log.topics, store, lake=lake) as worker,
        ):
            worker.thread.join(TIMEOUT_S)
    assert not store.client.keys(f"moveline:*:g{store.generation}:row:*")


@dataclass(frozen=True)
class AlwaysRefused(StateStore):
    """A store whose writes are refused for ever.

    A double, because no real Redis can be made to have another writer win every single time.
    """

    num_writes: list[int] = field(default_factory=list)

    def write_buckets(self, writes: Iterable[BucketWrite]) -> list[int]:
        """Refuse everybody."""
        refused = [CHECKPOINT_DIFFERS for _ in writes]
        self.num_writes.append(len(refused))
        return refused


def test_refused_for_ever_ends_with_a_sentence(
    kafka: KafkaConfig, topics: Topics, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Each refusal costs a second of reading again: fewer of them say the same.
    monkeypatch.setattr("streams.worker.OUT_OF_STEP_MAX", 3)
    refused = AlwaysRefused(store.client, store.generation, store.config)
    publish(kafka, topics.events, Traffic(seed=34, malformed_share=0.0).make(20))
    with (
        pytest.raises(StateContendedError, match=r"refused 3 times in a row.*moveline status"),
        running(kafka, topics, refused) as worker,
    ):
        until(lambda: worker.errors, what="the worker has given up")
    assert len(refused.num_writes) == 4
    assert not store.client.keys(f"moveline:*:g{store.generation}:row:*")
