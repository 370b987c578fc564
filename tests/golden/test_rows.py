"""Goal: state rows keep their bytes, from the record to what the write script leaves in Redis.

Changing a literal here is a decision: rows that are stored become unreadable. Raise ROW_FORMAT, say
in docs/formats.md and CHANGELOG.md what happens to the old ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.config import StateConfig
from features.keys import chunks_key, row_key
from features.redis import StateStore
from features.row import (
    DEPARTED_BYTES,
    MAGIC,
    POSITION_BYTES,
    POSITION_FROM_END,
    ROW_FORMAT,
    TRAILER_BYTES,
    RowWrite,
    decode_row,
    encode_row,
    encode_write,
    newest_bytes,
)
from features.state import (
    EMPTY_STATE,
    NO_DWELL,
    NO_VALUE,
    RECORD,
    RECORD_BYTES,
    Accepted,
    Position,
    UserState,
    rebuild_window,
    step,
)

if TYPE_CHECKING:
    import redis

# One recent, one mid-term event and chunks of one: four events reach every part of a row.
TINY = StateConfig(recent=1, mid=1, chunk=1, dedup_window=4)
NUM_ACTIONS = 8
USER = 42
TIME_MS = 1_763_700_000_000


def accepted(offset: int, late_ms: int, item_id: int, event_hash: int, **fields: float) -> Accepted:
    """Return an event of partition 3."""
    return Accepted(
        position=Position(0, 3, offset),
        append_time_ms=1_763_700_000_100 + offset,
        item_id=item_id,
        event_time_ms=TIME_MS + late_ms,
        domain=int(fields.get("domain", 0)),
        event_hash=event_hash,
        dwell_ms=int(fields.get("dwell_ms", NO_DWELL)),
        value=fields.get("value", NO_VALUE),
        action=int(fields["action"]),
    )


EVENTS = (
    accepted(
        10,
        0,
        1007,
        0x1111111111111111,
        action=1,
        domain=0x5418D0ABDCED061A,
        dwell_ms=1200,
        value=4.5,
    ),
    accepted(11, 1000, 1008, 0x2222222222222222, action=6),
    accepted(13, -500, 1009, 0x3333333333333333, action=2),
    accepted(20, 2000, 2**63 - 1, 0x4444444444444444, action=6),
)
RECORDS = tuple(
    bytes.fromhex(text)
    for text in (
        # item_id, event_time_ms, domain, event_hash, ordinal, dwell_ms, value, action, reserved
        (
            "ef03000000000000 0045b6a49a010000 1a06eddcabd01854 1111111111111111"
            "00000000 b0040000 00009040 01 000000"
        ),
        (
            "f003000000000000 e848b6a49a010000 0000000000000000 2222222222222222"
            "01000000 ffffffff 0000c07f 06 000000"
        ),
        (
            "f103000000000000 0c43b6a49a010000 0000000000000000 3333333333333333"
            "02000000 ffffffff 0000c07f 02 000000"
        ),
        (
            "ffffffffffffff7f d04cb6a49a010000 0000000000000000 4444444444444444"
            "03000000 ffffffff 0000c07f 06 000000"
        ),
    )
)
# Ids that left the tail and still count for duplicates: ordinals 0 and 2.
DEPARTED = bytes.fromhex("00000000 1111111111111111 02000000 3333333333333333")
TRAILER = bytes.fromhex(
    # session: id 0, start, last, 4 events, 1200 ms; then 16 counters by action
    "00000000 0c43b6a49a010000 d04cb6a49a010000 04000000 b004000000000000"
    "00000000 01000000 01000000 00000000 00000000 00000000 02000000 00000000"
    "00000000 00000000 00000000 00000000 00000000 00000000 00000000 00000000"
    # position: source 0, partition 3, offset 20
    "00000000 03000000 1400000000000000"
    # append time, next ordinal 4, chunks 2, late 0, records 2, departed 2, session 1, actions 8
    "7845b6a49a010000 04000000 02000000 00000000 02000000 0200 01 08"
    # crc32, format 1, "MV"
    "9f190254 0100 4d56"
)
ROW = RECORDS[1] + RECORDS[3] + DEPARTED + TRAILER


def states() -> list[UserState]:
    """Return the state before the first event and after each."""
    found = [EMPTY_STATE]
    for event in EVENTS:
        found.append(step(found[-1], [event], TINY).state)
    return found


def test_sizes() -> None:
    assert (RECORD_BYTES, DEPARTED_BYTES, TRAILER_BYTES) == (48, 12, 148)
    assert (POSITION_BYTES, POSITION_FROM_END) == (16, 52)
    assert (ROW_FORMAT, MAGIC) == (1, b"MV")
    assert newest_bytes(64) == 64 * 48 + 148


def test_where_a_records_fields_stand() -> None:
    assert RECORD.fields is not None
    found = {name: (at, kind.str) for name, (kind, at, *_) in RECORD.fields.items()}
    assert found == {
        "item_id": (0, "<i8"),
        "event_time_ms": (8, "<i8"),
        "domain": (16, "<u8"),
        "event_hash": (24, "<u8"),
        "ordinal": (32, "<u4"),
        "dwell_ms": (36, "<i4"),
        "value": (40, "<f4"),
        "action": (44, "|u1"),
        "reserved": (45, "|V3"),
    }


def test_a_record() -> None:
    assert states()[1].tail == RECORDS[0]


def test_a_whole_row() -> None:
    assert encode_row(states()[-1], NUM_ACTIONS) == ROW
    assert rebuild_window(decode_row(ROW), TINY.dedup_window) == states()[-1]


def test_where_the_position_stands() -> None:
    """The write script reads 16 bytes there, whatever the length of the row."""
    assert ROW[-POSITION_FROM_END:][:POSITION_BYTES] == bytes.fromhex(
        "00000000 03000000 1400000000000000"
    )


def writes() -> list[RowWrite]:
    """Return what has to be written for each event."""
    found, state = [], EMPTY_STATE
    for event in EVENTS:
        change = step(state, [event], TINY)
        found.append(encode_write(state, change, NUM_ACTIONS))
        state = change.state
    return found


def test_write_arguments() -> None:
    """Nothing there; an append over the old trailer; twice a whole row with a chunk that left."""
    first, append, late, last = writes()
    assert first.expected == b""
    assert (first.keep, first.data[:48], first.chunks) == (-1, RECORDS[0], ())
    assert append.expected == bytes.fromhex("00000000 03000000 0a00000000000000")
    assert (append.keep, append.data[:48], append.chunks) == (48, RECORDS[1], ())
    assert len(append.data) == RECORD_BYTES + TRAILER_BYTES
    assert late.expected == bytes.fromhex("00000000 03000000 0b00000000000000")
    assert (late.keep, late.chunks) == (-1, (b"0", RECORDS[2]))
    assert last == RowWrite(
        expected=bytes.fromhex("00000000 03000000 0d00000000000000"),
        keep=-1,
        data=ROW,
        chunks=(b"1", RECORDS[0]),
    )


def test_what_the_writes_leave_in_redis(golden_client: redis.Redis) -> None:
    store = StateStore(golden_client, 1, TINY)
    for write in writes():
        assert store.write({USER: write}) == []
    assert golden_client.get(row_key(1, USER)) == ROW
    assert golden_client.hgetall(chunks_key(1, USER)) == {b"0": RECORDS[2], b"1": RECORDS[0]}


@pytest.mark.parametrize("again", range(4))
def test_a_write_from_an_older_position_is_refused(golden_client: redis.Redis, again: int) -> None:
    """Each earlier write, sent once more, leaves every byte alone."""
    store = StateStore(golden_client, 1, TINY)
    for write in writes():
        store.write({USER: write})
    assert store.write({USER: writes()[again]}) == [USER]
    assert golden_client.get(row_key(1, USER)) == ROW
