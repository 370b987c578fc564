"""States written as the worker writes them, for tests that only read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from features.state import Accepted, Position, UserState
from tests.small import put_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.redis import StateStore

NOW_MS = 1_763_700_000_000


def make_event(offset: int, *, item_id: int, partition: int = 0) -> Accepted:
    """Return a click on an item, one second after the click before it."""
    time_ms = NOW_MS + 1_000 * offset
    return Accepted(
        Position(0, partition, offset), time_ms, item_id, time_ms, 0, offset + 1, -1, 0.0, 1
    )


def write_user(store: StateStore, user_id: int, events: Sequence[Accepted]) -> UserState:
    """Continue a user's row by these events; return the state it holds now."""
    return put_states(store, {user_id: events})[user_id]


def write_clicks(store: StateStore, user_id: int, item_ids: Sequence[int]) -> UserState:
    """Write a user who clicked on these items, the last one last."""
    events = [make_event(offset, item_id=item) for offset, item in enumerate(item_ids)]
    return write_user(store, user_id, events)
