"""How soon after the broker's acknowledgement can an event be read in Redis?

Workload: 5,000 events/s of 100,000 users (Zipf 1.1, seed 2) for 20 s, one worker; every
acknowledged event is looked for in Redis until its bucket's row shows its position. The trade-off:
the same for several batch waits, with the worker's cost per event. Redis is polled in a loop on
the same cores, so what is measured is an upper bound.
"""

from __future__ import annotations

import os
import time
from itertools import islice
from typing import TYPE_CHECKING

from benchmarks.common import (
    CONSOLE,
    TOPICS,
    WorkerProcess,
    kafka_and_redis,
    kafka_home,
    zipf_users,
)
from compose.figures import report
from compose.probe import measure_freshness
from features.clock import now_ms
from features.config import StateConfig
from features.events import Event
from features.redis import StateStore, connect
from streams.producer import EventProducer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compose.probe import Quantiles

RATE = 5_000.0
SECONDS = int(os.environ.get("SECONDS_MEASURED", "20"))
WAITS_S = (0.002, 0.01, 0.05, 0.2)
WAIT_DEFAULT_S = 0.01
WARM_UP = 5_000


def events() -> Iterator[Event]:
    """Yield clicks that happen now."""
    users = zipf_users(WARM_UP + int(RATE * SECONDS), 100_000, exponent=1.1, seed=2)
    for number, user in enumerate(users):
        yield Event(
            event_id=f"fresh-{number}",
            user_id=user,
            item_id=number % 50_000,
            action="click",
            event_time_ms=now_ms(),
        )


def measure(wait_s: float) -> tuple[Quantiles, float]:
    """Return freshness and the worker's CPU seconds per 1,000 events at one batch wait."""
    with kafka_and_redis() as (stack, kafka):
        worker = WorkerProcess(stack, arguments=["--batch-wait", str(wait_s)])
        store = StateStore(connect(stack.addresses.redis), 1, StateConfig())
        with EventProducer(kafka, TOPICS.events) as producer:
            stream = events()
            measure_freshness(producer, store, islice(stream, WARM_UP), rate=RATE)
            before = worker.cpu_s()
            started = time.perf_counter()
            seen = measure_freshness(producer, store, stream, rate=RATE)
            CONSOLE.print(f"{seen.num / (time.perf_counter() - started):,.0f} events/s sent")
        return seen, (worker.cpu_s() - before) / seen.num * 1_000


def main() -> None:
    """Measure every batch wait and report the default's figures."""
    curve = {}
    for wait_s in WAITS_S:
        seen, cpu = measure(wait_s)
        curve[str(wait_s)] = {
            "p50_ms": seen.p50_ms,
            "p99_ms": seen.p99_ms,
            "cpu_s_per_1000": round(cpu, 4),
        }
        CONSOLE.print(f"batch wait {wait_s} s: {curve[str(wait_s)]}")
    chosen = curve[str(WAIT_DEFAULT_S)]
    report(
        "bench-freshness",
        {"rate": RATE, "p50_ms": chosen["p50_ms"], "p99_ms": chosen["p99_ms"], "by_wait_s": curve},
        command="make bench-freshness",
        caveats={"broker": "Apache Kafka" if kafka_home() else "embedded"},
    )


if __name__ == "__main__":
    main()
