"""Laws of the state machine: equal to the oracle, whatever the micro-batches; input untouched."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.oracle import oracle_state
from features.row import (
    DEPARTED_BYTES,
    TRAILER_BYTES,
    decode_newest,
    decode_row,
    encode_row,
    encode_write,
    newest_bytes,
)
from features.state import (
    EMPTY_POSITION,
    EMPTY_STATE,
    RECORD_BYTES,
    Accepted,
    Chunk,
    PartitionMovedError,
    Position,
    UserState,
    rebuild_window,
    step,
)
from tests.features.strategies import SMALL, event_lists

NUM_ACTIONS = len(SMALL.actions)


def run(batches: list[list[Accepted]]) -> tuple[UserState, list[Chunk]]:
    state, chunks = EMPTY_STATE, []
    for batch in batches:
        change = step(state, batch, SMALL)
        chunks = [*([] if change.forgets else chunks), *change.chunks]
        state = change.state
    return state, chunks


def cuts(events: list[Accepted], points: list[int]) -> list[list[Accepted]]:
    edges = sorted({0, len(events), *(p % (len(events) + 1) for p in points)})
    return [events[a:b] for a, b in itertools.pairwise(edges)]


@given(event_lists(forgets=True))
def test_step_equals_the_oracle(events: list[Accepted]) -> None:
    state, chunks = run([events])
    oracle = oracle_state(events, SMALL)
    assert [(r["ordinal"], r["event_time_ms"]) for r in state.records] == [
        (n.ordinal, n.event.event_time_ms) for n in oracle.tail
    ]
    assert [len(c.records) // RECORD_BYTES for c in chunks] == [len(c) for c in oracle.chunks]
    assert state.num_chunks == len(oracle.chunks)
    assert state.num_late == oracle.num_late
    assert state.next_ordinal == oracle.next_ordinal
    assert state.position == (oracle.position or EMPTY_POSITION)
    session = state.user_session
    assert (session and session._asdict()) == oracle.session


@given(event_lists(forgets=True), st.lists(st.integers(0, 100), max_size=8))
def test_micro_batches_do_not_change_a_byte(events: list[Accepted], points: list[int]) -> None:
    whole, whole_chunks = run([events])
    cut, cut_chunks = run(cuts(events, points))
    assert encode_row(whole, NUM_ACTIONS) == encode_row(cut, NUM_ACTIONS)
    assert whole == cut
    assert whole_chunks == cut_chunks


@given(event_lists(forgets=True), st.integers(0, 100), st.integers(0, 100))
def test_a_redelivered_stretch_changes_nothing(
    events: list[Accepted], start: int, length: int
) -> None:
    state, _ = run([events])
    again = step(state, events[start : start + length], SMALL)
    assert again.state is state
    assert again.num_applied == 0


@given(event_lists(forgets=True), st.integers(0, 60))
def test_a_row_restored_from_bytes_continues_alike(events: list[Accepted], point: int) -> None:
    before, _ = run([events[:point]])
    if before is EMPTY_STATE:
        return
    restored = rebuild_window(decode_row(encode_row(before, NUM_ACTIONS)), SMALL.dedup_window)
    assert restored == before
    assert step(restored, events[point:], SMALL) == step(before, events[point:], SMALL)


@given(event_lists(forgets=True), st.lists(st.integers(0, 100), max_size=6))
def test_applying_the_small_writes_gives_the_whole_row(
    events: list[Accepted], points: list[int]
) -> None:
    state, row = EMPTY_STATE, b""
    for batch in cuts(events, points):
        change = step(state, batch, SMALL)
        if change.num_applied:
            write = encode_write(state, change, NUM_ACTIONS)
            row = write.data if write.keep < 0 else row[: write.keep] + write.data
            state = change.state
            assert row == encode_row(state, NUM_ACTIONS)


@given(event_lists(forgets=True), st.integers(0, 20))
def test_the_end_of_a_row_holds_the_newest_records(events: list[Accepted], newest: int) -> None:
    state, _ = run([events])
    if state is EMPTY_STATE:
        return
    row = encode_row(state, NUM_ACTIONS)
    part, missing = decode_newest(row[-newest_bytes(newest) :])
    assert state.tail.endswith(part.tail)
    assert part.user_session == state.user_session
    held = len(part.tail) // RECORD_BYTES
    short = -(-len(state.departed) * DEPARTED_BYTES // RECORD_BYTES)
    assert held >= min(newest, len(state.tail) // RECORD_BYTES) - short
    assert missing == len(state.tail) // RECORD_BYTES - held


def test_an_event_from_another_partition_is_refused() -> None:
    event = Accepted(Position(0, 1, 5), 0, 1, 1, 0, 9, -1, 0.0, 1)
    state = step(EMPTY_STATE, [event], SMALL).state
    with pytest.raises(PartitionMovedError, match=r"partition 1.*partition 3"):
        step(state, [msgspec.structs.replace(event, position=Position(0, 3, 9))], SMALL)


@pytest.mark.parametrize("at", [-1, -5, -30, -(TRAILER_BYTES - 1)])
def test_a_flipped_byte_in_the_trailer_is_noticed(at: int) -> None:
    event = Accepted(Position(0, 1, 5), 0, 1, 1, 0, 9, -1, 0.0, 1)
    row = bytearray(encode_row(step(EMPTY_STATE, [event], SMALL).state, NUM_ACTIONS))
    row[at] ^= 0xFF
    with pytest.raises(Exception, match=r"magic|checksum|fit"):
        decode_row(bytes(row))


class TestSessionEdges:
    """The gap and the maximum are inclusive."""

    @staticmethod
    def sessions_of(*times_ms: int) -> tuple[int, int, int]:
        events = [
            Accepted(Position(0, 0, i), 0, 1, t, 0, 100 + i, -1, 0.0, 1)
            for i, t in enumerate(times_ms)
        ]
        state = step(EMPTY_STATE, events, SMALL).state
        assert state.user_session is not None
        return state.user_session.session_id, state.user_session.num_events, state.num_late

    def test_exactly_the_gap_belongs(self) -> None:
        assert self.sessions_of(100, 110) == (0, 2, 0)

    def test_one_more_opens_a_new_one(self) -> None:
        assert self.sessions_of(100, 111) == (1, 1, 0)

    def test_late_within_the_gap_extends(self) -> None:
        assert self.sessions_of(100, 90) == (0, 2, 0)

    def test_older_is_late(self) -> None:
        assert self.sessions_of(100, 89) == (0, 1, 1)

    def test_past_the_maximum_opens_a_new_one(self) -> None:
        assert self.sessions_of(100, 110, 120, 130, 140, 141) == (5, 1, 0)

    def test_late_past_the_maximum_is_late(self) -> None:
        assert self.sessions_of(100, 110, 120, 130, 140, 99) == (0, 5, 1)
