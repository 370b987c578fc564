"""Users read as columns equal users read one by one, value by value."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import CorruptRowError
from features.row import TRAILER_BYTES, encode_row, is_short, newest_bytes
from features.state import EMPTY_STATE, RECORD_BYTES, step
from features.user_batch import TRAILER, UserBatch, decode_batch
from features.view import (
    LAST_ITEMS,
    PADDING_ITEM,
    SessionView,
    batch_streams,
    seen_clock_ms,
    view_user,
)
from tests.features.strategies import SMALL, event_lists

NUM_ACTIONS = len(SMALL.actions)
EVERYTHING = SMALL.recent + SMALL.mid


def session_of(batch: UserBatch, index: int) -> SessionView:
    sessions = batch.sessions()
    columns = [column[index].tolist() for column in sessions]
    last = tuple(item for item in columns.pop() if item != PADDING_ITEM)
    return SessionView(*columns[:7], tuple(columns[7]), last)


@given(st.lists(event_lists(), min_size=1, max_size=4), st.integers(0, 1_200), st.booleans())
def test_columns_equal_objects(logs: list, now_ms: int, whole: bool) -> None:  # noqa: FBT001
    states = [step(EMPTY_STATE, log, SMALL).state if log else None for log in logs]
    rows = [None if state is None else encode_row(state, NUM_ACTIONS) for state in states]
    if not whole:
        ends = [None if row is None else row[-newest_bytes(EVERYTHING) :] for row in rows]
        rows = [
            row if end is None or is_short(end, EVERYTHING) else end
            for row, end in zip(rows, ends, strict=True)
        ]
    users = list(range(len(rows)))
    batch = decode_batch(users, rows, newest=EVERYTHING, now_ms=now_ms, config=SMALL)
    known = [i for i, state in enumerate(states) if state is not None]
    expected = batch_streams([states[i] for i in known], now_ms, SMALL)
    for got, wanted in zip(batch.streams(), expected, strict=True):
        if got is None or wanted is None:
            assert got is wanted, "no memory is read here"
            continue
        if got.dtype.names is None:
            assert got[known].tolist() == wanted.tolist()
        for name in set(got.dtype.names or ()) - {"reserved"}:
            np.testing.assert_array_equal(got[name][known], wanted[name])
    assert batch.known_B.tolist() == [state is not None for state in states]
    for i in known:
        state = states[i]
        view = view_user(state, seen_clock_ms(now_ms, state), SMALL)
        assert session_of(batch, i)._asdict() == view.user_session._asdict()
        trailer = batch.trailers_B[i]
        position = state.position
        assert (trailer["partition"], trailer["offset"]) == (position.partition, position.offset)
        # A row with departed ids is read whole, and may hold more than was asked for.
        held = batch.state(i).tail
        assert state.tail.endswith(held)
        assert len(held) >= min(len(state.tail), EVERYTHING * RECORD_BYTES)
    for i in set(users) - set(known):
        assert set(batch.records_BN["item_id"][i].tolist()) == {PADDING_ITEM}
        assert not session_of(batch, i).is_open
        assert batch.state(i) is None


def test_the_columns_are_those_of_the_row() -> None:
    assert TRAILER.itemsize == TRAILER_BYTES
    assert (
        decode_batch([], [], newest=1, now_ms=0, config=SMALL).sessions()[-1].shape[1] == LAST_ITEMS
    )


@given(event_lists(max_size=30).filter(bool), st.data())
def test_a_damaged_row_names_its_user(log: list, data: st.DataObject) -> None:
    row = encode_row(step(EMPTY_STATE, log, SMALL).state, NUM_ACTIONS)
    at = data.draw(st.integers(1, TRAILER_BYTES))
    flipped = bytearray(row)
    flipped[-at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(CorruptRowError):
        decode_batch([7], [bytes(flipped)], newest=EVERYTHING, now_ms=0, config=SMALL)
    cut = row[data.draw(st.integers(1, len(row) - 1)) :]
    if len(cut) < min(len(row), newest_bytes(EVERYTHING)):
        with pytest.raises(CorruptRowError):
            decode_batch([7], [cut], newest=EVERYTHING, now_ms=0, config=SMALL)
