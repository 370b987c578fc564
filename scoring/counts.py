"""What answering counts, and how it gets onto Triton's metrics page.

Any thread adds; one thread tells: two threads that count on one of Triton's metrics at once end
the server by a segmentation fault.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from scoring.ladder import steps_of
from scoring.signature import PROVENANCE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from scoring.asks import Answered

# How old the metrics page may be, and how long a server that stops is held up.
TELL_S: Final = 0.5


class Metric(NamedTuple):
    """A counter of Triton's page; `label` tells its series apart, empty for a single one."""

    name: str
    description: str
    label: str


ANSWERS: Final = Metric(
    "moveline_recommend_answers_total", "Answers by the model version that spoke.", "version"
)
STEPS: Final = Metric(
    "moveline_recommend_steps_total", "Steps of the ladder that answers took.", "step"
)
ARMS: Final = Metric("moveline_recommend_arms_total", "Answers by the arm of a canary.", "arm")
SECONDS: Final = Metric(
    "moveline_recommend_seconds_total", "Time that answers spent, by stage.", "stage"
)
SHADOW_DROPPED: Final = Metric(
    "moveline_recommend_shadow_dropped_total", "Requests that no shadow answered: too busy.", ""
)
LOGGED: Final = Metric("moveline_feature_log_records_total", "Answers logged.", "")
LOG_DROPPED: Final = Metric(
    "moveline_feature_log_dropped_total", "Answers whose log was dropped.", ""
)
METRICS: Final = (ANSWERS, STEPS, ARMS, SECONDS, SHADOW_DROPPED, LOGGED, LOG_DROPPED)


class Tell(Protocol):
    """Counts on Triton's page."""

    def __call__(self, metric: Metric, label: str, number: float) -> None:
        """Count so many more under a value of the metric's label."""
        ...


class Counts:
    """What is counted and not yet told."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._untold: dict[tuple[Metric, str], float] = defaultdict(float)

    def add(self, metric: Metric, label: str = "", number: float = 1) -> None:
        """Count so many more."""
        with self._lock:
            self._untold[metric, label] += number

    def add_answers(self, answers: Iterable[Answered]) -> None:
        """Count what was answered: by version, step, arm, and the time it took.

        An answer has the time of its batch: divided by the answers, what one took on average.
        """
        for one in answers:
            said = dict(zip(PROVENANCE, one.provenance, strict=True))
            self.add(ANSWERS, str(said["model_version"]))
            self.add(ARMS, one.arm)
            for step in steps_of(said["degraded"]):
                self.add(STEPS, step)
            if one.took is not None:
                self.add(SECONDS, "read", one.took.read_s)
                self.add(SECONDS, "model", one.took.model_s)
                self.add(SECONDS, "all", one.took.total_s)

    def tell(self, tell: Tell) -> None:
        """Hand over everything that is not told yet."""
        with self._lock:
            untold, self._untold = self._untold, defaultdict(float)
        for (metric, label), number in untold.items():
            tell(metric, label, number)


class Teller:
    """The one thread that tells."""

    def __init__(self, counts: Counts, tell: Tell) -> None:
        self._counts, self._tell = counts, tell
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="moveline-tell", daemon=True)

    def start(self) -> None:
        """Begin to tell."""
        self._thread.start()

    def stop(self) -> None:
        """Tell what is left, and end."""
        self._stop.set()
        self._thread.join()
        self._counts.tell(self._tell)

    def _run(self) -> None:
        while not self._stop.wait(TELL_S):
            self._counts.tell(self._tell)
