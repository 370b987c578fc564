"""Redis frozen, killed or full while events flow: the worker pauses, goes on, and loses nothing."""

from __future__ import annotations

import os
import signal
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from compose.local import processes
from compose.local.ports import free_ports
from compose.local.processes import Launch
from compose.local.redis import PORT_OPTION, Redis, locate
from compose.local.server import await_ready
from features.errors import StoreFullError, UnsafeStoreError
from features.keys import bucket_of
from features.redis import BucketWrite, CatalogueStore, StateStore, connect
from features.row import RowWrite
from tests.small import SMALL
from tests.waiting import until
from tests.worker.running import Running, running, wait_caught_up
from tests.worker.traffic import Traffic, assert_equals_oracle, publish

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# Short, so that a frozen Redis is noticed soon; longer than a loaded machine stands still, which
# would end a worker that starts, and the test's own reads.
TIMEOUT_S = 3.0


@dataclass
class OwnRedis:
    """A valkey-server of one test, which may be frozen, killed and started again on its data."""

    folder: Path
    port: int
    identity: processes.Identity | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        """Start it on the data it has; return once it answers."""
        server = Redis(binary=locate(), data_dir=self.folder, port=self.port, ready_timeout_s=30.0)
        plan = server.plan({PORT_OPTION: self.port})
        log = self.folder / "log"
        # Acknowledged is on disk: what a machine that may lose power has to be set to.
        argv = (*plan.argv, "--appendfsync", "always")
        launch = Launch(argv=argv, environment=plan.environment, log=log, tied=True)
        self.identity = processes.start(launch, record=lambda _: None)
        await_ready("redis", self.identity, plan, log=log)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self.identity is not None
        os.kill(self.identity.pid, number)

    def kill(self) -> None:
        """End it without a chance to write anything."""
        assert self.identity is not None
        self.signal(signal.SIGKILL)
        assert processes.stop([self.identity], timeout_s=5) == []


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[OwnRedis]:
    """A running server for one test."""
    own = OwnRedis(tmp_path, free_ports(1)[0])
    own.start()
    yield own
    own.signal(signal.SIGCONT)
    assert own.identity is not None
    assert processes.stop([own.identity], timeout_s=10) == []


@pytest.fixture
def store(own_redis: OwnRedis, generation: int) -> Iterator[StateStore]:
    """State in the test's own Redis, behind a short time-out."""
    client = connect(own_redis.url, timeout_s=TIMEOUT_S)
    yield StateStore(client, generation, SMALL)
    client.close()


@contextmanager
def interrupted(
    kafka: KafkaConfig, topics: Topics, store: StateStore, seed: int
) -> Iterator[Running]:
    """Events before, inside and after the block, in which Redis has to be made unusable.

    After the block the worker must have caught up with all of them, exactly.
    """
    traffic = Traffic(seed=seed)
    parts = [traffic.make(2_000) for _ in range(3)]
    publish(kafka, topics.events, parts[0])
    with running(kafka, topics, store, batch_max=200) as worker:
        worker.wait("events_total", 300)
        publish(kafka, topics.events, parts[1])
        yield worker
        publish(kafka, topics.events, parts[2])
        wait_caught_up(kafka, topics, worker)
    assert worker.counted("store_pauses_total") >= 1
    assert_equals_oracle(store, kafka, topics, [*parts[0], *parts[1], *parts[2]])
    assert set(CatalogueStore(store.client).get_domains().values()) == {
        "home",
        "brot & käse",
        "search",
    }


def test_redis_frozen(
    kafka: KafkaConfig, topics: Topics, store: StateStore, own_redis: OwnRedis
) -> None:
    with interrupted(kafka, topics, store, seed=11) as worker:
        own_redis.signal(signal.SIGSTOP)
        worker.wait("store_pauses_total", 1)
        own_redis.signal(signal.SIGCONT)


def test_redis_killed_and_started_again(
    kafka: KafkaConfig, topics: Topics, store: StateStore, own_redis: OwnRedis
) -> None:
    with interrupted(kafka, topics, store, seed=12) as worker:
        own_redis.kill()
        worker.wait("store_pauses_total", 1)
        own_redis.start()


def nobodys_write() -> BucketWrite:
    """Return a write that a Redis with room would take: of a source that no worker reads."""
    row = RowWrite(b"", -1, b"row", ())
    return BucketWrite(bucket_of(10**9), 9, 0, -1, 1, {10**9: row})


def test_redis_full(
    kafka: KafkaConfig, topics: Topics, store: StateStore, own_redis: OwnRedis
) -> None:
    admin = connect(own_redis.url)
    with interrupted(kafka, topics, store, seed=13) as worker:
        admin.config_set("maxmemory", 1)
        worker.wait("store_pauses_total", 1)
        with pytest.raises(StoreFullError, match="maxmemory"):
            store.write_buckets([nobodys_write()])
        admin.config_set("maxmemory", 0)
    admin.close()


@pytest.mark.skipif(
    not os.environ.get("KAFKA_HOME"),
    reason="needs Apache Kafka (KAFKA_HOME): a member that waits to join the embedded broker's "
    "group misses a rebalance that is followed by another within some 50 ms",
)
def test_partitions_that_arrive_during_a_pause_lose_nothing(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    own_redis: OwnRedis,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A rebalance in the middle of a pause hands records to a worker that cannot write them."""
    caplog.set_level("INFO", "moveline.worker")

    def num_said(word: str, by: Running) -> int:
        mine = [record for record in caplog.records if record.threadName == by.thread.name]
        return sum(record.getMessage().startswith(word) for record in mine)

    # Only events that change a row: whichever record is handed out must be missed if it is lost.
    made = {one.value: one for one in Traffic(seed=14).make(3_000)}.values()
    events = [one for one in made if one.event and one.event.action != "impression"]
    parts = [events[:1_000], events[1_000:]]
    publish(kafka, topics.events, parts[0])
    with running(kafka, topics, store, batch_max=50) as leaving:
        leaving.wait("events_total", 100)
        with running(kafka, topics, store, batch_max=50) as staying:
            until(lambda: staying.worker.metrics.lag.collect()[0].samples, what="assigned")
            own_redis.signal(signal.SIGSTOP)
            publish(kafka, topics.events, parts[1])
            staying.wait("store_pauses_total", 1)
            before = num_said("assigned", staying)
            leaving.end()
            until(lambda: num_said("assigned", staying) > before, what="the rest assigned")
            assert not num_said("resumed", staying)
            own_redis.signal(signal.SIGCONT)
            wait_caught_up(kafka, topics, staying)
    assert_equals_oracle(store, kafka, topics, [*parts[0], *parts[1]])


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_redis_that_may_evict_is_refused(
    kafka: KafkaConfig, topics: Topics, store: StateStore, policy: str
) -> None:
    store.client.config_set("maxmemory-policy", policy)
    with (
        pytest.raises(UnsafeStoreError, match=rf"{policy}.*noeviction"),
        running(kafka, topics, store),
    ):
        pass
