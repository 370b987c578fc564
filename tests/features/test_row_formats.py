"""Two row formats side by side: either reads the other's rows, a third is refused by name."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import CorruptRowError, UnknownRowFormatError
from features.row import (
    FORMATS,
    MAGIC,
    POSITION_BYTES,
    POSITION_FROM_END,
    ROW_FORMAT,
    as_foreign,
    decode_newest,
    decode_row,
    encode_position,
    format_of,
    newest_bytes,
)
from features.state import EMPTY_STATE, Accepted, Position, UserState, rebuild_window, step
from tests.features.strategies import SMALL, event_lists
from tests.second_format import BOTH, NUMBER
from tests.sim.store import get_range, patched

NUM_ACTIONS = len(SMALL.actions)
# Who writes a batch, in which format, and whether the state is in its memory or read from the row.
TURNS = st.lists(
    st.tuples(st.integers(1, 12), st.sampled_from([ROW_FORMAT, NUMBER]), st.booleans()),
    min_size=1,
    max_size=12,
)


def said(state: UserState) -> list[object]:
    """Return what a state says, whatever its row is written in."""
    return [getattr(state, name) for name in state.__struct_fields__]


@given(event_lists(), TURNS)
def test_writers_of_both_formats_take_turns(
    events: list[Accepted], turns: list[tuple[int, int, bool]]
) -> None:
    """Each write is applied to the bytes that are there, as Redis does it."""
    row, cached, last = b"", EMPTY_STATE, 0
    waiting = iter(events)
    for count, number, is_cached in itertools.chain(turns, itertools.cycle(turns)):
        batch = list(itertools.islice(waiting, count))
        if not batch:
            break
        before = cached
        if row and not (is_cached and last == number):
            before = rebuild_window(decode_row(row, BOTH), SMALL.dedup_window)
            if format_of(row, BOTH).number != number:
                before = as_foreign(before)
        change = step(before, batch, SMALL)
        write = BOTH[number].encode_write(before, change, NUM_ACTIONS)
        assert get_range(row, -POSITION_FROM_END, POSITION_BYTES) == write.expected
        row, cached, last = patched(row, write), change.state, number
        assert format_of(row, BOTH).number == number
        assert len(row) == BOTH[number].size_of(change.state)
    state = step(EMPTY_STATE, events, SMALL).state
    if row:
        assert said(rebuild_window(decode_row(row, BOTH), SMALL.dedup_window)) == said(state)
        assert encode_position(state.position) in row


@given(event_lists(), st.integers(0, 20))
def test_the_end_of_either_row_holds_the_same_events(events: list[Accepted], newest: int) -> None:
    change = step(EMPTY_STATE, events, SMALL)
    if change.state is EMPTY_STATE or change.state.departed:
        return
    ends = [
        BOTH[number].encode_write(EMPTY_STATE, change, NUM_ACTIONS).data[-newest_bytes(newest) :]
        for number in (ROW_FORMAT, NUMBER)
    ]
    first, second = (decode_newest(end, BOTH) for end in ends)
    assert said(first[0]) == said(second[0])
    assert first[1] == second[1]


def test_a_row_of_a_newer_build_is_refused_by_name() -> None:
    event = Accepted(Position(0, 1, 2), 5, 6, 7, 0, 9, -1, 0.0, 1)
    row = BOTH[NUMBER].encode_write(EMPTY_STATE, step(EMPTY_STATE, [event], SMALL), 8).data
    assert decode_row(row, BOTH).position.offset == 2
    for read in (decode_row, decode_newest):
        with pytest.raises(UnknownRowFormatError, match=r"format 2, this build knows 1: nothing"):
            read(row)
    # Who copes with a damaged row copes with this.
    assert issubclass(UnknownRowFormatError, CorruptRowError)
    with pytest.raises(CorruptRowError, match="magic"):
        decode_row(row[:-1])
    assert row.endswith(MAGIC)
    assert set(FORMATS) == {ROW_FORMAT}
