"""How soon after the broker's acknowledgement can an event be read in Redis?

Workload: 5,000 events/s of 100,000 users (Zipf 1.1, seed 2), open loop, one worker, 4 partitions;
60 s at the default batch wait, 20 s at the others, after 5,000 events that are not counted. Every
tenth event is looked for in Redis, every half millisecond, until its user's row shows its position.
What is waited for is reckoned from the acknowledgement as the producer sees it, and, as an upper
bound, from the broker's append time.
The trade-off: freshness and the worker's events per CPU second for several batch waits, also drawn
as bench-freshness.png. Under a backlog micro-batches fill at once and the wait has no effect; it
costs throughput at rates in between, by smaller micro-batches.
SECONDS_MEASURED=n measures for less. Producer, broker, Redis and worker share the machine.
"""

from __future__ import annotations

import os
import sys
import tempfile
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from matplotlib.figure import Figure

from benchmarks.common import (
    CONSOLE,
    TOPICS,
    WorkerProcess,
    is_recording,
    kafka_and_redis,
    kafka_home,
    zipf_users,
)
from compose.figures import RESULTS, report
from compose.probe import measure_freshness
from features.clock import now_ms
from features.config import StateConfig
from features.events import Event
from features.redis import StateStore, connect
from streams.producer import EventProducer
from streams.worker import WorkerConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

RATE: Final = 5_000.0
SECONDS: Final = int(os.environ.get("SECONDS_MEASURED", "60"))
WAIT_DEFAULT_S: Final = WorkerConfig().batch_wait_s
WAITS_S: Final = (0.002, 0.005, WAIT_DEFAULT_S, 0.02, 0.05, 0.2)
# The curve's other points are for their shape.
SHARE_OF_OTHERS: Final = 3
WARM_UP: Final = 5_000
WATCH_EVERY: Final = 10
TICKS_MS: Final = (5, 10, 20, 50, 100, 200, 500)
# Below this share of the rate asked for, the sender was the bottleneck: nothing was measured.
SENT_SHARE_MIN: Final = 0.98


def events(count: int) -> Iterator[Event]:
    """Yield clicks that happen now."""
    users = zipf_users(count, 100_000, exponent=1.1, seed=2)
    for number, user in enumerate(users):
        yield Event(
            event_id=f"fresh-{number}",
            user_id=user,
            item_id=number % 50_000,
            action="click",
            event_time_ms=now_ms(),
        )


def measure(wait_s: float, seconds: int) -> dict[str, Any]:
    """Return freshness, and what the worker needed for it, at one batch wait."""
    with kafka_and_redis() as (stack, kafka):
        worker = WorkerProcess(stack, arguments=["--batch-wait", str(wait_s)])
        store = StateStore(connect(stack.addresses.redis), 1, StateConfig())
        with EventProducer(kafka, TOPICS.events) as producer:
            stream = events(WARM_UP + int(RATE * seconds))
            measure_freshness(producer, store, islice(stream, WARM_UP), rate=RATE)
            before = worker.cpu_s(), worker.metric("moveline_micro_batch_events_count")
            seen = measure_freshness(producer, store, stream, rate=RATE, watch_every=WATCH_EVERY)
            cpu_s = worker.cpu_s() - before[0]
            num_batches = worker.metric("moveline_micro_batch_events_count") - before[1]
    if seen.rate < RATE * SENT_SHARE_MIN:
        CONSOLE.print(f"[bold red]sent {seen.rate:,.0f} events/s, not {RATE:,.0f}[/bold red]")
    num_events = RATE * seconds
    return {
        "rate": round(seen.rate),
        "p50_ms": seen.from_acknowledgement.p50_ms,
        "p99_ms": seen.from_acknowledgement.p99_ms,
        "p999_ms": seen.from_acknowledgement.p999_ms,
        "append_p50_ms": seen.from_append.p50_ms,
        "append_p99_ms": seen.from_append.p99_ms,
        "num_watched": seen.from_acknowledgement.num,
        "seconds": seconds,
        "events_per_cpu_s": round(num_events / cpu_s),
        "events_per_batch": round(num_events / num_batches, 1),
    }


def draw(curve: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Leave the trade-off as a picture."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    waits_ms = [float(wait_s) * 1_000 for wait_s in curve]
    for name, style in (("p50_ms", "-o"), ("p99_ms", "--o")):
        values = [one[name] for one in curve.values()]
        left.plot(waits_ms, values, style, color="tab:blue", label=name.removesuffix("_ms"))
    rates = [one["events_per_cpu_s"] for one in curve.values()]
    right.plot(waits_ms, rates, "-s", color="tab:orange", label="events per CPU second")
    left.set_xscale("log")
    left.set_yscale("log")
    left.set_xticks(waits_ms, [f"{wait_ms:g}" for wait_ms in waits_ms])
    left.set_yticks(TICKS_MS, [str(tick_ms) for tick_ms in TICKS_MS])
    left.minorticks_off()
    left.set_xlabel("batch wait (ms)")
    left.set_ylabel("acknowledged to readable (ms)")
    right.set_ylabel("events per CPU second of the worker")
    right.set_ylim(bottom=0)
    left.set_title(f"{RATE:,.0f} events/s, one worker")
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every batch wait and report the default's figures."""
    keep = is_recording(__doc__)
    curve: dict[str, dict[str, Any]] = {}
    for wait_s in WAITS_S:
        seconds = SECONDS if wait_s == WAIT_DEFAULT_S else max(1, SECONDS // SHARE_OF_OTHERS)
        curve[str(wait_s)] = measure(wait_s, seconds)
        CONSOLE.print(f"batch wait {wait_s} s: {curve[str(wait_s)]}")
    picture = (RESULTS if keep else Path(tempfile.gettempdir())) / "bench-freshness.png"
    draw(curve, picture)
    CONSOLE.print(f"drawn: {picture}")
    report(
        "bench-freshness",
        {**curve[str(WAIT_DEFAULT_S)], "by_wait_s": curve},
        command="make bench-freshness",
        caveats={
            "broker": "Apache Kafka" if kafka_home() else "embedded",
            "machine": "producer, broker, Redis and worker share the cores",
            "batch_wait": f"{WAIT_DEFAULT_S} s, the default",
        },
        keep=keep,
    )
    if any(one["rate"] < RATE * SENT_SHARE_MIN for one in curve.values()):
        sys.exit("the sender could not keep the rate: see above")


if __name__ == "__main__":
    main()
