"""A user's state as bytes: records first, departed ids next, a fixed trailer last.

The trailer stands at the end, as in a Parquet file, because one `GETRANGE key -n -1` then reads
the newest events, the session and the source position together, atomically, without reading the
mid-term stream; and an append is one `SETRANGE` that overwrites the old trailer. Layout and golden
bytes: docs/formats.md.
"""

from __future__ import annotations

import struct
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, NamedTuple

from features.config import ACTIONS_MAX
from features.errors import CorruptRowError, UnknownRowFormatError
from features.state import (
    EMPTY_STATE,
    RECORD_BYTES,
    Change,
    Departed,
    Position,
    UserSession,
    UserState,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

# The format described in docs/formats.md, in which a generation's rows are written unless its
# record says otherwise.
ROW_FORMAT: Final = 1
MAGIC: Final = b"MV"

_POSITION: Final = struct.Struct("<Iiq")
_SESSION: Final = struct.Struct(f"<IqqIQ{ACTIONS_MAX}I")
_COUNTS: Final = struct.Struct("<qIIIIHBB")  # append time, ordinals, chunks, late, records, ...
# The three of them, which stand side by side: one call packs them.
_BODY: Final = struct.Struct(_SESSION.format + _POSITION.format[1:] + _COUNTS.format[1:])
_END: Final = struct.Struct("<IH2s")  # crc32 of the trailer before it, format, magic
_ENDING: Final = struct.Struct("<H2s")  # format and magic: the last bytes of a row of any format
_DEPARTED: Final = struct.Struct("<IQ")

TRAILER_BYTES: Final = _SESSION.size + _POSITION.size + _COUNTS.size + _END.size
DEPARTED_BYTES: Final = _DEPARTED.size
# The position's bytes, counted from the end of the row: what the write script compares.
POSITION_FROM_END: Final = _POSITION.size + _COUNTS.size + _END.size
POSITION_BYTES: Final = _POSITION.size
_PADDING: Final = tuple((0,) * (ACTIONS_MAX - used) for used in range(ACTIONS_MAX + 1))
_NO_SESSION: Final = UserSession(0, 0, 0, 0, 0, ())


# Instead of a number of bytes to keep: the row is written anew; and its waiting chunks go too.
REPLACE: Final = -1
FORGET: Final = -2


class RowWrite(NamedTuple):
    """One user's part of a bucket write: see features/lua/write_bucket.lua."""

    expected: bytes  # position the change was computed from, empty when there was no row
    keep: int  # bytes of the old row that stay; REPLACE or FORGET
    data: bytes
    chunks: tuple[bytes, ...]  # number, records, number, records, ...


class RowFormat(NamedTuple):
    """One way to put states into rows.

    Rows of every format end with the format's number and MAGIC, and hold the position where the
    write script compares it (POSITION_FROM_END).

    Attributes:
        size_of: bytes of the whole row of a state.
    """

    number: int
    encode_write: Callable[[UserState, Change, int], RowWrite]
    decode_newest: Callable[[bytes], tuple[UserState, int]]
    size_of: Callable[[UserState], int]


class ForeignState(UserState, frozen=True, gc=False):
    """A state whose row has another format than the next write: that one replaces the row."""


def as_foreign(state: UserState) -> ForeignState:
    """Return the same state, marked."""
    return ForeignState(*(getattr(state, name) for name in state.__struct_fields__))


def encode_position(position: Position) -> bytes:
    """Return the 16 bytes the write script compares."""
    return _POSITION.pack(position.source, position.partition, position.offset)


def _encode_end(state: UserState, num_actions: int) -> bytes:
    """Return departed ids and trailer."""
    current = state.user_session
    which, start_ms, last_ms, num_events, dwell_ms, counts = current or _NO_SESSION
    position = state.position
    body = _BODY.pack(
        which,
        start_ms,
        last_ms,
        num_events,
        dwell_ms,
        *counts,
        *_PADDING[len(counts)],
        position.source,
        position.partition,
        position.offset,
        state.append_time_ms,
        state.next_ordinal,
        state.num_chunks,
        state.num_late,
        len(state.tail) // RECORD_BYTES,
        len(state.departed),
        current is not None,
        num_actions,
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
    chunks: tuple[bytes, ...] = ()
    if change.chunks:
        chunks = tuple(p for chunk in change.chunks for p in (b"%d" % chunk.number, chunk.records))
    old_bytes = _size_of(before)
    suffix = after.tail[change.keep :] + end
    # SETRANGE cannot shorten a value, so a row that shrinks is replaced.
    if change.forgets:
        return RowWrite(expected, FORGET, after.tail + end, chunks)
    is_foreign = type(before) is ForeignState
    if not expected or change.chunks or is_foreign or change.keep + len(suffix) < old_bytes:
        return RowWrite(expected, REPLACE, after.tail + end, chunks)
    return RowWrite(expected, change.keep, suffix, chunks)


def _decode_newest(row_end: bytes) -> tuple[UserState, int]:
    if len(row_end) < TRAILER_BYTES:
        raise CorruptRowError(f"{len(row_end)} bytes; a row has at least {TRAILER_BYTES}")
    body = memoryview(row_end)[-TRAILER_BYTES : -_END.size]
    crc, _, _ = _END.unpack_from(row_end, len(row_end) - _END.size)
    if zlib.crc32(body) != crc:
        raise CorruptRowError("the row's trailer does not match its checksum")
    counts = _COUNTS.unpack_from(body, _SESSION.size + _POSITION.size)
    append_time_ms, next_ordinal, num_chunks, num_late, num_records, num_departed = counts[:6]
    has_session, num_actions = counts[6:]
    tail_end = len(row_end) - TRAILER_BYTES - num_departed * DEPARTED_BYTES
    if tail_end < 0 and num_records:
        # What was read begins among the departed ids: no record is in it, all of them are missing.
        row_end, tail_end = row_end[-TRAILER_BYTES:], 0
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


def _size_of(state: UserState) -> int:
    return len(state.tail) + len(state.departed) * DEPARTED_BYTES + TRAILER_BYTES


# The formats that this build reads and can write.
FORMATS: Final[Mapping[int, RowFormat]] = MappingProxyType(
    {ROW_FORMAT: RowFormat(ROW_FORMAT, encode_write, _decode_newest, _size_of)}
)


def format_of(row: bytes, formats: Mapping[int, RowFormat] = FORMATS) -> RowFormat:
    """Return the format that a row, or the end of one, is written in.

    Raises:
        CorruptRowError: these are not the last bytes of a row.
        UnknownRowFormatError: another build wrote it.
    """
    number, magic = _ENDING.unpack(row[-_ENDING.size :].rjust(_ENDING.size))
    if magic != MAGIC:
        raise CorruptRowError(f"{len(row)} bytes end with magic {magic!r} in place of {MAGIC!r}")
    return known_format(number, formats)


def known_format(number: int, formats: Mapping[int, RowFormat] = FORMATS) -> RowFormat:
    """Return the format of a number.

    Raises:
        UnknownRowFormatError: this build has none of that number.
    """
    if number not in formats:
        known = ", ".join(map(str, sorted(formats)))
        raise UnknownRowFormatError(
            f"rows of format {number}, this build knows {known}: nothing was written. Run a newer "
            "build of Moveline here; docs/formats.md says in which order to upgrade."
        )
    return formats[number]


def decode_row(row: bytes, formats: Mapping[int, RowFormat] = FORMATS) -> UserState:
    """Return the state in a whole row, without its duplicate window (see `rebuild_window`).

    Raises:
        CorruptRowError: wrong magic, format, checksum or length.
    """
    found = format_of(row, formats)
    state, missing = found.decode_newest(row)
    size = found.size_of(state)
    if missing or size != len(row):
        raise CorruptRowError(f"row of {len(row)} bytes where its trailer promises {size}")
    return state


def decode_newest(
    row_end: bytes, formats: Mapping[int, RowFormat] = FORMATS
) -> tuple[UserState, int]:
    """Return the state in the last bytes of a row, and how many older records they leave out.

    Raises:
        CorruptRowError: wrong magic, format, checksum or length.
    """
    return format_of(row_end, formats).decode_newest(row_end)


def newest_bytes(num_records: int) -> int:
    """Return how many bytes from the end hold the newest records and the trailer.

    Departed ids are rare (late events only); a row that has some may come back short by as many
    records, which `is_short` tells and the reader fetches whole.
    """
    return num_records * RECORD_BYTES + TRAILER_BYTES


def is_short(row_end: bytes, num_records: int) -> bool:
    """Return whether the end of a row lacks records because of departed ids before the trailer."""
    if len(row_end) < TRAILER_BYTES:
        return False
    counts = _COUNTS.unpack_from(row_end, len(row_end) - _END.size - _COUNTS.size)
    in_row, num_departed = counts[4:6]
    held = (len(row_end) - TRAILER_BYTES - num_departed * DEPARTED_BYTES) // RECORD_BYTES
    return bool(num_departed) and held < min(num_records, in_row)
