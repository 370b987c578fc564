"""The per-user state machine: pure, no I/O, no clock.

State is a function of the ordered, de-duplicated list of the user's valid events. However the
list is cut into micro-batches, `step` ends at the same bytes. `features/oracle.py` says the same
thing the slow, obvious way.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.errors import FeatureError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig

# One event of a stream. Sorted by (event_time_ms, ordinal). 48 bytes, little-endian.
RECORD: Final = np.dtype(
    [
        ("item_id", "<i8"),
        ("event_time_ms", "<i8"),
        ("domain", "<u8"),
        ("event_hash", "<u8"),
        ("ordinal", "<u4"),
        ("dwell_ms", "<i4"),
        ("value", "<f4"),
        ("action", "<u1"),
        ("reserved", "V3"),
    ]
)
RECORD_BYTES: Final = RECORD.itemsize
_PACK_RECORD: Final = struct.Struct("<qqQQIifB3x")
_TIME_AT: Final = struct.Struct("<8xq")
_ORDINAL_AT: Final = struct.Struct("<32xI")
_HASH_BYTES: Final = 8
NO_DWELL: Final = -1
NO_VALUE: Final = float("nan")
# Ordinals are 32-bit: a user past four billion events is a bug upstream, and is refused.
ORDINAL_MAX: Final = 2**32 - 1


class Position(NamedTuple):
    """Where in Kafka the last applied event stood. `source` counts the topic's incarnations."""

    source: int
    partition: int
    offset: int


class Accepted(NamedTuple):
    """A valid event as the step takes it: ids hashed, action coded, position attached."""

    position: Position
    append_time_ms: int
    item_id: int
    event_time_ms: int
    domain: int
    event_hash: int
    dwell_ms: int
    value: float
    action: int


class UserSession(NamedTuple):
    """The rolling session: bursts of events with no silence longer than the gap.

    `session_id` is the ordinal of its first-arrived event.
    """

    session_id: int
    start_ms: int
    last_ms: int
    num_events: int
    dwell_ms: int
    action_counts: tuple[int, ...]


class Departed(NamedTuple):
    """An event that left the tail while its id still counts for duplicates."""

    ordinal: int
    event_hash: int


@dataclass(frozen=True, slots=True)
class UserState:
    """Everything kept for one user in one generation, as plain data.

    Attributes:
        position: of the last applied event.
        append_time_ms: broker append time of the last applied event.
        next_ordinal: what the next accepted event gets; equals the number accepted so far.
        num_chunks: chunks that have left the tail.
        num_late: events too old to move the session.
        user_session: the rolling session, None before the first event.
        tail: packed RECORDs in (event_time_ms, ordinal) order.
        departed: window entries no longer in the tail (only late events get there).
        window: event hashes of the last `dedup_window` accepted, 8 bytes each, oldest first;
            derived from tail and departed, kept so that a step need not rebuild it.
    """

    position: Position
    append_time_ms: int
    next_ordinal: int
    num_chunks: int
    num_late: int
    user_session: UserSession | None
    tail: bytes
    departed: tuple[Departed, ...] = ()
    window: bytes = field(default=b"", repr=False)

    @property
    def records(self) -> np.ndarray[tuple[int], np.dtype[np.void]]:
        """The tail as an array of RECORD, oldest first; shares memory with `tail`."""
        return np.frombuffer(self.tail, RECORD)


class Chunk(NamedTuple):
    """The oldest C records, immutable from now on; `number` counts from 0."""

    number: int
    records: bytes


class Change(NamedTuple):
    """What one step did: the new state and what must be written for it."""

    state: UserState
    keep: int  # leading bytes of the old tail that are unchanged
    chunks: tuple[Chunk, ...]
    num_applied: int
    num_duplicates: int
    num_skipped: int  # at or before the state's position: already applied


class PartitionMovedError(FeatureError):
    """A user's events turned up in another partition: per-user order is no longer given."""


EMPTY_POSITION: Final = Position(0, -1, -1)
EMPTY_STATE: Final = UserState(EMPTY_POSITION, 0, 0, 0, 0, None, b"")


def step(state: UserState, events: Sequence[Accepted], config: StateConfig) -> Change:
    """Return the state after `events`, which are in offset order; `state` is not changed.

    Raises:
        PartitionMovedError: an event from another partition than the state's.
    """
    work = _Work(state)
    for event in events:
        work.apply(event, config)
    return work.change()


class _Work:
    """One step's scratch pad; never outlives it."""

    def __init__(self, state: UserState) -> None:
        self.state = state
        self.tail = bytearray(state.tail)
        self.window = state.window
        self.departed = state.departed
        self.position = state.position
        self.append_time_ms = state.append_time_ms
        self.ordinal = state.next_ordinal
        self.num_chunks = state.num_chunks
        self.num_late = state.num_late
        self.user_session = state.user_session
        self.chunks: list[Chunk] = []
        self.keep = len(state.tail)
        self.num_duplicates = 0
        self.num_skipped = 0

    def apply(self, event: Accepted, config: StateConfig) -> None:
        if not _follows(self.position, event.position):
            self.num_skipped += 1
            return
        packed_hash = event.event_hash.to_bytes(_HASH_BYTES, "little")
        if _contains(self.window, packed_hash):
            self.num_duplicates += 1
            return
        assert self.ordinal < ORDINAL_MAX
        self._insert(event)
        self.window = (self.window + packed_hash)[-config.dedup_window * _HASH_BYTES :]
        self.user_session, late = step_session(self.user_session, event, self.ordinal, config)
        self.num_late += late
        self.position = event.position
        self.append_time_ms = event.append_time_ms
        self.ordinal += 1
        oldest_counted = self.ordinal - config.dedup_window
        if self.departed and self.departed[0].ordinal < oldest_counted:
            self.departed = tuple(d for d in self.departed if d.ordinal >= oldest_counted)
        if len(self.tail) == config.tail_max * RECORD_BYTES:
            self._depart(config)

    def _insert(self, event: Accepted) -> None:
        record = _PACK_RECORD.pack(
            event.item_id,
            event.event_time_ms,
            event.domain,
            event.event_hash,
            self.ordinal,
            event.dwell_ms,
            event.value,
            event.action,
        )
        at = _insertion_point(self.tail, event.event_time_ms)
        self.tail[at:at] = record
        self.keep = min(self.keep, at)

    def _depart(self, config: StateConfig) -> None:
        size = config.chunk * RECORD_BYTES
        chunk = bytes(self.tail[:size])
        del self.tail[:size]
        self.keep = 0
        self.chunks.append(Chunk(self.num_chunks, chunk))
        self.num_chunks += 1
        oldest_counted = self.ordinal - config.dedup_window
        gone = np.frombuffer(chunk, RECORD)
        gone = gone[gone["ordinal"] >= max(0, oldest_counted)]
        self.departed = tuple(
            sorted(
                (
                    *self.departed,
                    *(
                        Departed(int(o), int(h))
                        for o, h in zip(gone["ordinal"], gone["event_hash"], strict=True)
                    ),
                )
            )
        )

    def change(self) -> Change:
        applied = self.ordinal - self.state.next_ordinal
        after = self.state
        if applied:
            after = UserState(
                position=self.position,
                append_time_ms=self.append_time_ms,
                next_ordinal=self.ordinal,
                num_chunks=self.num_chunks,
                num_late=self.num_late,
                user_session=self.user_session,
                tail=bytes(self.tail),
                departed=self.departed,
                window=self.window,
            )
        return Change(
            after, self.keep, tuple(self.chunks), applied, self.num_duplicates, self.num_skipped
        )


def _follows(last: Position, new: Position) -> bool:
    if last is EMPTY_POSITION or last.partition < 0:
        return True
    if (new.source, new.partition) != (last.source, last.partition):
        raise PartitionMovedError(
            f"the user's last event was applied from partition {last.partition} "
            f"(source {last.source}), this one comes from partition {new.partition} "
            f"(source {new.source}): the topic's partition count changed. "
            "Restore the count, or replay into a new generation."
        )
    return new.offset > last.offset


def _contains(window: bytes, packed_hash: bytes) -> bool:
    at = window.find(packed_hash)
    while at >= 0 and at % _HASH_BYTES:
        at = window.find(packed_hash, at + 1)
    return at >= 0


def _insertion_point(tail: bytearray, event_time_ms: int) -> int:
    """Return the byte offset after every record not newer than `event_time_ms`.

    The new event has the largest ordinal, so among equal times it comes last.
    """
    high = len(tail) // RECORD_BYTES
    if not high or _TIME_AT.unpack_from(tail, (high - 1) * RECORD_BYTES)[0] <= event_time_ms:
        return len(tail)
    low = 0
    while low < high:
        middle = (low + high) // 2
        if _TIME_AT.unpack_from(tail, middle * RECORD_BYTES)[0] <= event_time_ms:
            low = middle + 1
        else:
            high = middle
    return low * RECORD_BYTES


def step_session(
    current: UserSession | None, event: Accepted, ordinal: int, config: StateConfig
) -> tuple[UserSession | None, bool]:
    """Return the session after `event`, and whether the event was too late to move it.

    A late event within the gap of the session's span extends it; an older one leaves it alone.
    An event exactly one gap away still belongs.
    """
    time_ms = event.event_time_ms
    if current is None or time_ms > current.last_ms + config.session_gap_ms:
        return _open_session(event, ordinal, config), False
    if time_ms < current.start_ms - config.session_gap_ms:
        return current, True
    start_ms = min(current.start_ms, time_ms)
    last_ms = max(current.last_ms, time_ms)
    if last_ms - start_ms > config.session_max_ms:
        if time_ms > current.last_ms:
            return _open_session(event, ordinal, config), False
        return current, True
    counts = list(current.action_counts)
    counts[event.action] += 1
    return (
        UserSession(
            current.session_id,
            start_ms,
            last_ms,
            current.num_events + 1,
            current.dwell_ms + max(0, event.dwell_ms),
            tuple(counts),
        ),
        False,
    )


def _open_session(event: Accepted, ordinal: int, config: StateConfig) -> UserSession:
    counts = [0] * len(config.actions)
    counts[event.action] = 1
    return UserSession(
        ordinal, event.event_time_ms, event.event_time_ms, 1, max(0, event.dwell_ms), tuple(counts)
    )


def rebuild_window(state: UserState, dedup_window: int) -> UserState:
    """Return the state with `window` derived from tail and departed (after reading a row)."""
    oldest_counted = max(0, state.next_ordinal - dedup_window)
    records = state.records
    counted = records[records["ordinal"] >= oldest_counted]
    ordinals = np.concatenate(
        [counted["ordinal"], np.array([d.ordinal for d in state.departed], "<u4")]
    )
    hashes = np.concatenate(
        [counted["event_hash"], np.array([d.event_hash for d in state.departed], "<u8")]
    )
    return replace(state, window=hashes[np.argsort(ordinals)].tobytes())
