"""Does a worker's memory stay flat, however many events go through it?

Workload: 5,000,000 JSON events (EVENTS) of 300,000 users, Zipf 1.05, in 4 partitions, published in
slices of 250,000. A slice that the worker has applied is deleted from Kafka, so that the broker's
disk stays small. One worker process with its default cache; its resident memory is sampled every
second and drawn as bench-memory.png. The first 500,000 events, a tenth of a smaller run, fill the
cache; the slope is the least squares line of the samples after them.
Not measured: speed (the publisher shares the cores), memory of Redis and Kafka, a lake sink.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import numpy as np
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from matplotlib.figure import Figure

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
from compose.figures import RESULTS, report
from compose.settings import WorkerSettings
from streams.kafka import end_offsets

if TYPE_CHECKING:
    from pathlib import Path

    from streams.kafka import KafkaConfig

NUM_EVENTS: Final = int(os.environ.get("EVENTS", "5000000"))
NUM_USERS: Final = 300_000
SLICE: Final = 250_000
FILLING: Final = min(500_000, NUM_EVENTS // 10)
SAMPLE_S: Final = 1.0
CACHE_BYTES: Final = WorkerSettings().cache_bytes


@dataclass
class Samples:
    """Resident memory of a worker over the events it has applied, sampled in a thread."""

    worker: WorkerProcess
    events: list[float] = field(default_factory=list)
    resident_mb: list[float] = field(default_factory=list)
    ending: threading.Event = field(default_factory=threading.Event)

    def sample(self) -> None:
        """Take samples until told to end, and one at the end."""
        while not self.ending.wait(SAMPLE_S):
            self.take()
        self.take()

    def take(self) -> None:
        """Take one sample."""
        applied = self.worker.metric("moveline_events_total")
        if applied:
            self.events.append(applied)
            self.resident_mb.append(self.worker.resident_mb())

    def figures(self) -> dict[str, float]:
        """Return what they amount to."""
        events, resident = np.array(self.events), np.array(self.resident_mb)
        later = events >= FILLING
        slope, _ = np.polyfit(events[later] / 1e6, resident[later], 1)
        return {
            "events": round(events[-1]),
            "rss_start_mb": round(resident[later][0], 1),
            "rss_end_mb": round(resident[-1], 1),
            "rss_max_mb": round(resident.max(), 1),
            "slope_mb_per_million": round(slope, 2),
            "cache_bytes_limit": CACHE_BYTES,
            "samples": len(events),
        }

    def draw(self, path: Path) -> None:
        """Leave them as a picture."""
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.plot(np.array(self.events) / 1e6, self.resident_mb)
        axes.axvline(FILLING / 1e6, linestyle=":", color="gray")
        axes.set_xlabel(
            "events applied (millions); what is left of the dotted line fills the cache"
        )
        axes.set_ylabel("resident memory of the worker (MB)")
        axes.set_ylim(bottom=0)
        figure.savefig(path, dpi=120)


def forget(kafka: KafkaConfig) -> None:
    """Delete what is in the topic now."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    ends = end_offsets(kafka, TOPICS.events)
    places = [TopicPartition(TOPICS.events, *end) for end in ends.items()]
    for done in admin.delete_records(places).values():
        done.result()


def run() -> Samples:
    """Take the worker through every slice."""
    users = zipf_users(NUM_EVENTS, NUM_USERS, exponent=1.05, seed=5)
    with kafka_and_redis() as (stack, kafka):
        worker = WorkerProcess(stack)
        samples = Samples(worker)
        thread = threading.Thread(target=samples.sample)
        thread.start()
        try:
            for first in range(0, NUM_EVENTS, SLICE):
                part = users[first : first + SLICE]
                publish(kafka, part, first=first)
                worker.wait_until(first + len(part))
                forget(kafka)
                resident = worker.resident_mb()
                CONSOLE.print(f"{first + len(part):,} events: {resident:.0f} MB resident")
        finally:
            samples.ending.set()
            thread.join()
        return samples


def main() -> None:
    """Measure and report."""
    keep = is_recording(__doc__)
    samples = run()
    if keep:
        samples.draw(RESULTS / "bench-memory.png")
    report(
        "bench-memory",
        samples.figures(),
        command="make bench-memory RECORD=1",
        caveats={
            "broker": "Apache Kafka" if kafka_home() else "embedded",
            "users": f"{NUM_USERS:,}, Zipf 1.05",
        },
        keep=keep,
    )


if __name__ == "__main__":
    main()
