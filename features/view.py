"""Features as a reader sees them: a function of (state, clock), equal online and offline.

An event at or after the clock is not seen. A session whose gap has passed by the clock is over.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.state import RECORD, UserSession, UserState

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig

Records = np.ndarray[tuple[int], np.dtype[np.void]]
# What fills the front of a padded stream: no item has a negative id.
PADDING_ITEM: Final = -1


class SessionView(NamedTuple):
    """The open session as of a clock, None-free: an ended or absent session is all zeros.

    `distinct_items` and `last_items` look at the session's events within the recent stream.
    """

    is_open: bool
    session_id: int
    start_ms: int
    last_ms: int
    num_events: int
    dwell_ms: int
    distinct_items: int
    action_counts: tuple[int, ...]
    last_items: tuple[int, ...]


class UserView(NamedTuple):
    """One user's features at a clock; streams oldest first."""

    ordinal: int
    newest_event_time_ms: int | None
    recent: Records
    mid: Records
    user_session: SessionView


def seen_clock_ms(now_ms: int, state: UserState) -> int:
    """Return the clock that sees every stored event: a click dated ahead still counts at once."""
    records = state.records
    return max(now_ms, int(records["event_time_ms"][-1]) + 1) if records.size else now_ms


def split_streams(records: Records, clock_ms: int, config: StateConfig) -> tuple[Records, Records]:
    """Return (recent, mid): the newest R events before the clock, and the M before those."""
    end = int(np.searchsorted(records["event_time_ms"], clock_ms, side="left"))
    recent_start = max(0, end - config.recent)
    return records[recent_start:end], records[max(0, recent_start - config.mid) : recent_start]


def view_session(
    current: UserSession | None, recent: Records, clock_ms: int, config: StateConfig
) -> SessionView:
    """Return the session at the clock; over once more than the gap has passed since its last."""
    if current is None or clock_ms - current.last_ms > config.session_gap_ms:
        return SessionView(
            is_open=False,
            session_id=0,
            start_ms=0,
            last_ms=0,
            num_events=0,
            dwell_ms=0,
            distinct_items=0,
            action_counts=(0,) * len(config.actions),
            last_items=(),
        )
    inside = recent["item_id"][recent["event_time_ms"] >= current.start_ms]
    return SessionView(
        is_open=True,
        session_id=current.session_id,
        start_ms=current.start_ms,
        last_ms=current.last_ms,
        num_events=current.num_events,
        dwell_ms=current.dwell_ms,
        distinct_items=int(np.unique(inside).size),
        action_counts=current.action_counts,
        last_items=tuple(int(item) for item in inside[::-1][:LAST_ITEMS]),
    )


# Newest items of the session carried as a feature of their own.
LAST_ITEMS: Final = 8


def view_user(state: UserState, clock_ms: int, config: StateConfig) -> UserView:
    """Return a user's features at the clock."""
    records = state.records
    recent, mid = split_streams(records, clock_ms, config)
    newest = int(recent["event_time_ms"][-1]) if recent.size else None
    return UserView(
        state.next_ordinal,
        newest,
        recent,
        mid,
        view_session(state.user_session, recent, clock_ms, config),
    )


class StreamBatch(NamedTuple):
    """Streams of B users, newest event last, padded at the front with PADDING_ITEM.

    Attributes:
        recent_BR: RECORDs [B, R].
        mid_BM: RECORDs [B, M].
        clock_ms_B: the clock each user was seen at, int64 [B].
        ordinal_B: events accepted so far, int64 [B]; 0 for an unknown user.
        newest_ms_B: time of the newest event seen, int64 [B]; -1 without one.
        memory_BLW: lifelong memories, float32 [B, LIFELONG_ROWS, LIFELONG_WIDTH], zeros for a user
            without one; None where no memory is read. `mid_BM` is then as wide as it has to be.
        memory_events_B: events in them, int64 [B].
    """

    recent_BR: np.ndarray[tuple[int, int], np.dtype[np.void]]
    mid_BM: np.ndarray[tuple[int, int], np.dtype[np.void]]
    clock_ms_B: np.ndarray[tuple[int], np.dtype[np.int64]]
    ordinal_B: np.ndarray[tuple[int], np.dtype[np.int64]]
    newest_ms_B: np.ndarray[tuple[int], np.dtype[np.int64]]
    memory_BLW: np.ndarray[tuple[int, int, int], np.dtype[np.float32]] | None = None
    memory_events_B: np.ndarray[tuple[int], np.dtype[np.int64]] | None = None

    def select(self, is_kept_B: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> StreamBatch:
        """Return the users of a mask."""
        return StreamBatch._make(None if each is None else each[is_kept_B] for each in self)


def batch_streams(states: Sequence[UserState], now_ms: int, config: StateConfig) -> StreamBatch:
    """Return the padded streams of a batch of users."""
    size = len(states)
    padding = np.zeros((), RECORD)
    padding["item_id"] = PADDING_ITEM
    batch = StreamBatch(
        np.full((size, config.recent), padding, RECORD),
        np.full((size, config.mid), padding, RECORD),
        np.full(size, now_ms, np.int64),
        np.fromiter((state.next_ordinal for state in states), np.int64, size),
        np.full(size, -1, np.int64),
    )
    for i, state in enumerate(states):
        batch.clock_ms_B[i] = seen_clock_ms(now_ms, state)
        recent, mid = split_streams(state.records, int(batch.clock_ms_B[i]), config)
        if recent.size:
            batch.recent_BR[i, -recent.size :] = recent
            batch.newest_ms_B[i] = recent["event_time_ms"][-1]
        if mid.size:
            batch.mid_BM[i, -mid.size :] = mid
    return batch
