"""What a canary's arms came to: their answers in the feature log, and what users did afterwards."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from compose.canary_rules import ArmFigures
from features.errors import FeatureLogError
from features.feature_log import decode_served
from scoring.arms import CANARY, CONTROL, LIVE, SHADOW, arm_of
from scoring.signature import Degraded
from streams.chain import known_chain
from streams.event_log import EventLog
from streams.feature_log import read_feature_log

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from features.config import StateConfig
    from features.feature_log import Served
    from features.redis import Canary
    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# Records of the feature log that one reading looks at, the newest; kept without their streams.
RECORDS_MAX: Final = 500_000
# A record may be appended so long after its answer was given.
_OVERLAP_MS: Final = 60_000
# No model could have spoken, in either arm.
_NOT_ITS_FAULT: Final = Degraded.UNKNOWN_USER | Degraded.STORE_AWAY
_FAILED: Final = Degraded.MODEL_AWAY | Degraded.DEADLINE


@dataclass(frozen=True, kw_only=True)
class Window:
    """What counts as a user's next events: the first few within a time."""

    next_events: int
    window_ms: int


@dataclass(frozen=True)
class Answer:
    """What is kept of one record of the feature log."""

    user_id: int
    arm: str
    served_at_ms: int
    item_ids: frozenset[int]
    is_failed: bool
    took_ms: float


def to_answer(served: Served, canary: Canary) -> Answer | None:
    """Return what a record says about one of the arms; None where it says nothing."""
    is_tried = served.arm in {CANARY, SHADOW}
    if served.arm not in {CANARY, SHADOW, CONTROL} or served.served_at_ms < canary.since_ms:
        return None
    degraded = Degraded(served.degraded)
    if degraded & _NOT_ITS_FAULT:
        return None
    is_other = is_tried and served.model_version != canary.version
    return Answer(
        served.user_id,
        CANARY if is_tried else CONTROL,
        served.served_at_ms,
        frozenset(served.item_ids),
        bool(degraded & _FAILED) or is_other,
        served.took_ms,
    )


@dataclass
class CanaryLog:
    """What is known of one canary's arms so far; each `read` adds what is new.

    Attributes:
        answers: of both arms.
        events: by user of either arm, in the order of the log.
    """

    kafka: KafkaConfig
    topics: Topics
    canary: Canary
    config: StateConfig
    lake: Path | None
    answers: set[Answer] = field(default_factory=set)
    events: dict[int, list[Accepted]] = field(default_factory=lambda: defaultdict(list))
    _read_ms: int = -1
    _log: EventLog | None = None
    _positions: dict[int, int] = field(default_factory=dict)

    def read(self, now_ms: int) -> None:
        """Know what was answered and done by now.

        Raises:
            StreamError: the feature log or the event log cannot be read.
        """
        self._read_answers(now_ms)
        self._read_events()

    def _read_answers(self, now_ms: int) -> None:
        since_ms = max(self.canary.since_ms, self._read_ms - _OVERLAP_MS)
        for value in read_feature_log(
            self.kafka, self.topics.feature_log, since_ms=since_ms, records_max=RECORDS_MAX
        ):
            try:
                answer = to_answer(decode_served(value), self.canary)
            except FeatureLogError:
                continue  # of another build: `moveline skew` counts these
            if answer is not None:
                self.answers.add(answer)
        self._read_ms = now_ms

    def _read_events(self) -> None:
        if self._log is None:
            source = known_chain(self.kafka, self.topics).current
            topic = self.topics.at(source).events
            self._log = EventLog(kafka=self.kafka, topic=topic, lake=self.lake, source=source)
            self._positions = self._log.starts_at(self.canary.since_ms)
        ends = self._log.end_offsets()
        for batch in self._log.batches(self._positions, ends, self.config, keep=self._is_tried):
            for user, events in batch.by_user.items():
                self.events[user] += [one for one in events if not one.is_forget]

    def _is_tried(self, user_id: int) -> bool:
        return arm_of(user_id, self.canary) != LIVE


def figures(
    answers: Iterable[Answer], events_of: Mapping[int, Sequence[Accepted]], window: Window
) -> tuple[ArmFigures, ArmFigures]:
    """Return what the live version's answers came to, and the tried version's.

    A hit: one of the user's next events is of an item of the answer. An answer that no event
    followed within the window says nothing about hits.
    """
    control, tried = ArmFigures(), ArmFigures()
    appended = {user: [one.append_time_ms for one in events] for user, events in events_of.items()}
    for answer in answers:
        arm = tried if answer.arm == CANARY else control
        arm.num_answers += 1
        arm.num_failed += answer.is_failed
        arm.took_ms.append(answer.took_ms)
        times = appended.get(answer.user_id, [])
        first = bisect_right(times, answer.served_at_ms)
        last = bisect_right(times, answer.served_at_ms + window.window_ms)
        following = events_of.get(answer.user_id, ())[first : min(last, first + window.next_events)]
        if following:
            hits, followed = arm.hits.get(answer.user_id, (0, 0))
            is_hit = any(one.item_id in answer.item_ids for one in following)
            arm.hits[answer.user_id] = (hits + is_hit, followed + 1)
    return control, tried
