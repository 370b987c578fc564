"""What the trainer tells Prometheus. Names are a contract, like those of the worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from features.clock import now_ms

if TYPE_CHECKING:
    from compose.trainer_service.records import RunRecord

_SECONDS: Final = (10, 30, 60, 120, 300, 600, 1_200, 1_800, 3_600, 7_200, 14_400)


@dataclass
class TrainerMetrics:
    """One trainer's counters, in a registry of their own so that tests can hold several.

    Attributes:
        served_ms: when the package of the served version was made; 0: nothing is served.
    """

    registry: CollectorRegistry = field(default_factory=CollectorRegistry)
    served_ms: int = 0

    def __post_init__(self) -> None:
        """Register every metric."""

        def gauge(name: str, about: str, *labels: str) -> Gauge:
            return Gauge(f"moveline_trainer_{name}", about, labels, registry=self.registry)

        self.runs = Counter(
            "moveline_trainer_runs", "runs that ended", ["state"], registry=self.registry
        )
        self.seconds = Histogram(
            "moveline_trainer_run_seconds",
            "time a run took from its beginning to its end",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.phase = gauge("phase_seconds", "time a phase of the newest run took", "phase")
        self.ended = gauge("last_run_timestamp_seconds", "when the newest run ended")
        self.looked = gauge("looked_timestamp_seconds", "when the trainer last looked around")
        self.running = gauge("running", "1 while a run goes on")
        self.failures = gauge("failures_in_a_row", "runs that failed since one did not")
        self.new_offsets = gauge("new_offsets", "offsets of the lake that no finished run has seen")
        age = gauge("model_age_seconds", "age of the served version's package; -1: none is served")
        age.set_function(self._age_s)

    def _age_s(self) -> float:
        return (now_ms() - self.served_ms) / 1000 if self.served_ms else -1.0

    def add(self, record: RunRecord) -> None:
        """Count a run that ended."""
        ended_ms = record.ended_ms or record.started_ms
        self.runs.labels(record.state).inc()
        self.ended.set(ended_ms / 1000)
        if record.kind is None:
            return
        self.seconds.observe((ended_ms - record.started_ms) / 1000)
        for name, seconds in record.seconds.items():
            self.phase.labels(name).set(seconds)
