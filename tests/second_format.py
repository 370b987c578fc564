"""A second row format, for tests only: nothing needs one yet, and the way to one has to be open.

Its trailer has two counters of actions less than the first format's, so rows get shorter where they
are written over: what an append in the wrong format would leave behind shows at once.
"""

from __future__ import annotations

import struct
import zlib
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from features.errors import CorruptRowError
from features.row import FORMATS, MAGIC, ROW_FORMAT, TRAILER_BYTES, RowFormat, encode_write

if TYPE_CHECKING:
    from features.row import RowWrite
    from features.state import Change, UserState

NUMBER: Final = 2
_FIRST: Final = FORMATS[ROW_FORMAT]
_LEFT_OUT: Final = slice(88, 96)
_SHORTER: Final = 8
_TRAILER_BYTES: Final = TRAILER_BYTES - _SHORTER
_END: Final = struct.Struct("<IH2s")


def _shortened(row_end: bytes) -> bytes:
    """Return the end of a row of the first format as one of the second."""
    before, trailer = row_end[:-TRAILER_BYTES], row_end[-TRAILER_BYTES:]
    assert not any(trailer[_LEFT_OUT]), "more actions than the second format counts"
    body = trailer[: _LEFT_OUT.start] + trailer[_LEFT_OUT.stop : -_END.size]
    return before + body + _END.pack(zlib.crc32(body), NUMBER, MAGIC)


def _encode_write(before: UserState, change: Change, num_actions: int) -> RowWrite:
    write = encode_write(before, change, num_actions)
    return write._replace(data=_shortened(write.data))


def _decode_newest(row_end: bytes) -> tuple[UserState, int]:
    if len(row_end) < _TRAILER_BYTES:
        raise CorruptRowError(f"{len(row_end)} bytes; a row has at least {_TRAILER_BYTES}")
    before, trailer = row_end[:-_TRAILER_BYTES], row_end[-_TRAILER_BYTES:]
    body = trailer[: -_END.size]
    if _END.unpack(trailer[-_END.size :]) != (zlib.crc32(body), NUMBER, MAGIC):
        raise CorruptRowError("the row's trailer does not match its checksum")
    longer = body[: _LEFT_OUT.start] + bytes(_SHORTER) + body[_LEFT_OUT.start :]
    first = before + longer + _END.pack(zlib.crc32(longer), ROW_FORMAT, MAGIC)
    return _FIRST.decode_newest(first)


def _size_of(state: UserState) -> int:
    return _FIRST.size_of(state) - _SHORTER


SECOND: Final = RowFormat(NUMBER, _encode_write, _decode_newest, _size_of)
BOTH: Final = MappingProxyType({**FORMATS, NUMBER: SECOND})
