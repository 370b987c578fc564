"""What the worker tells Prometheus. Names are a contract: dashboards and `moveline status`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

if TYPE_CHECKING:
    from streams.processor import Report

METRICS_PORT_DEFAULT: Final = 9464
_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_SIZES: Final = (1, 3, 10, 30, 100, 300, 1_000, 3_000, 10_000, 30_000)


@dataclass
class WorkerMetrics:
    """One worker's counters, in a registry of their own so that tests can hold several."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        """Register every metric."""

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"moveline_{name}", about, labels, registry=self.registry)

        def histogram(name: str, about: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"moveline_{name}", about, buckets=buckets, registry=self.registry)

        self.events = counter("events", "events applied to a state")
        self.outside = counter(
            "events_outside_streams", "valid events whose action is not streamed"
        )
        self.duplicates = counter("duplicates", "events dropped as repeats of a recent event_id")
        self.skipped = counter("redelivered", "records their checkpoint says are in Redis")
        self.late = counter("late", "events too old to move their session")
        self.refused = counter("refused_writes", "times Redis was not where this worker left it")
        self.dead_letters = counter("dead_letters", "records sent to the dead letters", "reason")
        self.items = counter("items", "catalogue records applied")
        self.chunks_dropped = counter(
            "chunks_dropped", "waiting chunks that left Redis because the lake has them"
        )
        self.pauses = counter(
            "store_pauses", "times consumption paused because Redis was away or full"
        )
        self.batch = histogram("micro_batch_events", "records per micro-batch", _SIZES)
        self.step = histogram("step_seconds", "stepping the states of one micro-batch", _SECONDS)
        self.write = histogram("write_seconds", "writing one micro-batch to Redis", _SECONDS)
        self.freshness = histogram(
            "freshness_seconds",
            "broker append to Redis acknowledgement, of each micro-batch's oldest event",
            _SECONDS,
        )
        self.over_cap = Gauge(
            "moveline_users_over_chunk_cap",
            "users with too many waiting chunks, whose oldest the lake does not have yet",
            registry=self.registry,
        )
        self.lag = Gauge(
            "moveline_lag_events",
            "records behind the end of the topic",
            ["partition"],
            registry=self.registry,
        )

    def add(self, report: Report) -> None:
        """Count one micro-batch."""
        self.events.inc(report.num_applied)
        self.duplicates.inc(report.num_duplicates)
        self.skipped.inc(report.num_skipped)
        self.late.inc(report.num_late)
        self.step.observe(report.step_s)
        self.write.observe(report.write_s)
