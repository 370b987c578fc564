"""Goal: which sessions are closed does not depend on when one looks, and each comes out once.

Random users, events late and repeated; sweeps at random moments between them. The union of what
the sweeps find is what a list of the whole history says.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.config import StateConfig
from features.state import EMPTY_STATE, RECORD, Accepted, Position, UserSession, step
from streams.closing import (
    FIRST,
    AppliedClock,
    Marker,
    close_current,
    close_replaced,
    decode_marker,
    encode_closed,
    encode_marker,
    is_over,
    replay_sessions,
)
from streams.errors import HistoryGoneError
from streams.sessions import _merged
from tests.nearline.traffic import all_sessions

RULES = StateConfig(
    recent=4, mid=4, chunk=3, dedup_window=8, session_gap_ms=100, session_max_ms=1_000
)


def make_events(source: random.Random, count: int) -> list[Accepted]:
    """Return a user's events: bursts, silences, late ones, repeats."""
    events: list[Accepted] = []
    time_ms = 10_000
    for number in range(count):
        time_ms += source.choice([0, 1, 50, 100, 101, 300])
        late_ms = source.choice([0, 0, 0, 0, 40, 150, 2_000])
        number_sent = number if source.random() > 0.1 else max(0, number - 2)
        events.append(
            Accepted(
                Position(0, 0, number),
                time_ms,
                number % 5,
                time_ms - late_ms,
                0,
                number_sent,
                source.choice([-1, 0, 7]),
                0.0,
                source.randrange(8),
            )
        )
    return events


def as_dict(session: UserSession) -> dict[str, object]:
    """Return a session as the oracle describes one."""
    counts = zip(RULES.actions, session.action_counts, strict=True)
    named = {action: count for action, count in counts if count}
    return {**session._asdict(), "action_counts": named}


@given(st.integers(0, 2**32), st.integers(1, 60))
def test_sweeps_at_any_moment_find_every_session_once(seed: int, count: int) -> None:
    source = random.Random(seed)
    events = make_events(source, count)
    state, chunks, marker = EMPTY_STATE, [], FIRST
    found: list[UserSession] = []
    for at, event in enumerate(events):
        change = step(state, [event], RULES)
        state = change.state
        chunks += [np.frombuffer(chunk.records, RECORD) for chunk in change.chunks]
        is_last = at == len(events) - 1
        current = state.user_session
        assert current is not None
        # No clock but at the end: a session closed by a clock may still grow, and is told once.
        clock_ms = 10**9 if is_last else None
        if not is_last and source.random() > 0.3:
            continue
        if marker.session_id == current.session_id:
            closing = close_current(marker, current, clock_ms, RULES)
        else:
            records = np.concatenate([*chunks, state.records])
            closing = close_replaced(marker, current, records, clock_ms, RULES)
        if closing is not None:
            found += closing.sessions
            marker = decode_marker(encode_marker(closing.marker))
    expected = all_sessions(events, RULES)
    assert {one.session_id: as_dict(one) for one in found} == expected
    assert len(found) == len(expected)
    assert close_current(marker, current, 10**9, RULES) is None


def test_a_session_closes_when_its_gap_has_passed_and_not_at_it() -> None:
    current = UserSession(3, 1_000, 2_000, 2, 0, (0,) * 8)
    assert not is_over(current, 2_100, RULES)
    assert is_over(current, 2_101, RULES)
    assert not is_over(current, None, RULES)
    assert close_current(Marker(3, is_published=False), current, 2_100, RULES) is None
    assert close_current(Marker(3, is_published=True), current, 9_999, RULES) is None
    closing = close_current(Marker(3, is_published=False), current, 2_101, RULES)
    assert closing == (Marker(3, is_published=True), (current,))


def test_a_published_session_that_grew_is_not_published_again() -> None:
    events = make_events(random.Random(1), 40)
    change = step(EMPTY_STATE, events, RULES)
    records = np.concatenate(
        [*(np.frombuffer(c.records, RECORD) for c in change.chunks), change.state.records]
    )
    every = replay_sessions(records, 0, RULES)
    marker = Marker(every[1].session_id, is_published=True)
    closing = close_replaced(marker, every[-1], records, None, RULES)
    assert [one.session_id for one in closing.sessions] == [s.session_id for s in every[2:-1]]
    assert closing.marker == Marker(every[-1].session_id, is_published=False)


def test_a_history_that_has_left_redis_is_an_error_and_no_guess() -> None:
    change = step(EMPTY_STATE, make_events(random.Random(2), 40), RULES)
    current = change.state.user_session
    assert current is not None
    assert change.chunks
    with pytest.raises(HistoryGoneError, match="ordinal 0 on"):
        close_replaced(FIRST, current, change.state.records, None, RULES)


def test_records_are_the_same_bytes_every_time() -> None:
    current = UserSession(3, 1_000, 2_000, 2, 40, (0, 1, 0, 0, 0, 0, 1, 0))
    record = encode_closed(current, generation=2, user_id=42, config=RULES)
    assert record == (
        b'{"generation":2,"user_id":42,"session_id":3,"start_ms":1000,"last_ms":2000,'
        b'"num_events":2,"dwell_ms":40,"action_counts":{"click":1,"purchase":1}}'
    )


def test_the_clock_is_that_of_what_is_applied() -> None:
    clock = AppliedClock()
    assert clock.at(0, [5]) == [None]
    clock.observe(1_000, {0: 10, 1: 0})
    clock.observe(2_000, {0: 10, 1: 4})
    clock.observe(3_000, {0: 30, 1: 4})
    assert clock.at(0, [-1, 9, 10, 29, 30, 99]) == [None, None, 2_000, 2_000, 3_000, 3_000]
    assert clock.at(1, [-1, 0, 3, 4]) == [None, 1_000, 1_000, 3_000]


@given(st.integers(0, 2**32), st.integers(1, 40), st.integers(0, 40))
def test_chunks_read_after_the_row_change_nothing(seed: int, count: int, later: int) -> None:
    events = make_events(random.Random(seed), count + later)
    before = step(EMPTY_STATE, events[:count], RULES).state
    after = step(EMPTY_STATE, events, RULES)
    chunks = [np.frombuffer(chunk.records, RECORD) for chunk in after.chunks]
    merged = _merged(before, np.concatenate([np.array([], RECORD), *chunks])).records
    assert merged is not None
    # What had left the tail by then is in the chunks; the rest is in the row.
    assert merged["ordinal"].tolist() == list(range(before.next_ordinal))
    found = replay_sessions(merged, 0, RULES)
    assert {one.session_id: as_dict(one) for one in found} == all_sessions(events[:count], RULES)
