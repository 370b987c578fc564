"""The per-user state machine: pure, no I/O, no clock.

State is a function of the ordered, de-duplicated list of the user's valid events. However the
list is cut into micro-batches, `step` ends at the same bytes. `features/oracle.py` says the same
thing the slow, obvious way.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from features.config import FORGET_CODE
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
_PACK_RECORD: Final = struct.Struct("<qqQQIifB3x").pack
_HASH_AT: Final = slice(24, 32)
_TIME_AT: Final = struct.Struct("<8xq")
_HASH_BYTES: Final = 8
# From this many events of a user on, one pass over the duplicate window is cheaper than a search
# for each: measured, see benchmarks/bench_ingest.py.
_MANY: Final = 12
_NO_TIME: Final = -(2**63)
NO_DWELL: Final = -1
NO_VALUE: Final = float("nan")
# Ordinals are 32-bit: a user past four billion events is a bug upstream, and is refused.
ORDINAL_MAX: Final = 2**32 - 1


class Position(msgspec.Struct, frozen=True, gc=False):
    """Where in Kafka the last applied event stood. `source` counts the topic's incarnations."""

    source: int
    partition: int
    offset: int


class Accepted(msgspec.Struct, frozen=True, gc=False):
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

    @property
    def is_forget(self) -> bool:
        """Whether this is no event of the user's but the wish that those before it be forgotten.

        Its `item_id` is the least ordinal to go on from: the lake, where earlier events are gone,
        says there how many there were.
        """
        return self.action == FORGET_CODE


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


class UserState(msgspec.Struct, frozen=True, gc=False):
    """Everything kept for one user in one generation, as plain data.

    Attributes:
        position: of the last applied event.
        append_time_ms: broker append time of the last applied event.
        next_ordinal: what the next accepted event gets; equals the number accepted so far, those
            forgotten among them.
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
    window: bytes = b""

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
    forgets: bool = False  # nothing of what Redis holds but position and ordinal may stay


class PartitionMovedError(FeatureError):
    """A user's events turned up in another partition: per-user order is no longer given."""


EMPTY_POSITION: Final = Position(0, -1, -1)
EMPTY_STATE: Final = UserState(EMPTY_POSITION, 0, 0, 0, 0, None, b"")


def step(state: UserState, events: Sequence[Accepted], config: StateConfig) -> Change:
    """Return the state after `events`, which are in offset order; `state` is not changed.

    Raises:
        PartitionMovedError: an event from another partition than the state's.
    """
    work = _Work(state, config)
    work.are_new = len(events) >= _MANY and _are_new(events, state.window)
    for event in events:
        work.apply(event)
    return work.change()


def _are_new(events: Sequence[Accepted], window: bytes) -> bool:
    """Return whether no event has the id of another, or of one in the window.

    One pass over the window for all of them, where each alone would search it.
    """
    hashes = {event.event_hash for event in events}
    if len(hashes) < len(events):
        return False
    held = struct.unpack(f"<{len(window) // _HASH_BYTES}Q", window)
    return hashes.isdisjoint(held)


class _Work:
    """One step's scratch pad; never outlives it. `apply` is the hottest code there is."""

    __slots__ = (
        "are_new",
        "chunks",
        "config",
        "departed",
        "forgets",
        "keep",
        "last",
        "newest_ms",
        "num_chunks",
        "num_duplicates",
        "num_jumped",
        "num_late",
        "num_skipped",
        "ordinal",
        "position",
        "state",
        "tail",
        "tail_bytes_max",
        "user_session",
        "window",
        "window_bytes",
    )

    def __init__(self, state: UserState, config: StateConfig) -> None:
        self.state = state
        self.config = config
        self.are_new = False
        self.forgets = False
        self.tail = bytearray(state.tail)
        self.tail_bytes_max = config.tail_max * RECORD_BYTES
        self.window = bytearray(state.window)
        self.window_bytes = config.dedup_window * _HASH_BYTES
        self.departed = state.departed
        self.last: Accepted | None = None
        self.position = state.position
        self.ordinal = state.next_ordinal
        self.num_chunks = state.num_chunks
        self.num_late = state.num_late
        self.user_session = OpenSession(state.user_session, config)
        self.chunks: list[Chunk] = []
        self.keep = len(state.tail)
        self.newest_ms = _time_of_last(state.tail)
        self.num_duplicates = 0
        self.num_skipped = 0
        self.num_jumped = 0  # ordinals that no event here got

    def apply(self, event: Accepted) -> None:
        position = event.position
        last = self.position
        if position.partition != last.partition or position.source != last.source:
            if not _follows(last, position):
                self.num_skipped += 1
                return
        elif position.offset <= last.offset:
            self.num_skipped += 1
            return
        if event.action == FORGET_CODE:
            self._forget(event)
            return
        ordinal = self.ordinal
        record = _PACK_RECORD(
            event.item_id,
            event.event_time_ms,
            event.domain,
            event.event_hash,
            ordinal,
            event.dwell_ms,
            event.value,
            event.action,
        )
        packed_hash = record[_HASH_AT]
        window = self.window
        if not self.are_new and _contains(window, packed_hash, self.window_bytes):
            self.num_duplicates += 1
            return
        assert ordinal < ORDINAL_MAX
        time_ms = event.event_time_ms
        if time_ms >= self.newest_ms:
            self.tail += record
            self.newest_ms = time_ms
        else:
            self._insert_late(record, time_ms)
        window += packed_hash
        if self.user_session.take(event, ordinal):
            self.num_late += 1
        self.last = event
        self.position = position
        self.ordinal = ordinal + 1
        if self.departed:
            oldest_counted = self.ordinal - self.config.dedup_window
            self.departed = tuple(d for d in self.departed if d.ordinal >= oldest_counted)
        if len(self.tail) == self.tail_bytes_max:
            self._depart()

    def _insert_late(self, record: bytes, time_ms: int) -> None:
        at = _insertion_point(self.tail, time_ms)
        self.tail[at:at] = record
        self.keep = min(self.keep, at)

    def _forget(self, event: Accepted) -> None:
        """Start anew, but for the position and the ordinals."""
        self.tail = bytearray()
        self.window = bytearray()
        self.departed = ()
        self.user_session = OpenSession(None, self.config)
        self.chunks = []
        self.num_chunks = self.num_late = self.keep = 0
        self.newest_ms = _NO_TIME
        self.last = event
        self.position = event.position
        self.num_jumped += max(0, event.item_id - self.ordinal)
        self.ordinal = max(self.ordinal, event.item_id)
        self.forgets = True

    def _depart(self) -> None:
        size = self.config.chunk * RECORD_BYTES
        chunk = bytes(self.tail[:size])
        del self.tail[:size]
        self.keep = 0
        self.chunks.append(Chunk(self.num_chunks, chunk))
        self.num_chunks += 1
        oldest_counted = self.ordinal - self.config.dedup_window
        gone = np.frombuffer(chunk, RECORD)
        gone = gone[gone["ordinal"] >= max(0, oldest_counted)]
        counted = zip(gone["ordinal"].tolist(), gone["event_hash"].tolist(), strict=True)
        self.departed = tuple(sorted((*self.departed, *(Departed(o, h) for o, h in counted))))

    def change(self) -> Change:
        after = self.state
        if self.last is not None:
            after = UserState(
                position=self.last.position,
                append_time_ms=self.last.append_time_ms,
                next_ordinal=self.ordinal,
                num_chunks=self.num_chunks,
                num_late=self.num_late,
                user_session=self.user_session.closed(),
                tail=bytes(self.tail),
                departed=self.departed,
                window=bytes(self.window[-self.window_bytes :]),
            )
        return Change(
            after,
            self.keep,
            tuple(self.chunks),
            self.ordinal - self.state.next_ordinal - self.num_jumped,
            self.num_duplicates,
            self.num_skipped,
            self.forgets,
        )


def _time_of_last(tail: bytes) -> int:
    return _TIME_AT.unpack_from(tail, len(tail) - RECORD_BYTES)[0] if tail else _NO_TIME


def _follows(last: Position, new: Position) -> bool:
    """Return whether a topic or a user's first event comes next; False: it is passed already.

    Raises:
        PartitionMovedError: another partition of the same topic.
    """
    if last.partition < 0 or new.source > last.source:
        # A topic is retired before the next one takes events, so all before is applied.
        return True
    if new.source == last.source:
        raise PartitionMovedError(
            f"the user's last event was applied from partition {last.partition} "
            f"(source {last.source}), this one comes from partition {new.partition}: the topic's "
            "partition count changed, or a producer uses another partitioner. "
            "See moveline repartition --help."
        )
    return False


def _contains(window: bytearray, packed_hash: bytes, window_bytes: int) -> bool:
    """Return whether a hash is among the window's last bytes, at a whole place."""
    at = window.find(packed_hash, max(0, len(window) - window_bytes))
    while at >= 0 and at % _HASH_BYTES:
        at = window.find(packed_hash, at + 1)
    return at >= 0


def _insertion_point(tail: bytearray, event_time_ms: int) -> int:
    """Return the byte offset after every record not newer than `event_time_ms`.

    The new event has the largest ordinal, so among equal times it comes last.
    """
    low, high = 0, len(tail) // RECORD_BYTES
    while low < high:
        middle = (low + high) // 2
        if _TIME_AT.unpack_from(tail, middle * RECORD_BYTES)[0] <= event_time_ms:
            low = middle + 1
        else:
            high = middle
    return low * RECORD_BYTES


class OpenSession:
    """The rolling session while events are applied to it.

    A late event within the gap of the session's span extends it; an older one leaves it alone.
    An event exactly one gap away still belongs.
    """

    __slots__ = ("counts", "dwell_ms", "gap_ms", "last_ms", "max_ms", "num", "start_ms", "which")

    def __init__(self, current: UserSession | None, config: StateConfig) -> None:
        self.gap_ms = config.session_gap_ms
        self.max_ms = config.session_max_ms
        if current is None:
            # Every event is more than a gap after this one, so the first opens a session.
            self.which, self.num, self.dwell_ms = 0, 0, 0
            self.start_ms = self.last_ms = _NO_TIME
            self.counts = [0] * len(config.actions)
        else:
            self.which, self.start_ms, self.last_ms, self.num, self.dwell_ms, counts = current
            self.counts = list(counts)

    def take(self, event: Accepted, ordinal: int) -> bool:
        """Move the session by an event; return whether the event was too late to move it."""
        time_ms = event.event_time_ms
        if time_ms > self.last_ms + self.gap_ms:
            self._open(time_ms, ordinal)
        elif time_ms > self.last_ms:
            if time_ms - self.start_ms > self.max_ms:
                self._open(time_ms, ordinal)
            self.last_ms = time_ms
        elif time_ms < self.start_ms:
            if time_ms < self.start_ms - self.gap_ms or self.last_ms - time_ms > self.max_ms:
                return True
            self.start_ms = time_ms
        self.num += 1
        if event.dwell_ms > 0:
            self.dwell_ms += event.dwell_ms
        self.counts[event.action] += 1
        return False

    def _open(self, time_ms: int, ordinal: int) -> None:
        self.which = ordinal
        self.start_ms = self.last_ms = time_ms
        self.num = self.dwell_ms = 0
        self.counts = [0] * len(self.counts)

    def closed(self) -> UserSession | None:
        """Return the session as plain data."""
        if not self.num:
            return None
        return UserSession(
            self.which, self.start_ms, self.last_ms, self.num, self.dwell_ms, tuple(self.counts)
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
    return msgspec.structs.replace(state, window=hashes[np.argsort(ordinals)].tobytes())
