"""Hypothesis strategies for users' events: small worlds in which collisions happen often."""

from hypothesis import strategies as st

from features.config import FORGET_CODE, StateConfig
from features.state import Accepted, Position

# Small streams, so that a few dozen events reach every branch of the state machine.
SMALL = StateConfig(recent=4, mid=6, chunk=3, dedup_window=5, session_gap_ms=10, session_max_ms=40)


@st.composite
def event_lists(draw: st.DrawFn, *, max_size: int = 60, forgets: bool = False) -> list[Accepted]:
    """Return one user's log: times mostly forward, some late, some repeated ids."""
    actions = list(range(len(SMALL.actions)))
    steps = draw(
        st.lists(
            st.tuples(
                st.integers(-60, 30),  # time step: negative is a late event
                st.integers(0, 12),  # event hash: few, so repeats are common
                st.integers(0, 5),
                st.sampled_from([*actions, FORGET_CODE] if forgets else actions),
                st.integers(-1, 100),
                st.integers(1, 3),  # offset step: logs have holes
            ),
            max_size=max_size,
        )
    )
    now_ms, offset, events = 1_000, -1, []
    for step_ms, event_hash, item_id, action, dwell_ms, hop in steps:
        offset += hop
        event_time_ms = max(0, now_ms + step_ms)
        now_ms = max(now_ms, event_time_ms)
        events.append(
            Accepted(
                Position(0, 2, offset),
                now_ms,
                item_id,
                event_time_ms,
                item_id % 2,
                event_hash,
                dwell_ms,
                float(item_id),
                action,
            )
        )
    return events
