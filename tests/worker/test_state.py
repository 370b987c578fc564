"""The worker's law on real servers: Redis holds what the oracle says, whatever the worker met."""

from __future__ import annotations

import itertools
import os
import random
import signal
import sys
from typing import TYPE_CHECKING

from features.keys import NUM_BUCKETS, bucket_of, checkpoints_key
from tests.waiting import until
from tests.worker.running import SESSION_TIMEOUT_MS, caught_up, running, wait_caught_up
from tests.worker.traffic import Traffic, assert_equals_oracle, publish

if TYPE_CHECKING:
    import redis

    from compose.local.stack import LocalStack
    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics


def test_state_equals_the_oracle(kafka: KafkaConfig, topics: Topics, store: StateStore) -> None:
    sent = Traffic(seed=1).make(22_000)
    publish(kafka, topics.events, sent)
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)
    assert assert_equals_oracle(store, kafka, topics, sent) > 200
    garbage = sum(one.event is None for one in sent)
    outside = sum(one.event is not None and one.event.action == "impression" for one in sent)
    applied, repeated = worker.counted("events_total"), worker.counted("duplicates_total")
    assert worker.counted("events_outside_streams_total") == outside
    assert applied + repeated == len(sent) - garbage - outside
    assert repeated > 100
    assert worker.counted("late_total") > 10
    assert worker.counted("micro_batch_events_sum") == len(sent)


def test_micro_batches_of_any_size_give_the_same_rows(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    sent = Traffic(seed=2, num_users=20).make(1_500)
    publish(kafka, topics.events, sent)
    with running(kafka, topics, store, batch_max=7) as worker:
        wait_caught_up(kafka, topics, worker)
    assert_equals_oracle(store, kafka, topics, sent)


def test_a_group_that_forgot_its_offsets_changes_nothing(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    """Offsets are a hint: reading all of it again is skipped by the buckets' checkpoints."""
    sent = Traffic(seed=3, num_users=50).make(2_000)
    publish(kafka, topics.events, sent)
    with running(kafka, topics, store) as first:
        wait_caught_up(kafka, topics, first)
    # What an operator does to replay: the same state under a group of another name.
    config = store.client.get(f"moveline:generation:g{store.generation}")
    again = type(store)(store.client, store.generation + 50_000, store.config)
    store.client.set(f"moveline:generation:g{again.generation}", config or b"")
    for key in store.client.keys(f"moveline:*:g{store.generation}:*"):
        renamed = key.replace(b":g%d:" % store.generation, b":g%d:" % again.generation)
        store.client.rename(key, renamed)
    # One bucket without users that says nothing of how far it is makes the worker read everything.
    users = {bucket_of(one.event.user_id) for one in sent if one.event}
    idle = min(set(range(NUM_BUCKETS)) - users)
    assert store.client.delete(checkpoints_key(again.generation, idle)) == 1
    with running(kafka, topics, again) as second:
        wait_caught_up(kafka, topics, second)
    assert second.counted("events_total") == 0
    assert second.counted("redelivered_total") > 0
    assert_equals_oracle(again, kafka, topics, sent)


def test_killed_five_times_nothing_is_lost_or_doubled(
    stack: LocalStack, kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    """SIGKILL at seeded moments; the moment is counted in writes Redis has seen."""
    sent = Traffic(seed=4).make(30_000)
    publish(kafka, topics.events, sent)
    source = random.Random(4)
    command = [sys.executable, "-m", "compose.cli", "worker", "--instance", "killed"]
    environment = worker_environment(stack, topics, store)
    for _ in range(5):
        before = num_writes(store.client)
        process = stack.spawn("worker", [*command, "--metrics-port", "0"], env=environment)
        more = source.randrange(1, 1_200)
        until(lambda b=before, m=more: num_writes(store.client) >= b + m, what=process.log)
        os.kill(process.pid, signal.SIGKILL)
        stack.stop("worker")
    assert not caught_up(kafka, topics, store.generation), "no kill was in the middle"
    process = stack.spawn("worker", [*command, "--metrics-port", "0"], env=environment)
    until(lambda: caught_up(kafka, topics, store.generation), what=process.log)
    stack.stop("worker")
    assert_equals_oracle(store, kafka, topics, sent)


def worker_environment(stack: LocalStack, topics: Topics, store: StateStore) -> dict[str, str]:
    """Return how a `moveline worker` process finds the test's corner of the servers."""
    config = store.config
    return {
        "MOVELINE_KAFKA__BOOTSTRAP": stack.addresses.kafka,
        "MOVELINE_KAFKA__PREFIX": topics.prefix,
        "MOVELINE_REDIS__URL": stack.addresses.redis,
        "MOVELINE_GENERATION": f"g{store.generation}",
        "MOVELINE_STATE__RECENT": str(config.recent),
        "MOVELINE_STATE__MID": str(config.mid),
        "MOVELINE_STATE__CHUNK": str(config.chunk),
        "MOVELINE_STATE__DEDUP_WINDOW": str(config.dedup_window),
        "MOVELINE_WORKER__BATCH_MAX": "200",
        "MOVELINE_WORKER__SESSION_TIMEOUT_MS": str(SESSION_TIMEOUT_MS),
    }


def num_writes(client: redis.Redis) -> int:
    """Return how many state writes this Redis has executed."""
    stats = client.info("commandstats").get("cmdstat_evalsha")
    return int(stats["calls"]) if stats else 0


def test_workers_join_and_leave(kafka: KafkaConfig, topics: Topics, store: StateStore) -> None:
    traffic = Traffic(seed=5)
    parts = [traffic.make(2_500) for _ in range(4)]
    publish(kafka, topics.events, parts[0])
    with running(kafka, topics, store) as first:
        first.wait("events_total", 500)
        with running(kafka, topics, store) as second:
            publish(kafka, topics.events, parts[1])
            until(lambda: second.worker.metrics.lag.collect()[0].samples, what="second assigned")
            publish(kafka, topics.events, parts[2])
            second.wait("events_total", 1)
            first.end()
            publish(kafka, topics.events, parts[3])
            wait_caught_up(kafka, topics, second)
    sent = list(itertools.chain(*parts))
    assert_equals_oracle(store, kafka, topics, sent)


def test_a_flushed_script_is_loaded_again(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    sent = Traffic(seed=6).make(4_000)
    publish(kafka, topics.events, sent)
    with running(kafka, topics, store, batch_max=100) as worker:
        for done in (1, 500, 1_000, 1_500):
            worker.wait("events_total", done)
            store.client.script_flush()
        wait_caught_up(kafka, topics, worker)
    assert_equals_oracle(store, kafka, topics, sent)
