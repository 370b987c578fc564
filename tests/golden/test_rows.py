"""Goal: state rows keep their bytes, from the record to what the write script leaves in Redis.

Changing a literal here is a decision: rows that are stored become unreadable. Raise ROW_FORMAT, say
in docs/formats.md and CHANGELOG.md what happens to the old ones.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import pytest

from features.config import StateConfig
from features.keys import bucket_of, checkpoints_key, chunks_key, row_key
from features.redis import CHECKPOINT_DIFFERS, WRITTEN, BucketWrite, StateStore
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
from tests.small import REPOSITORY

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


def bucket_writes() -> list[BucketWrite]:
    """Return the writes of user 42's bucket, each with its checkpoint before and after."""
    ends = [event.position.offset + 1 for event in EVENTS]
    return [
        BucketWrite(980, 0, 3, before, after, {USER: write})
        for before, after, write in zip([-1, *ends[:-1]], ends, writes(), strict=True)
    ]


def test_the_commands_of_the_writes(golden_client: redis.Redis) -> None:
    """Keys: checkpoints, row, chunks. Values: field, checkpoint before and after, 52, row."""
    script = REPOSITORY / "features" / "lua" / "write_bucket.lua"
    digest = hashlib.sha1(script.read_bytes(), usedforsecurity=False).hexdigest()
    store = StateStore(golden_client, 1, TINY)
    commands = [store._bucket_command(write) for write in bucket_writes()]
    names = (
        "moveline:{b980}:g1:checkpoints",
        "moveline:{b980}:g1:row:42",
        "moveline:{b980}:g1:chunks:42",
    )
    assert {command[:6] for command in commands} == {("EVALSHA", digest, 3, *names)}
    first, append, late, last = (command[6:] for command in commands)
    new_row = RECORDS[0] + first[6][RECORD_BYTES:]
    assert first == (b"0:3", b"", 11, 52, b"", -1, new_row, 0)
    assert append[:6] == (
        b"0:3",
        b"11",
        12,
        52,
        bytes.fromhex("00000000030000000a00000000000000"),
        48,
    )
    assert append[7:] == (0,)
    assert late[:4] == (b"0:3", b"12", 14, 52)
    assert late[7:] == (2, b"0", RECORDS[2])
    expected = bytes.fromhex("00000000030000000d00000000000000")
    assert last == (b"0:3", b"14", 21, 52, expected, -1, ROW, 2, b"1", RECORDS[0])


def test_the_command_of_an_idle_bucket_carries_no_row(golden_client: redis.Redis) -> None:
    command = StateStore(golden_client, 1, TINY)._bucket_command(BucketWrite(7, 0, 3, 5, 9, {}))
    assert command[2:] == (1, "moveline:{b7}:g1:checkpoints", b"0:3", b"5", 9, 52)


def test_what_the_writes_leave_in_redis(golden_client: redis.Redis) -> None:
    store = StateStore(golden_client, 1, TINY)
    assert (WRITTEN, CHECKPOINT_DIFFERS) == (1, 0)
    for write in bucket_writes():
        assert store.write_buckets([write]) == [1]
    assert_holds_the_row(golden_client)


def assert_holds_the_row(client: redis.Redis) -> None:
    assert client.get(row_key(1, USER)) == ROW
    assert client.hgetall(chunks_key(1, USER)) == {b"0": RECORDS[2], b"1": RECORDS[0]}
    assert client.hgetall(checkpoints_key(1, 980)) == {b"0:3": b"21"}


@pytest.mark.parametrize("again", range(4))
def test_a_write_from_an_older_position_is_refused(golden_client: redis.Redis, again: int) -> None:
    """Each earlier write, sent once more, leaves every byte alone: 0 for its old checkpoint.

    With the checkpoint as it stands it is the row that refuses: -1, for the first user's row.
    """
    store = StateStore(golden_client, 1, TINY)
    for write in bucket_writes():
        store.write_buckets([write])
    older = bucket_writes()[again]
    assert store.write_buckets([older]) == [0]
    assert_holds_the_row(golden_client)
    assert store.write_buckets([older._replace(expected=21, advance_to=22)]) == [-1]
    assert_holds_the_row(golden_client)


def test_one_users_row_that_differs_refuses_the_whole_bucket(golden_client: redis.Redis) -> None:
    """The reply is minus the user's place, and users before it are not written either."""
    neighbours = (user for user in range(USER + 1, 10**6) if bucket_of(user) == 980)
    second, third = next(neighbours), next(neighbours)
    store = StateStore(golden_client, 1, TINY)
    for write in bucket_writes():
        store.write_buckets([write])
    new, stale = writes()[0], writes()[1]
    for rows, reply in (
        ({second: new, USER: stale}, -2),
        ({second: new, third: new, USER: stale}, -3),
    ):
        assert store.write_buckets([BucketWrite(980, 0, 3, 21, 22, rows)]) == [reply]
        assert_holds_the_row(golden_client)
        assert golden_client.keys("moveline:{b980}:g1:row:*") == [row_key(1, USER).encode()]
