"""The user session at each label, from users' events in columns.

The session is that of the known events in their order of arrival. Almost all labels know a stretch
of rows in which nothing came late: there sessions are runs of rows, found for all at once. For the
others the known events go through the real step.

Legend: N events, G labels, A actions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from features.state import EMPTY_STATE, Accepted, Position, UserSession, step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig
    from features.history import Bools, History, Int64s, LabelGroups


@dataclass(frozen=True, slots=True)
class Sessions:
    """The rolling session at each label, whether its gap has passed or not.

    `exists_G` is False where nothing is known of the user; the rest is 0 there.
    """

    exists_G: Bools
    session_id_G: Int64s
    start_ms_G: Int64s
    last_ms_G: Int64s
    num_events_G: Int64s
    dwell_ms_G: Int64s
    action_counts_GA: Int64s

    def put(self, place: int, session: UserSession | None) -> None:
        """Write one label's session over what stands there."""
        self.exists_G[place] = session is not None
        found = session or UserSession(0, 0, 0, 0, 0, (0,) * self.action_counts_GA.shape[1])
        self.session_id_G[place] = found.session_id
        self.start_ms_G[place] = found.start_ms
        self.last_ms_G[place] = found.last_ms
        self.num_events_G[place] = found.num_events
        self.dwell_ms_G[place] = found.dwell_ms
        self.action_counts_GA[place] = found.action_counts


class SessionHistory:
    """Answers for any labels of a history; what all of them share is computed once."""

    def __init__(self, log: History, config: StateConfig) -> None:
        self._log = log
        self._config = config
        self._start_N = _session_starts(log, config)
        self._dwell = _sums(np.maximum(log.dwell_ms_N, 0))
        num_actions = len(config.actions)
        self._counts = [_sums(log.action_N == action) for action in range(num_actions)]
        self._first_late_U = _first_late_rows(log)

    def at(self, labels: LabelGroups) -> Sessions:
        """Return the sessions at those labels."""
        sessions = self._runs(labels)
        in_order = (labels.num_late_G == 0) & (
            labels.first_row_G <= self._first_late_U[labels.user_G]
        )
        slow = np.flatnonzero(~in_order)
        for user in np.unique(labels.user_G[slow]):
            replay = _Replay(self._log, int(user), self._config)
            for place in slow[labels.user_G[slow] == user]:
                ordinal, time_ms = labels.first_ordinal_G[place], labels.time_ms_G[place]
                sessions.put(int(place), replay.at(int(ordinal), int(time_ms)))
        return sessions

    def _runs(self, labels: LabelGroups) -> Sessions:
        """Return the sessions as if every row before a label were known and in order."""
        log, end = self._log, labels.first_row_G
        exists = end > log.offsets[labels.user_G]
        last = np.where(exists, end - 1, 0)
        start = self._start_N[last]
        sums = [total[last + 1] - total[start] for total in (self._dwell, *self._counts)]
        return Sessions(
            exists_G=exists,
            session_id_G=np.where(exists, log.ordinal_N[start], 0),
            start_ms_G=np.where(exists, log.event_time_ms_N[start], 0),
            last_ms_G=np.where(exists, log.event_time_ms_N[last], 0),
            num_events_G=np.where(exists, last + 1 - start, 0),
            dwell_ms_G=np.where(exists, sums[0], 0),
            action_counts_GA=np.where(exists[:, None], np.stack(sums[1:], axis=1), 0),
        )


def _sums(column: Int64s | Bools) -> Int64s:
    """Return the sums before each row, and of all."""
    return np.concatenate(([0], np.cumsum(column, dtype=np.int64)))


def _session_starts(log: History, config: StateConfig) -> Int64s:
    """Return the first row of each row's session, were every event to arrive in row order."""
    time_ms = log.event_time_ms_N
    opens = np.diff(log.user_N, prepend=-1) != 0
    opens[1:] |= np.diff(time_ms) > config.session_gap_ms
    first = np.flatnonzero(opens)
    last = np.append(first[1:], len(time_ms)) - 1
    # Only runs without a gap that last longer than a session may: they are few.
    for run in np.flatnonzero(time_ms[last] - time_ms[first] > config.session_max_ms):
        row, end = int(first[run]), int(last[run]) + 1
        while True:
            limit = time_ms[row] + config.session_max_ms
            row += int(np.searchsorted(time_ms[row:end], limit, side="right"))
            if row >= end:
                break
            opens[row] = True
    starts = np.where(opens, np.arange(len(time_ms)), 0)
    found: Int64s = np.maximum.accumulate(starts)
    return found


def _first_late_rows(log: History) -> Int64s:
    """Return each user's first row that arrived before a row that precedes it; N without one."""
    span = int(log.ordinal_N.max()) + 1
    shifted = log.ordinal_N + log.user_N * span
    late = np.flatnonzero(shifted < np.maximum.accumulate(shifted))
    first = np.full(len(log.user_ids_U), log.num_events, np.int64)
    np.minimum.at(first, log.user_N[late], late)
    return first


class _Replay:
    """One user's events through the real step, in order of arrival."""

    def __init__(self, log: History, user: int, config: StateConfig) -> None:
        begin, end = log.offsets[user], log.offsets[user + 1]
        order = begin + np.argsort(log.ordinal_N[begin:end])
        self._ordinals = log.ordinal_N[order]
        # Repeats are out already: each event gets an id of its own.
        self._events = [
            Accepted(Position(0, 0, n), 0, 0, time_ms, 0, n, dwell_ms, 0.0, action)
            for n, (time_ms, dwell_ms, action) in enumerate(
                zip(
                    log.event_time_ms_N[order].tolist(),
                    log.dwell_ms_N[order].tolist(),
                    log.action_N[order].tolist(),
                    strict=True,
                )
            )
        ]
        self._newest_ms = np.maximum.accumulate(log.event_time_ms_N[order])
        self._config = replace(config, dedup_window=1)
        self._after: list[UserSession | None] = [None]

    def at(self, ordinal: int, time_ms: int) -> UserSession | None:
        """Return the session of what arrived before the ordinal and is dated before the time."""
        num_arrived = int(np.searchsorted(self._ordinals, ordinal))
        if num_arrived and self._newest_ms[num_arrived - 1] >= time_ms:
            known = [one for one in self._events[:num_arrived] if one.event_time_ms < time_ms]
            return self._named(step(EMPTY_STATE, known, self._config).state.user_session, known)
        if len(self._after) == 1:
            self._replay_all()
        return self._after[num_arrived]

    def _replay_all(self) -> None:
        state = EMPTY_STATE
        for event in self._events:
            state = step(state, (event,), self._config).state
            self._after.append(self._named(state.user_session, self._events))

    def _named(
        self, session: UserSession | None, stepped: Sequence[Accepted]
    ) -> UserSession | None:
        """Return the session by the ordinal of its first event: the step counted from 0."""
        if session is None:
            return None
        first = stepped[session.session_id].event_hash
        return session._replace(session_id=int(self._ordinals[first]))
