"""Which of a user's sessions are closed: a function of state, marker and clock. Pure.

A session is closed when a later one has opened, or when its gap has passed by the clock. The
marker says which session was looked at last and whether its record is out; everything between it
and the state's own session is worked out again from the stored events.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from features.state import EMPTY_POSITION, Accepted, OpenSession, UserSession
from streams.errors import HistoryGoneError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.config import StateConfig
    from features.view import Records

# How far back the clock of a sweep can be told: one observation a second makes an hour.
OBSERVATIONS_MAX: Final = 3_600


class Marker(NamedTuple):
    """The newest session a sweep has looked at, and whether its record is out."""

    session_id: int
    is_published: bool


# A user's first session is that of the first event, whose ordinal is 0.
FIRST: Final = Marker(0, is_published=False)


def encode_marker(marker: Marker) -> bytes:
    """Return the bytes kept in Redis.

    >>> encode_marker(Marker(7, is_published=True)), encode_marker(Marker(0, is_published=False))
    (b'7!', b'0')
    """
    return b"%d%b" % (marker.session_id, b"!" if marker.is_published else b"")


def decode_marker(raw: bytes) -> Marker:
    """Return the marker; FIRST for a user that no sweep has seen."""
    if not raw:
        return FIRST
    return Marker(int(raw.rstrip(b"!")), is_published=raw.endswith(b"!"))


class ClosedSession(msgspec.Struct, frozen=True, kw_only=True):
    """One record of the sessions topic; (generation, user_id, session_id) has one value for ever.

    `action_counts` names the actions that happened, in the order of the generation's rules.
    """

    generation: int
    user_id: int
    session_id: int
    start_ms: int
    last_ms: int
    num_events: int
    dwell_ms: int
    action_counts: dict[str, int]


def encode_closed(
    current: UserSession, *, generation: int, user_id: int, config: StateConfig
) -> bytes:
    """Return the record's JSON."""
    counts = zip(config.actions, current.action_counts, strict=True)
    return msgspec.json.encode(
        ClosedSession(
            generation=generation,
            user_id=user_id,
            session_id=current.session_id,
            start_ms=current.start_ms,
            last_ms=current.last_ms,
            num_events=current.num_events,
            dwell_ms=current.dwell_ms,
            action_counts={action: count for action, count in counts if count},
        )
    )


def is_over(current: UserSession, clock_ms: int | None, config: StateConfig) -> bool:
    """Return whether the gap has passed; never without a clock (the state may be behind)."""
    return clock_ms is not None and clock_ms - current.last_ms > config.session_gap_ms


class Closing(NamedTuple):
    """What a sweep does about one user."""

    marker: Marker
    sessions: tuple[UserSession, ...]


def close_current(
    marker: Marker, current: UserSession, clock_ms: int | None, config: StateConfig
) -> Closing | None:
    """Return what is to be done when no session lies between marker and state; None: nothing."""
    if marker.is_published or not is_over(current, clock_ms, config):
        return None
    return Closing(Marker(current.session_id, is_published=True), (current,))


def close_replaced(
    marker: Marker,
    current: UserSession,
    records: Records,
    clock_ms: int | None,
    config: StateConfig,
) -> Closing:
    """Return every session from the marker's on that is closed.

    Args:
        marker: where the last sweep stood.
        current: the state's session, a later one than the marker's.
        records: of the same instant as the state, all from ordinal `marker.session_id` on.
        clock_ms: closes the current one too, where its gap has passed.
        config: the generation's rules.

    Raises:
        HistoryGoneError: records are missing, or do not lead to the state's session.
    """
    found = replay_sessions(records, marker.session_id, config)
    if not found or found[-1] != current:
        raise HistoryGoneError(marker.session_id, current.session_id)
    closed = found[int(marker.is_published) : -1]
    over = is_over(current, clock_ms, config)
    return Closing(
        Marker(current.session_id, is_published=over), (*closed, current) if over else tuple(closed)
    )


def replay_sessions(records: Records, first: int, config: StateConfig) -> list[UserSession]:
    """Return each session as it last stood, from the one that ordinal `first` opened.

    An opening event leaves nothing of the session before it, so no earlier event is needed.
    Empty when an ordinal is missing.
    """
    kept = records[records["ordinal"] >= first]
    kept = kept[np.argsort(kept["ordinal"])]
    if not np.array_equal(kept["ordinal"], np.arange(first, first + kept.size)):
        return []
    rolling = OpenSession(None, config)
    found: list[UserSession] = []
    columns = ("event_time_ms", "dwell_ms", "action", "ordinal")
    for time_ms, dwell_ms, action, ordinal in zip(
        *(kept[name].tolist() for name in columns), strict=True
    ):
        before = rolling.closed()
        rolling.take(_event(time_ms, dwell_ms, action), ordinal)
        if before is not None and rolling.which != before.session_id:
            found.append(before)
    last = rolling.closed()
    return found if last is None else [*found, last]


def _event(time_ms: int, dwell_ms: int, action: int) -> Accepted:
    """Return as much of a stored event as a session looks at."""
    return Accepted(EMPTY_POSITION, 0, 0, time_ms, 0, 0, dwell_ms, 0.0, action)


@dataclass
class AppliedClock:
    """Up to which time everything that the broker had taken is in the states.

    A session may only be closed by a clock that its user's state has caught up with: while a
    worker is behind, the events that continue the session still wait in Kafka.
    """

    times_ms: deque[int] = field(default_factory=lambda: deque(maxlen=OBSERVATIONS_MAX))
    ends: dict[int, deque[int]] = field(default_factory=dict)

    def observe(self, time_ms: int, ends: Mapping[int, int]) -> None:
        """Remember the partitions' ends, asked for after `time_ms` was read from the clock."""
        if ends.keys() != self.ends.keys():
            self.times_ms.clear()
            self.ends = {partition: deque(maxlen=OBSERVATIONS_MAX) for partition in ends}
        self.times_ms.append(time_ms)
        for partition, end in ends.items():
            self.ends[partition].append(end)

    def at(self, partition: int, checkpoints: Sequence[int]) -> list[int | None]:
        """Return for each checkpoint of a partition the time it is complete up to, None: unknown.

        A checkpoint is the next offset: everything before it is applied.
        """
        ends, times = list(self.ends.get(partition, ())), list(self.times_ms)
        found = [bisect_right(ends, checkpoint) for checkpoint in checkpoints]
        return [times[at - 1] if at else None for at in found]
