"""Training-serving skew: what was read online beside what the lake gives, feature by feature. Pure.

A value can differ in three ways. **Mismatch**: both sides have it and it is not the same.
**Missing**: the lake has it, the read had not. **Extra**: the read had it, the lake has not. Events
of a stream are told apart by their ordinals, so one event lost at the front does not count as a
stream that is wrong everywhere. Streams also get an edit distance over their items.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from features.as_of import Timeline
from features.view import SessionView

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.config import StateConfig
    from features.feature_log import Served
    from features.state import Accepted, Position
    from features.view import Records, UserView

STREAMS: Final = ("recent", "mid")
# The columns of a stream that are compared. The ordinal is what events are matched by.
COLUMNS: Final = (
    "item_id",
    "event_time_ms",
    "action",
    "domain",
    "dwell_ms",
    "value",
    "event_hash",
)
POSITION: Final = "position"
FEATURES: Final = (
    POSITION,
    *(f"session_{name.removeprefix('session_')}" for name in SessionView._fields),
    *(f"{stream}_{column}" for stream in STREAMS for column in COLUMNS),
)
# An event appended less than this before a read may rightly be missing from it: the worker needs
# its milliseconds, and the clocks of broker and server are two.
GRACE_MS: Final = 60_000


class Difference(NamedTuple):
    """How one feature of one read differs; counts of values.

    Attributes:
        num_values: values the two sides have together.
        served: what was read where it differs, for people.
        expected: what the lake gives there.
    """

    feature: str
    num_values: int
    num_mismatched: int = 0
    num_missing: int = 0
    num_extra: int = 0
    served: tuple[object, ...] = ()
    expected: tuple[object, ...] = ()

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        return not (self.num_mismatched or self.num_missing or self.num_extra)


class ReadSkew(NamedTuple):
    """One read compared with the lake.

    Attributes:
        differences: of every feature, equal ones too.
        edit_distances: by stream, over the items.
        is_reordered: a stream has the right events in another order.
        num_unseen: events the state lacked although appended well before.
    """

    differences: tuple[Difference, ...]
    edit_distances: Mapping[str, int]
    is_reordered: bool
    num_unseen: int

    @property
    def is_equal(self) -> bool:
        """Whether every value was read as the lake has it."""
        return not self.is_reordered and all(one.is_equal for one in self.differences)

    @property
    def num_values(self) -> int:
        """Values compared."""
        return sum(one.num_values for one in self.differences)


@dataclass
class UserHistory:
    """What the lake knows of one user, to compare reads with."""

    events: Sequence[Accepted]
    config: StateConfig
    timeline: Timeline = field(init=False)

    def __post_init__(self) -> None:
        """Prepare to walk through the events."""
        self.timeline = Timeline(self.events, self.config)
        self._append_ms = np.fromiter((one.append_time_ms for one in self.events), np.int64)

    def is_forgotten(self, served: Served) -> bool:
        """Return whether the read is of events that the user was forgotten with since."""
        if not (self.events and self.events[0].is_forget):
            return False
        forget = self.events[0]
        if served.position is None:
            return served.served_at_ms < forget.append_time_ms
        return served.position.offset < forget.position.offset

    def compare(self, served: Served) -> ReadSkew:
        """Return how a logged read differs.

        A read that found no state is held to what should have been there by then: that is how a
        row that Redis lost shows.
        """
        seen = int(np.searchsorted(self._append_ms, served.served_at_ms - GRACE_MS, "right"))
        known = self.timeline.first + max(0, seen - self.timeline.num_forgets)
        view = served.view()
        if view is None:
            expected = self.timeline.at(known, served.clock_ms, served.chunks_folded)
            return compare_views(None, expected, (None, self._position(known)))
        ordinal = min(served.ordinal, self.timeline.end)
        expected = self.timeline.at(ordinal, served.clock_ms, served.chunks_folded)
        if not served.has_mid:
            expected = expected._replace(mid=expected.mid[:0])
        skew = compare_views(view, expected, (served.position, self._position(served.ordinal)))
        return skew._replace(num_unseen=max(0, known - served.ordinal))

    def _position(self, ordinal: int) -> Position | None:
        """Return where the last of the first `ordinal` events stood; None if it cannot be."""
        return self.timeline.position(ordinal)


def compare_views(
    served: UserView | None,
    expected: UserView,
    positions: tuple[Position | None, Position | None] = (None, None),
) -> ReadSkew:
    """Return how what was read (None: nothing) differs from what the lake gives.

    Args:
        served: as read online.
        expected: from the lake, at the same ordinal and clock.
        positions: where the newest event known stands, (as read, in the lake).
    """
    differences = [_scalar(POSITION, *positions)]
    session = None if served is None else served.user_session
    differences += _sessions(session, expected.user_session)
    edit_distances: dict[str, int] = {}
    is_reordered = False
    for name in STREAMS:
        theirs: Records = getattr(expected, name)
        ours: Records = theirs[:0] if served is None else getattr(served, name)
        differences += _stream(name, ours, theirs)
        is_equal = ours.tobytes() == theirs.tobytes()
        edit_distances[name] = 0 if is_equal else edit_distance(ours["item_id"], theirs["item_id"])
        same = np.array_equal(np.sort(ours["ordinal"]), np.sort(theirs["ordinal"]))
        is_reordered |= same and not np.array_equal(ours["ordinal"], theirs["ordinal"])
    return ReadSkew(tuple(differences), edit_distances, is_reordered, 0)


def _scalar(name: str, served: object, expected: object) -> Difference:
    if served == expected:
        return Difference(name, int(expected is not None))
    return Difference(
        name,
        1,
        num_mismatched=int(served is not None and expected is not None),
        num_missing=int(served is None),
        num_extra=int(expected is None),
        served=() if served is None else (served,),
        expected=() if expected is None else (expected,),
    )


def _sessions(served: SessionView | None, expected: SessionView) -> list[Difference]:
    """Return a session's features; where one side alone has a session, the other's are absent."""
    if served is None and not expected.is_open:
        served = expected  # no state and no open session answer alike
    alike = served is not None and served.is_open == expected.is_open
    found = []
    for name in SessionView._fields:
        ours = None if served is None else getattr(served, name)
        theirs = getattr(expected, name)
        if not alike and name != "is_open":
            ours = ours if served is not None and served.is_open else None
            theirs = theirs if expected.is_open else None
        found.append(_scalar(f"session_{name.removeprefix('session_')}", ours, theirs))
    return found


def _stream(name: str, ours: Records, theirs: Records) -> list[Difference]:
    _, mine, yours = np.intersect1d(ours["ordinal"], theirs["ordinal"], return_indices=True)
    num_extra, num_missing = ours.size - mine.size, theirs.size - yours.size
    extra = np.setdiff1d(np.arange(ours.size), mine)
    missing = np.setdiff1d(np.arange(theirs.size), yours)
    found = []
    for column in COLUMNS:
        wrong = _bits(ours[column][mine]) != _bits(theirs[column][yours])
        found.append(
            Difference(
                f"{name}_{column}",
                mine.size + num_extra + num_missing,
                num_mismatched=int(wrong.sum()),
                num_missing=num_missing,
                num_extra=num_extra,
                served=_named(ours, column, np.r_[mine[wrong], extra]),
                expected=_named(theirs, column, np.r_[yours[wrong], missing]),
            )
        )
    return found


def _named(records: Records, column: str, rows: np.ndarray[Any, Any]) -> tuple[object, ...]:
    """Return "ordinal: value" of some records."""
    chosen = records[rows.astype(np.int64)]
    pairs = zip(chosen["ordinal"].tolist(), chosen[column].tolist(), strict=True)
    return tuple(f"{ordinal}: {value}" for ordinal, value in pairs)


def _bits(column: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return what equality is decided by: NaN, which stands for no value, equals itself."""
    return column.view(np.uint32) if column.dtype.kind == "f" else column


def edit_distance(left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> int:
    """Return how many insertions, deletions and replacements turn one sequence into the other.

    >>> edit_distance(np.array([1, 2, 3]), np.array([2, 3, 4]))
    2
    """
    left, right = _trimmed(left, right)
    left, right = (end[::-1] for end in _trimmed(left[::-1], right[::-1]))
    place = np.arange(right.size + 1)
    row = place.copy()
    for number, item in enumerate(left, start=1):
        kept = row[:-1] + (right != item)
        row = np.r_[number, np.minimum(kept, row[1:] + 1)]
        # An insertion costs one more than the place before it, over any stretch.
        row = np.minimum.accumulate(row - place) + place
    return int(row[-1])


def _trimmed(
    left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]
) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return both without the beginning they share."""
    size = min(left.size, right.size)
    differing = np.flatnonzero(left[:size] != right[:size])
    start = int(differing[0]) if differing.size else size
    return left[start:], right[start:]
