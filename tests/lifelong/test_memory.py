"""Goal: a memory's bytes are what docs/formats.md says, and folding obeys the laws of a sum."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features.errors import CorruptMemoryError
from features.lifelong import (
    LIFELONG_ROWS,
    LIFELONG_WIDTH,
    MEMORY_BYTES,
    Memory,
    check_version,
    empty_memory,
    fold_into,
    memory_difference,
    pack_memory,
    unpack_memory,
)
from features.state import RECORD
from streams.lifelong import fold_chunks
from tests.lifelong.folds import V1, fold_values

VERSION = "0123456789abcdef"
STATE = np.arange(LIFELONG_ROWS * LIFELONG_WIDTH, dtype=np.float32).reshape(
    LIFELONG_ROWS, LIFELONG_WIDTH
)
MEMORY = Memory(3, 192, 7, STATE)
TOLERANCE = 1e-5


def test_the_bytes() -> None:
    raw = pack_memory(MEMORY, VERSION)
    assert len(raw) == MEMORY_BYTES == 32 + 4 * 64 * 64
    assert raw[:28].hex() == "4c4d01000300000007000000c0000000000000000123456789abcdef"
    assert raw[28:32].hex() == "fbe50964"
    assert raw[32:] == STATE.tobytes()
    found = unpack_memory(raw, VERSION)
    assert found[:3] == MEMORY[:3]
    assert np.array_equal(found.state, STATE)


@given(st.integers(0, MEMORY_BYTES - 1), st.integers(1, 255))
def test_any_byte_changed_is_noticed(at: int, change: int) -> None:
    raw = bytearray(pack_memory(MEMORY, VERSION))
    raw[at] ^= change
    with pytest.raises(CorruptMemoryError):
        unpack_memory(bytes(raw), VERSION)


def test_what_is_no_memory_says_why() -> None:
    raw = pack_memory(MEMORY, VERSION)
    with pytest.raises(CorruptMemoryError, match="16415 bytes; a memory has 16416"):
        unpack_memory(raw[:-1], VERSION)
    with pytest.raises(CorruptMemoryError, match=f"{VERSION}, {'f' * 16} asked for"):
        unpack_memory(raw, "f" * 16)
    for text in ("", "0123", "0123456789ABCDEF", VERSION + "\n", VERSION + "0"):
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            check_version(text)


def chunks_of(seed: int, count: int, size: int) -> list[bytes]:
    source = np.random.default_rng(seed)
    records = np.zeros((count, size), RECORD)
    records["item_id"] = source.integers(0, 10_000, (count, size))
    records["action"] = source.integers(0, 8, (count, size))
    records["event_time_ms"] = np.sort(source.integers(0, 10**12, (count, size)), axis=1)
    records["ordinal"] = np.arange(count * size).reshape(count, size)
    return [chunk.tobytes() for chunk in records]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 40), st.data())
def test_one_by_one_all_at_once_shuffled_and_merged_are_equal(
    seed: int, count: int, size: int, data: st.DataObject
) -> None:
    chunks = chunks_of(seed, count, size)
    at_once = fold_chunks(fold_values, V1, empty_memory(0), chunks)
    streamed = empty_memory(0)
    for chunk in chunks:
        streamed = fold_chunks(fold_values, V1, streamed, [chunk])
    shuffled = data.draw(st.permutations(chunks))
    cut = data.draw(st.integers(0, count))
    left = fold_chunks(fold_values, V1, empty_memory(0), shuffled[:cut])
    right = fold_chunks(fold_values, V1, empty_memory(0), shuffled[cut:])
    merged = left._replace(
        num_chunks=left.num_chunks + right.num_chunks,
        num_events=left.num_events + right.num_events,
        state=left.state + right.state,
    )
    events = b"".join(chunks)
    regrouped = np.frombuffer(events, RECORD).reshape(1, -1)
    whole = fold_into(empty_memory(0), fold_values(1, regrouped))
    for other in (streamed, merged):
        assert other[:3] == at_once[:3] == (count, count * size, 0)
        assert memory_difference(other, at_once) < TOLERANCE
    assert memory_difference(whole, at_once) < TOLERANCE


def test_a_chunk_left_out_or_doubled_is_a_difference() -> None:
    chunks = chunks_of(1, 100, 64)
    whole = fold_chunks(fold_values, V1, empty_memory(0), chunks)
    for wrong in (chunks[:-1], [*chunks, chunks[5]]):
        other = fold_chunks(fold_values, V1, empty_memory(0), wrong)
        assert memory_difference(whole, other) > 100 * TOLERANCE


def test_folding_changes_nothing_that_it_was_given() -> None:
    before = empty_memory(0)
    fold_chunks(fold_values, V1, before, chunks_of(2, 3, 4))
    assert not before.state.any()
