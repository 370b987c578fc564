"""States written as the worker writes them, and what a reader must see of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from features.config import StateConfig
from features.redis import StateStore
from features.state import EMPTY_STATE, Accepted, Position, UserState
from features.view import seen_clock_ms, view_user
from tests.small import put_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

NOW_MS = 1_763_700_000_000
# Small, so that a hundred events fill every stream and send chunks away.
SMALL = StateConfig(recent=8, mid=20, chunk=6, dedup_window=16)
STREAM_COLUMNS = ("item_id", "event_time_ms", "action", "domain", "dwell_ms", "value")


def make_events(seed: int, *, count: int, end_ms: int, late_share: float = 0.0) -> list[Accepted]:
    """Return one user's log whose newest event is at `end_ms`; gaps of up to 4 minutes."""
    source = random.Random(seed)
    gaps = [source.randrange(1, 240_000) for _ in range(count - 1)]
    times = [end_ms - sum(gaps[i:]) for i in range(count)]
    for i in range(count - 1):
        if source.random() < late_share:
            times[i] -= 5_000_000
    return [
        Accepted(
            position=Position(0, 3, offset),
            append_time_ms=end_ms,
            item_id=source.choice([2**62, -5, 7, 8, 9]),
            event_time_ms=time_ms,
            domain=source.choice([0, 2**64 - 3, 17]),
            event_hash=source.getrandbits(64),
            dwell_ms=source.choice([-1, 1200]),
            value=source.choice([float("nan"), 0.5]),
            action=source.randrange(1, 8),
        )
        for offset, time_ms in enumerate(times)
    ]


def write_user(
    client: redis.Redis,
    user_id: int,
    events: Sequence[Accepted],
    *,
    generation: int = 1,
    config: StateConfig = SMALL,
) -> UserState:
    """Write the state that these events lead to, in several micro-batches; return it."""
    store = StateStore(client, generation, config)
    state = EMPTY_STATE
    for start in range(0, len(events), 10):
        state = put_states(store, {user_id: events[start : start + 10]})[user_id]
    return state


def expected_user(state: UserState, now_ms: int, config: StateConfig = SMALL) -> dict[str, Any]:
    """Return every feature of the three user views by its name."""
    view = view_user(state, seen_clock_ms(now_ms, state), config)
    session = view.user_session
    features: dict[str, Any] = {
        "session_is_open": session.is_open,
        "session_id": session.session_id,
        "session_start_ms": session.start_ms,
        "session_last_ms": session.last_ms,
        "session_num_events": session.num_events,
        "session_dwell_ms": session.dwell_ms,
        "session_distinct_items": session.distinct_items,
        "session_action_counts": list(session.action_counts),
        "session_last_items": list(session.last_items),
    }
    for prefix, records in (("recent", view.recent), ("mid", view.mid)):
        for name in STREAM_COLUMNS:
            values = records[name]
            signed = values.astype("<i8") if name == "domain" else values
            features[f"{prefix}_{name}"] = signed.tolist()
    return features
