"""Goal: the chunks worked out from the lake's columns are those that the state machine hands out.

And features as of the past, for a reader of a memory, are what such a reader saw then.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.as_of import features_at
from features.lifelong_cut import by_user, chunks_of, records_of
from features.lifelong_view import with_waiting
from features.state import EMPTY_STATE, RECORD, Accepted, Position, step
from features.view import seen_clock_ms, view_user
from tests.features.strategies import SMALL, event_lists

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.view import Records


def accepted(events: Sequence[Accepted]) -> list[Accepted]:
    """Return the events that count, each under an id of its own."""
    unique = list({event.event_hash: event for event in events}.values())
    return sorted(unique, key=lambda event: event.position.offset)


def numbered(events: Sequence[Accepted]) -> Records:
    """Return records by arrival, as the lake's columns give them."""
    records = np.zeros(len(events), RECORD)
    for name in ("item_id", "event_time_ms", "domain", "dwell_ms", "value", "action"):
        records[name] = [getattr(event, name) for event in events]
    records["ordinal"] = np.arange(len(events))
    return records


def log_of(steps: list[int]) -> list[Accepted]:
    """Return events of ids of their own, so that none is a repeat; below 0 is late."""
    return [
        Accepted(Position(0, 2, n), 10_000, n % 6, 5_000 + 9 * n + late, 0, n + 1, -1, 0.0, 1)
        for n, late in enumerate(steps)
    ]


# Some late, or all in order: the two are cut in different ways.
LOGS = st.one_of(
    st.lists(st.integers(-60, 30), max_size=90), st.lists(st.integers(0, 9), max_size=90)
).map(log_of)


@given(LOGS)
def test_the_chunks_are_those_of_the_state_machine(events: list[Accepted]) -> None:
    change = step(EMPTY_STATE, events, SMALL)
    found = chunks_of(numbered(events), SMALL)
    expected = [np.frombuffer(chunk.records, RECORD).copy() for chunk in change.chunks]
    for chunk in expected:
        chunk["event_hash"] = 0
    assert [chunk.tobytes() for chunk in found] == [chunk.tobytes() for chunk in expected]


def test_users_are_told_apart() -> None:
    columns = {
        "user_id": np.array([3, 3, 9]),
        "item_id": np.array([1, 2, 3]),
        "event_time_ms": np.array([10, 20, 30]),
        "ordinal": np.array([4, 5, 0]),
    }
    found = {user: records["ordinal"].tolist() for user, records in by_user(columns)}
    assert found == {3: [4, 5], 9: [0]}
    assert records_of(columns)["item_id"].tolist() == [1, 2, 3]


@given(LOGS, st.data())
def test_features_as_of_the_past_are_what_a_reader_of_the_memory_saw(
    events: list[Accepted], data: st.DataObject
) -> None:
    ordinal = data.draw(st.integers(0, len(events)))
    change = step(EMPTY_STATE, events[:ordinal], SMALL)
    state = change.state
    num_folded = data.draw(st.integers(0, state.num_chunks))
    clock_ms = seen_clock_ms(data.draw(st.integers(0, 10_000)), state)
    view = features_at(
        events, ordinal=ordinal, clock_ms=clock_ms, config=SMALL, num_folded=num_folded
    )
    online = view_user(state, clock_ms, SMALL)
    tail = state.records[: -len(online.recent)] if online.recent.size else state.records
    chunks = b"".join(chunk.records for chunk in change.chunks[num_folded:])
    assert view.recent.tobytes() == online.recent.tobytes()
    assert view.user_session == online.user_session
    waiting = np.frombuffer(chunks, RECORD)
    assert view.mid.tobytes() == with_waiting(waiting, tail).tobytes()
    folded = {
        int(o)
        for chunk in change.chunks[:num_folded]
        for o in np.frombuffer(chunk.records, RECORD)["ordinal"]
    }
    seen = [*view.recent["ordinal"].tolist(), *view.mid["ordinal"].tolist()]
    assert sorted([*seen, *folded]) == list(range(ordinal))


@given(event_lists(max_size=40), st.integers(0, 2_500))
def test_a_clock_in_the_past_leaves_events_out_of_mid(
    events: list[Accepted], clock_ms: int
) -> None:
    kept = accepted(events)
    view = features_at(kept, ordinal=len(kept), clock_ms=clock_ms, config=SMALL, num_folded=0)
    known = [n for n, event in enumerate(kept) if event.event_time_ms < clock_ms]
    seen = [*view.recent["ordinal"].tolist(), *view.mid["ordinal"].tolist()]
    assert sorted(seen) == known
