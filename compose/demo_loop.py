"""One turn of the trainer's loop, in the demo: a version goes live under events and requests."""

from __future__ import annotations

import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Self

from compose.cli.options import kafka_of
from compose.trainer_service.one_run import run_once
from scoring.client import Recommender
from scoring.errors import ScoringError
from scoring.signature import Degraded
from streams.producer import EventProducer

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compose.settings import Settings
    from compose.trainer_service.records import RunRecord
    from features.events import Event

# Beside a training on the same cores: enough to see a failed or a mixed answer.
REQUESTS_PER_S: Final = 4.0
EVENTS_PER_S: Final = 20.0
DEADLINE_S: Final = 10.0
# A graph is timed beside all servers and the traffic here; alone it takes a fraction.
LATENCY_MS: Final = 2_000.0
# Two packages are judged by their graphs while users wait for answers: a sample has to do.
HELD_OUT_SHARE: Final = 0.02
_JOIN_TIMEOUT_S: Final = 30.0


@dataclass
class Traffic:
    """Events and requests of a thread each; what the answers said of the version that spoke.

    Attributes:
        versions: in the order in which they first answered, with the number of their answers.
        failures: what went wrong, in words.
        num_store_away: answers without a model that say that Redis was late; no failures.
    """

    settings: Settings
    users: Sequence[int]
    events: Iterator[Event]
    versions: Counter[int] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    num_sent: int = 0
    num_store_away: int = 0

    def __post_init__(self) -> None:
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"demo-{work.__name__}", daemon=True)
            for work in (self._ask, self._send)
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(_JOIN_TIMEOUT_S)

    def _ask(self) -> None:
        number = 0
        with Recommender(self.settings.triton.address) as recommender:
            while not self._stop.wait(1 / REQUESTS_PER_S):
                user = self.users[number % len(self.users)]
                number += 1
                try:
                    answer = recommender.recommend(user, deadline_s=DEADLINE_S)
                except ScoringError as error:
                    self.failures.append(str(error))
                    continue
                spoke = answer.provenance.model_version
                if Degraded.STORE_AWAY in answer.provenance.degraded:
                    self.num_store_away += 1
                    continue
                if not spoke:
                    self.failures.append(
                        f"no model spoke to {user}: {answer.provenance.degraded!r}"
                    )
                self.versions[spoke] += 1

    def _send(self) -> None:
        kafka, topics = kafka_of(self.settings)
        with EventProducer(kafka, topics.events) as producer:
            for event in self.events:
                if self._stop.wait(1 / EVENTS_PER_S):
                    return
                producer.send(event)
                self.num_sent += 1


@dataclass(frozen=True)
class Turn:
    """What became of one turn of the loop."""

    record: RunRecord
    traffic: Traffic
    seconds: float

    def figures(self) -> dict[str, object]:
        """Return what the demo's last line says of it."""
        versions = list(self.traffic.versions)
        return {
            "loop_verdict": self.record.state,
            "loop_version_before": versions[0] if versions else 0,
            "loop_version_after": versions[-1] if versions else 0,
            "loop_seconds": round(self.seconds, 1),
            "loop_requests": sum(self.traffic.versions.values()) + self.traffic.num_store_away,
            "loop_store_away_requests": self.traffic.num_store_away,
            "loop_failed_requests": len(self.traffic.failures),
        }


def turn_the_loop(
    settings: Settings, *, users: Sequence[int], events: Iterator[Event], budget_s: float
) -> Turn:
    """Train on from what is live, judge, publish, while users ask and do things.

    Raises:
        ComposeError: another trainer is at work.
    """
    training = settings.training.model_copy(
        update={
            "budget_s": budget_s,
            "threads": 2,
            "latency_ms": LATENCY_MS,
            "held_out_share": HELD_OUT_SHARE,
        }
    )
    started = time.monotonic()
    with Traffic(settings, users, events) as traffic:
        record = run_once(settings.model_copy(update={"training": training}), why="asked")
    return Turn(record, traffic, time.monotonic() - started)
