"""A user's state as bytes: records first, departed ids next, a fixed trailer last.

The trailer stands at the end, as in a Parquet file, because one `GETRANGE key -n -1` then reads
the newest events, the session and the source position together, atomically, without reading the
mid-term stream; and an append is one `SETRANGE` that overwrites the old trailer. Layout and golden
bytes: docs/formats.md.
"""

from __future__ import annotations

import struct
import zlib
from typing import Final, NamedTuple

from features.config import ACTIONS_MAX
from features.errors import CorruptRowError
from features.state import (
    EMPTY_STATE,
    RECORD_BYTES,
    Change,
    Departed,
    Position,
    UserSession,
    UserState,
)

ROW_FORMAT: Final = 1
MAGIC: Final = b"MV"

_POSITION: Final = struct.Struct("<Iiq")
_SESSION: Final = struct.Struct(f"<IqqIQ{ACTIONS_MAX}I")
_COUNTS: Final = struct.Struct("<qIIIIHBB")  # append time, ordinals, chunks, late, records, ...
_END: Final = struct.Struct("<IH2s")  # crc32 of the trailer before it, format, magic
_DEPARTED: Final = struct.Struct("<IQ")

TRAILER_BYTES: Final = _SESSION.size + _POSITION.size + _COUNTS.size + _END.size
DEPARTED_BYTES: Final = _DEPARTED.size
# The position's bytes, counted from the end of the row: what the write script compares.
POSITION_FROM_END: Final = _POSITION.size + _COUNTS.size + _END.size
POSITION_BYTES: Final = _POSITION.size
# Where a row of this format says how many departed ids it has; nearly all have none.
_DEPARTED_AT: Final = slice(-12, -10)
_NONE_DEPARTED: Final = bytes(2)
_PADDING: Final = tuple((0,) * (ACTIONS_MAX - used) for used in range(ACTIONS_MAX + 1))
_NO_SESSION: Final = _SESSION.pack(*[0] * (5 + ACTIONS_MAX))


class RowWrite(NamedTuple):
    """One user's part of a bucket write: see features/lua/write_bucket.lua."""

    expected: bytes  # position the change was computed from, empty when there was no row
    keep: int  # bytes of the old row that stay; -1 replaces the row
    data: bytes
    chunks: tuple[bytes, ...]  # number, records, number, records, ...


def encode_position(position: Position) -> bytes:
    """Return the 16 bytes the write script compares."""
    return _POSITION.pack(position.source, position.partition, position.offset)


def _encode_end(state: UserState, num_actions: int) -> bytes:
    """Return departed ids and trailer."""
    current = state.user_session
    packed_session = _NO_SESSION
    if current is not None:
        which, start_ms, last_ms, num_events, dwell_ms, counts = current
        packed_session = _SESSION.pack(
            which, start_ms, last_ms, num_events, dwell_ms, *counts, *_PADDING[len(counts)]
        )
    body = (
        packed_session
        + encode_position(state.position)
        + _COUNTS.pack(
            state.append_time_ms,
            state.next_ordinal,
            state.num_chunks,
            state.num_late,
            len(state.tail) // RECORD_BYTES,
            len(state.departed),
            current is not None,
            num_actions,
        )
    )
    end = body + _END.pack(zlib.crc32(body), ROW_FORMAT, MAGIC)
    if state.departed:
        return b"".join(_DEPARTED.pack(*d) for d in state.departed) + end
    return end


def encode_row(state: UserState, num_actions: int) -> bytes:
    """Return the whole row."""
    return state.tail + _encode_end(state, num_actions)


def encode_write(before: UserState, change: Change, num_actions: int) -> RowWrite:
    """Return the smallest write that turns the row of `before` into the row of the change."""
    after = change.state
    end = _encode_end(after, num_actions)
    expected = b"" if before is EMPTY_STATE else encode_position(before.position)
    chunks = tuple(
        part for chunk in change.chunks for part in (b"%d" % chunk.number, chunk.records)
    )
    old_bytes = len(before.tail) + len(before.departed) * DEPARTED_BYTES + TRAILER_BYTES
    suffix = after.tail[change.keep :] + end
    # SETRANGE cannot shorten a value, so a row that shrinks is replaced.
    if not expected or change.chunks or change.keep + len(suffix) < old_bytes:
        return RowWrite(expected, -1, after.tail + end, chunks)
    return RowWrite(expected, change.keep, suffix, chunks)


def decode_row(row: bytes) -> UserState:
    """Return the state in a whole row, without its duplicate window (see `rebuild_window`).

    Raises:
        CorruptRowError: wrong magic, format, checksum or length.
    """
    state, missing = decode_newest(row)
    size = len(state.tail) + len(state.departed) * DEPARTED_BYTES + TRAILER_BYTES
    if missing or size != len(row):
        raise CorruptRowError(f"row of {len(row)} bytes where its trailer promises {size}")
    return state


def decode_newest(row_end: bytes) -> tuple[UserState, int]:
    """Return the state in the last bytes of a row, and how many older records they leave out.

    Raises:
        CorruptRowError: wrong magic, format, checksum or length.
    """
    if len(row_end) < TRAILER_BYTES:
        raise CorruptRowError(f"{len(row_end)} bytes; a row has at least {TRAILER_BYTES}")
    body = memoryview(row_end)[-TRAILER_BYTES : -_END.size]
    crc, row_format, magic = _END.unpack_from(row_end, len(row_end) - _END.size)
    if magic != MAGIC or row_format != ROW_FORMAT:
        raise CorruptRowError(
            f"row ends with magic {magic!r} format {row_format}; this build reads {MAGIC!r} "
            f"format {ROW_FORMAT}"
        )
    if zlib.crc32(body) != crc:
        raise CorruptRowError("the row's trailer does not match its checksum")
    counts = _COUNTS.unpack_from(body, _SESSION.size + _POSITION.size)
    append_time_ms, next_ordinal, num_chunks, num_late, num_records, num_departed = counts[:6]
    has_session, num_actions = counts[6:]
    tail_end = len(row_end) - TRAILER_BYTES - num_departed * DEPARTED_BYTES
    if tail_end < 0 or (tail_end > num_records * RECORD_BYTES):
        raise CorruptRowError(
            f"row of {len(row_end)} bytes does not fit its {num_records} records "
            f"and {num_departed} departed ids"
        )
    held = tail_end // RECORD_BYTES
    state = UserState(
        position=Position(*_POSITION.unpack_from(body, _SESSION.size)),
        append_time_ms=append_time_ms,
        next_ordinal=next_ordinal,
        num_chunks=num_chunks,
        num_late=num_late,
        user_session=_decode_session(body, num_actions) if has_session else None,
        tail=row_end[tail_end - held * RECORD_BYTES : tail_end],
        departed=tuple(
            Departed(*pair)
            for pair in _DEPARTED.iter_unpack(row_end[tail_end : len(row_end) - TRAILER_BYTES])
        ),
    )
    return state, num_records - held


def _decode_session(body: memoryview, num_actions: int) -> UserSession:
    session_id, start_ms, last_ms, num_events, dwell_ms, *counts = _SESSION.unpack_from(body)
    return UserSession(
        session_id, start_ms, last_ms, num_events, dwell_ms, tuple(counts[:num_actions])
    )


def newest_bytes(num_records: int) -> int:
    """Return how many bytes from the end hold the newest records and the trailer.

    Departed ids are rare (late events only); a row that has some may come back short by as many
    records, which `is_short` tells and the reader fetches whole.
    """
    return num_records * RECORD_BYTES + TRAILER_BYTES


def is_short(row_end: bytes | memoryview, num_records: int) -> bool:
    """Return whether the end of a row lacks records because of departed ids before the trailer."""
    if len(row_end) < TRAILER_BYTES or row_end[_DEPARTED_AT] == _NONE_DEPARTED:
        return False
    counts = _COUNTS.unpack_from(row_end, len(row_end) - _END.size - _COUNTS.size)
    in_row, num_departed = counts[4:6]
    held = (len(row_end) - TRAILER_BYTES - num_departed * DEPARTED_BYTES) // RECORD_BYTES
    return bool(held < min(num_records, in_row))
