"""Law: the end of a row, however short, is read as what it is or says that records are missing.

Method: late events leave the tail at once and stay known by their ids, up to the whole duplicate
window of them; then fewer bytes are asked for than those ids take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from features.errors import CorruptRowError
from features.redis import StateStore
from features.row import DEPARTED_BYTES, TRAILER_BYTES, decode_newest, decode_row, encode_row
from features.state import EMPTY_STATE, Accepted, Position, UserState, step
from tests.small import SMALL, put_states

if TYPE_CHECKING:
    import redis

CONFIG = replace(SMALL, recent=2, mid=4, chunk=3, dedup_window=64)


def many_departed() -> tuple[UserState, list[Accepted]]:
    """Return a user whose later events are all older than those in the tail."""
    times = [10_000 + i for i in range(8)] + [5_000 - i for i in range(60)]
    events = [
        Accepted(Position(0, 0, offset), 20_000, offset, time_ms, 0, offset + 1, -1, 0.0, 1)
        for offset, time_ms in enumerate(times)
    ]
    return step(EMPTY_STATE, events, CONFIG).state, events


def test_every_end_of_a_row_is_read_or_says_what_is_missing() -> None:
    state, _ = many_departed()
    assert len(state.departed) * DEPARTED_BYTES > CONFIG.tail_max * 48
    row = encode_row(state, len(CONFIG.actions))
    for size in range(TRAILER_BYTES, len(row) + 1):
        read, num_missing = decode_newest(row[-size:])
        assert read.position == state.position
        assert read.user_session == state.user_session
        assert read.records.size + num_missing == state.records.size
        assert state.tail.endswith(read.tail)


def test_a_row_cut_among_its_departed_ids_is_no_whole_row() -> None:
    state, _ = many_departed()
    row = encode_row(state, len(CONFIG.actions))
    with pytest.raises(CorruptRowError):
        decode_row(row[-TRAILER_BYTES - 10 :])


@pytest.mark.servers
@pytest.mark.parametrize("newest", [1, 2, 6])
def test_readers_get_the_records_they_ask_for(
    redis_client: redis.Redis, generation: int, newest: int
) -> None:
    state, events = many_departed()
    store = StateStore(redis_client, generation, CONFIG)
    put_states(store, {5: events})
    (read,) = store.read_states([5], newest=newest)
    assert read is not None
    assert read.records[-newest:].tobytes() == state.records[-newest:].tobytes()
