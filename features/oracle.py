"""The obvious implementation of a user's state: a list of events, no batches, no bytes.

Tests and audits compare `features.state` with it. It is written to be read, not to be fast: each
question is answered from the whole list again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from features.config import StateConfig
    from features.state import Accepted, Position


class Numbered(NamedTuple):
    """An accepted event and its ordinal."""

    ordinal: int
    event: Accepted


class OracleState(NamedTuple):
    """What a user's state should say; `accepted` leaves out what was forgotten."""

    next_ordinal: int
    position: Position | None
    accepted: list[Numbered]
    tail: list[Numbered]
    chunks: list[list[Numbered]]
    num_late: int
    session: dict[str, object] | None


def accept(events: Iterable[Accepted], config: StateConfig) -> list[Numbered]:
    """Return the events that count, numbered: not repeats within the window, not the forgotten."""
    return _accept(events, config)[0]


def _accept(
    events: Iterable[Accepted], config: StateConfig
) -> tuple[list[Numbered], int, Position | None]:
    accepted: list[Numbered] = []
    next_ordinal, position = 0, None
    for event in events:
        recent_ids = [n.event.event_hash for n in accepted[-config.dedup_window :]]
        if event.is_forget:
            accepted = []
            next_ordinal, position = max(next_ordinal, event.item_id), event.position
        elif event.event_hash not in recent_ids:
            accepted.append(Numbered(next_ordinal, event))
            next_ordinal, position = next_ordinal + 1, event.position
    return accepted, next_ordinal, position


def cut(
    accepted: list[Numbered], config: StateConfig
) -> tuple[list[Numbered], list[list[Numbered]]]:
    """Return (tail, chunks) after the events arrived one by one."""
    tail: list[Numbered] = []
    chunks: list[list[Numbered]] = []
    for numbered in accepted:
        tail = sorted([*tail, numbered], key=lambda n: (n.event.event_time_ms, n.ordinal))
        if len(tail) == config.recent + config.mid + config.chunk:
            chunks.append(tail[: config.chunk])
            tail = tail[config.chunk :]
    return tail, chunks


def sessions(accepted: list[Numbered], config: StateConfig) -> tuple[dict[str, object] | None, int]:
    """Return (the rolling session, number of late events)."""
    members: list[Numbered] = []
    num_late = 0
    for numbered in accepted:
        time_ms = numbered.event.event_time_ms
        times = [n.event.event_time_ms for n in members]
        if not members or time_ms > max(times) + config.session_gap_ms:
            members = [numbered]
        elif time_ms < min(times) - config.session_gap_ms:
            num_late += 1
        elif max([*times, time_ms]) - min([*times, time_ms]) <= config.session_max_ms:
            members.append(numbered)
        elif time_ms > max(times):
            members = [numbered]
        else:
            num_late += 1
    if not members:
        return None, num_late
    times = [n.event.event_time_ms for n in members]
    return {
        "session_id": members[0].ordinal,
        "start_ms": min(times),
        "last_ms": max(times),
        "num_events": len(members),
        "dwell_ms": sum(max(0, n.event.dwell_ms) for n in members),
        "action_counts": tuple(
            sum(n.event.action == code for n in members) for code in range(len(config.actions))
        ),
    }, num_late


def oracle_state(events: Iterable[Accepted], config: StateConfig) -> OracleState:
    """Return the state after a user's valid events, in log order, from nothing."""
    accepted, next_ordinal, position = _accept(events, config)
    tail, chunks = cut(accepted, config)
    session, num_late = sessions(accepted, config)
    return OracleState(next_ordinal, position, accepted, tail, chunks, num_late, session)
