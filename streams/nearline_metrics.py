"""What the near-line app tells Prometheus. Names are a contract, like those of the worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

METRICS_PORT_DEFAULT: Final = 9465
_SECONDS: Final = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10)


@dataclass
class NearlineMetrics:
    """One app's counters, in a registry of their own so that tests can hold several."""

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)

    def __post_init__(self) -> None:
        """Register every metric."""

        def counter(name: str, about: str, *labels: str) -> Counter:
            return Counter(f"moveline_nearline_{name}", about, labels, registry=self.registry)

        self.hints = counter("hints", "hints received through Faust", "work")
        self.overtaken = counter("hints_overtaken", "hints whose work had just been done", "work")
        self.alone = counter("hints_alone", "hints followed without the group's word", "work")
        self.failures = counter("failures", "hints whose work failed, to be made up for", "work")
        self.events = counter("events", "events counted in tiles")
        self.tiles = counter("tile_writes", "tile writes that Redis took")
        self.refused = counter("tile_writes_refused", "tile writes refused: the mark had moved")
        self.skipped_records = counter(
            "records_gone", "records that had left Kafka before they were counted"
        )
        self.rounds = counter("sweep_rounds", "times every user was looked at")
        self.swept = counter("sweep_users", "users looked at")
        self.closed = counter("sessions_closed", "sessions found closed")
        self.published = counter("sessions_published", "session records acknowledged by the broker")
        self.unknown = counter(
            "session_histories_gone", "users whose closed sessions could not be worked out"
        )
        self.rankings = counter("trending_writes", "times the trending items were replaced")
        self.pushed = counter("statistics_rows", "item_statistics rows pushed through Feast")
        self.healed = counter("pointers_healed", "times Redis' pointers were put right")
        self.chunks_folded = counter("chunks_folded", "chunks handed to the compressor")
        self.folds_refused = counter(
            "folds_refused", "memories not written: another app was faster, or Redis went back"
        )
        self.chunks_left = counter(
            "chunks_left", "chunks that left Redis because every live memory has folded them"
        )
        self.memories_damaged = counter("memories_damaged", "memories removed: no such bytes")
        self.chunks_behind = Gauge(
            "moveline_nearline_chunks_behind",
            "chunks not yet in every live memory, by the last round",
            registry=self.registry,
        )
        self.memories_incomplete = Gauge(
            "moveline_nearline_memories_incomplete",
            "users whose chunks left Redis before a live memory had them, by the last round",
            registry=self.registry,
        )
        self.lag = Gauge(
            "moveline_nearline_lag_events",
            "records not yet counted in tiles",
            ["partition"],
            registry=self.registry,
        )
        self.seconds = Histogram(
            "moveline_nearline_work_seconds",
            "time one piece of work took",
            ["work"],
            buckets=_SECONDS,
            registry=self.registry,
        )
