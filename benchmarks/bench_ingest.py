"""How many events per second does one worker keep in Redis, and what bounds it?

Workload: 1,000,000 JSON events of 100,000 users (Zipf 1.1, seed 1) in 4 partitions, published
beforehand; state of the default sizes with duplicates, session and positions. One worker process,
Redis and Kafka on the same machine. In the same run: a consumer that touches every value and does
nothing (the floor), and the same job as a Faust agent on the first 50,000 of the events
(benchmarks/faust_agent.py; it is measured after a tenth of them, and its states are compared with
the oracle).
Histories: users with 10, 1,000 and 5,000 events each, rate over the events that follow.
EVENTS=n measures less. Not measured: other machines in between, more than one worker, TLS.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING

from benchmarks.against_faust import BATCH_MAX, faust_rate
from benchmarks.common import (
    CONSOLE,
    TOPICS,
    WorkerProcess,
    is_recording,
    kafka_and_redis,
    kafka_home,
    publish,
    zipf_users,
)
from compose.figures import report
from features.redis import connect, count_users, memory_used
from streams.kafka import KafkaConfig, TopicPartition, make_consumer, watermarks

if TYPE_CHECKING:
    from compose.local.stack import LocalStack

NUM_EVENTS = int(os.environ.get("EVENTS", "1000000"))
NUM_USERS = 100_000
# Of the same events, for the Faust agent: it needs ten seconds for them.
FAUST_EVENTS = min(50_000, NUM_EVENTS)
# Length of a history, and how many users have one: enough for a rate over half as many events.
HISTORIES = ((10, 40_000), (1_000, 400), (5_000, 200))


def floor(kafka: KafkaConfig) -> float:
    """Return records/s of a consumer that looks at each value's length and does nothing."""
    consumer = make_consumer(kafka, group="bench-floor")
    bounds = watermarks(kafka, TOPICS.events)
    consumer.assign([TopicPartition(TOPICS.events, p, low) for p, (low, _) in bounds.items()])
    total = sum(high - low for low, high in bounds.values())
    seen = num_bytes = 0
    started = 0.0
    while seen < total:
        messages = consumer.consume(10_000, 1.0)
        if messages and not started:
            started = time.perf_counter()
        for message in messages:
            num_bytes += len(message.value() or b"")
        seen += len(messages)
    seconds = time.perf_counter() - started
    consumer.close()
    assert num_bytes
    return total / seconds


def bytes_per_user(stack: LocalStack) -> tuple[float, float]:
    """Return Redis' memory per user and per event, as Redis itself counts it."""
    client = connect(stack.addresses.redis)
    rows = count_users(client, 1)
    dataset = memory_used(client)
    return dataset / rows, dataset / NUM_EVENTS


def main_run() -> dict[str, float]:
    """Measure the main workload, its floor and the Faust agent."""
    users = zipf_users(NUM_EVENTS, NUM_USERS, exponent=1.1, seed=1)
    with kafka_and_redis() as (stack, kafka):
        publish(kafka, users)
        floor_rate = floor(kafka)
        CONSOLE.print(f"floor: {floor_rate:,.0f} records/s")
        worker = WorkerProcess(stack)
        rate = worker.rate_until(NUM_EVENTS)
        CONSOLE.print(f"worker: {rate:,.0f} events/s, {worker.resident_mb():.0f} MB resident")
        resident_mb = worker.resident_mb()
        per_user, per_event = bytes_per_user(stack)
        stack.stop(worker.name)
        faust = faust_rate(stack, kafka, users[:FAUST_EVENTS])
        CONSOLE.print(f"Faust agent: {faust:,.0f} events/s")
        batched = faust_rate(stack, kafka, users[:FAUST_EVENTS], batch_max=BATCH_MAX)
        CONSOLE.print(f"in batches of up to {BATCH_MAX:,}: {batched:,.0f} events/s")
        return {
            "events_per_s": round(rate),
            "floor_events_per_s": round(floor_rate),
            "floor_ratio": round(rate / floor_rate, 3),
            "faust_events_per_s": round(faust),
            "ratio_to_faust": round(rate / faust, 1),
            "faust_batched_events_per_s": round(batched),
            "ratio_to_faust_batched": round(rate / batched, 1),
            "bytes_per_user": round(per_user),
            "bytes_per_event": round(per_event),
            "worker_mb": round(resident_mb),
        }


def history_run(length: int, num_users: int) -> float:
    """Return events/s over further events of users whose history is `length` long."""
    users = list(range(1, num_users + 1))
    measured = max(1, min(length // 2, 200_000 // num_users))
    with kafka_and_redis() as (stack, kafka):
        publish(kafka, users * length)
        worker = WorkerProcess(stack)
        worker.wait_until(num_users * length)
        stack.stop(worker.name)
        publish(kafka, users * measured, first=num_users * length)
        return WorkerProcess(stack, name="worker-2").rate_until(num_users * measured)


def main() -> None:
    """Measure everything and report."""
    keep = is_recording(__doc__)
    figures: dict[str, float] = main_run()
    for length, num_users in HISTORIES:
        figures[f"events_per_s_history_{length}"] = round(history_run(length, num_users))
    report(
        "bench-ingest",
        figures,
        command="make bench-ingest",
        caveats={
            "broker": "Apache Kafka" if kafka_home() else "embedded",
            "machine": "broker, Redis and worker share the cores",
            "events": f"{NUM_EVENTS}, of which the Faust agent {FAUST_EVENTS}",
        },
        keep=keep,
    )


if __name__ == "__main__":
    main()
