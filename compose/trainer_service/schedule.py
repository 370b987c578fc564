"""When to train, and whether to begin with the served weights: decided, not done.

`decide` is a pure function of the schedule, of the runs on record and of what was seen a moment
ago. A trainer that starts again finds the same records and decides alike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from compose.settings import TrainingSettings
    from compose.trainer_service.records import Kind, RunRecord

# After a failure the trainer waits, twice as long after each further one, up to the cap.
BACKOFF_FIRST_MS: Final = 30_000
BACKOFF_MS_MAX: Final = 3_600_000
# What kept the trainer from training (a lake that lags, say) is looked at again after so long.
LOOK_AGAIN_MS: Final = 60_000


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """When the trainer wakes.

    Attributes:
        every_ms: since the start of the run before.
        every_events: new offsets in the lake that wake it earlier; 0: none do.
        full_every_ms: since the last training from scratch.
        events_min: fewer new offsets are not worth a run.
        lag_max: records that the lake may be behind the topic.
    """

    every_ms: int
    every_events: int
    full_every_ms: int
    events_min: int
    lag_max: int

    @classmethod
    def of(cls, settings: TrainingSettings) -> Self:
        """Read the settings."""
        return cls(
            every_ms=round(settings.every_s * 1000),
            every_events=settings.every_events,
            full_every_ms=round(settings.full_every_s * 1000),
            events_min=settings.events_min,
            lag_max=settings.lag_max,
        )


@dataclass(frozen=True, kw_only=True)
class Past:
    """What the runs on record say.

    Attributes:
        begun_ms: when the newest run began that trained, or was to; None: none did.
        skipped_ms: when a reason not to train was last found, if that is the newest record.
        failures: how many of the newest records in a row are failures.
        failed_ms: when the newest of them ended.
        full_ms: when the newest training from scratch began that was published.
        trained_to: the last offset that a finished run has seen, by partition.
    """

    begun_ms: int | None = None
    skipped_ms: int | None = None
    failures: int = 0
    failed_ms: int = 0
    full_ms: int | None = None
    trained_to: Mapping[str, int]

    @classmethod
    def of(cls, records: Sequence[RunRecord]) -> Self:
        """Read records, oldest first."""
        begun = [one.started_ms for one in records if one.has_trained]
        full = [one for one in records if one.state == "published" and one.kind == "full"]
        finished = [one for one in records if one.has_trained]
        newest = records[-1] if records else None
        failures = _failures_in_a_row(records)
        return cls(
            begun_ms=max(begun, default=None),
            skipped_ms=newest.ended_ms if newest and newest.state == "skipped" else None,
            failures=failures,
            failed_ms=(newest.ended_ms or newest.started_ms) if newest and failures else 0,
            full_ms=full[-1].started_ms if full else None,
            trained_to=dict(finished[-1].window_to) if finished else {},
        )


def _failures_in_a_row(records: Sequence[RunRecord]) -> int:
    failures = 0
    for record in reversed(records):
        if record.state != "failed":
            break
        failures += record.times
    return failures


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What there is to learn from, and from what a run may begin.

    Attributes:
        lake: first and next offset of the lake by partition; no partition: no lake.
        lag: records of the topic that the lake lacks.
        served_version: what answers; None: nothing does.
        served_ms: when its package was made.
        missing: what of it a warm start lacks, as a part of a sentence; empty: nothing.
    """

    now_ms: int
    lake: Mapping[str, tuple[int, int]]
    lag: int
    served_version: int | None = None
    served_ms: int = 0
    missing: str = ""


@dataclass(frozen=True)
class Wait:
    """There is nothing to do until then, unless events come."""

    until_ms: int


@dataclass(frozen=True)
class Skip:
    """It is time to train, and there is a reason not to."""

    why: str
    says: str


@dataclass(frozen=True)
class Run:
    """Train now."""

    why: str
    kind: Kind
    because: str


Action = Wait | Skip | Run


def decide(schedule: Schedule, past: Past, seen: Seen, *, asked: bool = False) -> Action:
    """Return what to do now.

    Args:
        schedule: see there.
        past: see there.
        seen: see there.
        asked: somebody wants a run now: no time has to come, the reasons not to train count.
    """
    num_new = num_new_offsets(past, seen)
    why = "asked" if asked else _woken_by(schedule, past, seen, num_new)
    if why is None:
        return Wait(_next_ms(schedule, past, seen))
    if not seen.lake:
        return Skip(why, "the lake holds no event: is `moveline lake` running?")
    if seen.lag > schedule.lag_max:
        return Skip(
            why,
            f"the lake is more than {schedule.lag_max:,} records behind the topic "
            "(training.lag_max): is `moveline lake` running?",
        )
    if num_new < schedule.events_min:
        return Skip(
            why,
            f"fewer than {schedule.events_min:,} offsets are new in the lake since the run before "
            "(training.events_min)",
        )
    return Run(why, *_kind(schedule, past, seen))


def num_new_offsets(past: Past, seen: Seen) -> int:
    """Return how many offsets of the lake no finished run has seen."""
    return sum(
        max(0, end - max(first, past.trained_to.get(field, -1) + 1))
        for field, (first, end) in seen.lake.items()
    )


def backoff_ms(failures: int) -> int:
    """Return how long to wait after so many failures in a row.

    >>> [backoff_ms(failures) // 1000 for failures in (1, 2, 3, 8, 1000)]
    [30, 60, 120, 3600, 3600]
    """
    doublings = min(failures - 1, BACKOFF_MS_MAX.bit_length())
    return min(BACKOFF_MS_MAX, BACKOFF_FIRST_MS << doublings)


def _woken_by(schedule: Schedule, past: Past, seen: Seen, num_new: int) -> str | None:
    """Return what makes this moment one to train at; None: nothing does."""
    if past.failures:
        return "time" if seen.now_ms >= past.failed_ms + backoff_ms(past.failures) else None
    if past.skipped_ms is not None:
        again_ms = past.skipped_ms + min(LOOK_AGAIN_MS, schedule.every_ms)
        return "time" if seen.now_ms >= again_ms else None
    if past.begun_ms is None or seen.now_ms >= past.begun_ms + schedule.every_ms:
        return "time"
    return "events" if 0 < schedule.every_events <= num_new else None


def _next_ms(schedule: Schedule, past: Past, seen: Seen) -> int:
    if past.failures:
        return past.failed_ms + backoff_ms(past.failures)
    if past.skipped_ms is not None:
        return past.skipped_ms + min(LOOK_AGAIN_MS, schedule.every_ms)
    return (seen.now_ms if past.begun_ms is None else past.begun_ms) + schedule.every_ms


def _kind(schedule: Schedule, past: Past, seen: Seen) -> tuple[Kind, str]:
    if seen.served_version is None:
        return "full", "no version is served yet"
    if seen.missing:
        return "full", f"version {seen.served_version} cannot be gone on from: {seen.missing}"
    full_ms = seen.served_ms if past.full_ms is None else past.full_ms
    age_ms = seen.now_ms - full_ms
    if age_ms >= schedule.full_every_ms:
        return "full", f"the last training from scratch is {age_ms / 1000:,.0f} s old"
    return "warm", f"version {seen.served_version} is served and can be gone on from"
