"""Features as a function of (user, ordinal, clock), from the lake: what the parity law compares.

The events up to an ordinal, those at or after the clock left out, give the streams and the session
that online reading gives at that ordinal and clock; for a reader of a memory, also the number of
chunks in it. `step` and `view_user` are the online ones; the
only thing done here is to hand them the right events.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec
import numpy as np

from features.errors import NoSuchOrdinalError
from features.lake import judged_columns, number_one, read_events
from features.state import EMPTY_STATE, RECORD, Accepted, Position, UserState, step
from features.view import view_user

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence
    from pathlib import Path

    import pyarrow as pa

    from features.config import StateConfig
    from features.lake import LakeFile
    from features.view import Records, UserView

# In the order of features.state.Accepted, its position apart.
_EVENT_COLUMNS: Final = (
    "append_time_ms",
    "item_id",
    "event_time_ms",
    "domain",
    "event_hash",
    "dwell_ms",
    "value",
    "action",
)


def features_at(
    events: Sequence[Accepted],
    *,
    ordinal: int,
    clock_ms: int,
    config: StateConfig,
    num_folded: int | None = None,
) -> UserView:
    """Return a user's features after the first `ordinal` accepted events, seen at the clock.

    Args:
        events: the user's accepted events by arrival; the place in it is the ordinal. Of a user
            who was forgotten, the forget and those after it: see `read_user_logs`.
        ordinal: how many of them are known.
        clock_ms: events dated at or after it are not seen.
        config: the generation's rules.
        num_folded: chunks in the memory that is read beside: the mid-term stream is then all but
            these and the recent one. None: no memory is read, it is the newest M.

    Raises:
        NoSuchOrdinalError: there are fewer events than that, or they were forgotten.
    """
    return Timeline(events, config).at(ordinal, clock_ms, num_folded)


@dataclass
class Timeline:
    """One user's events, walked through once when the ordinals asked for do not go back."""

    events: Sequence[Accepted]
    config: StateConfig
    _state: UserState = EMPTY_STATE
    _chunks: list[bytes] = field(default_factory=list)

    @property
    def num_forgets(self) -> int:
        """How many of the events are none: 1 if the user was forgotten."""
        return int(bool(self.events) and self.events[0].is_forget)

    @property
    def first(self) -> int:
        """The ordinal of the first event: how many were forgotten."""
        return self.events[0].item_id if self.num_forgets else 0

    @property
    def end(self) -> int:
        """The ordinal after the last event's."""
        return self.first + len(self.events) - self.num_forgets

    def position(self, ordinal: int) -> Position | None:
        """Return where the last event before an ordinal stood; None if there is none."""
        if not self.first <= ordinal <= self.end or ordinal + self.num_forgets == 0:
            return None
        return self.events[self._at(ordinal) - 1].position

    def _at(self, ordinal: int) -> int:
        return ordinal - self.first + self.num_forgets

    def _event(self, ordinal: int) -> Accepted:
        return self.events[self._at(ordinal)]

    def at(self, ordinal: int, clock_ms: int, num_folded: int | None = None) -> UserView:
        """Return the features at an ordinal and clock; see `features_at`."""
        state = self._state_at(ordinal)
        records = state.records
        if records.size and records["event_time_ms"][-1] >= clock_ms:
            view = self._without_later(ordinal, clock_ms)
        else:
            view = view_user(state, clock_ms, self.config)
        if num_folded is None:
            return view
        return view._replace(mid=self._not_folded(state, clock_ms, num_folded, view.recent))

    def _not_folded(
        self, state: UserState, clock_ms: int, num_folded: int, recent: Records
    ) -> Records:
        """Return what is neither in the memory nor recent, in the order of streams."""
        chunks = self._chunks[num_folded : state.num_chunks]
        held = np.frombuffer(b"".join([*chunks, state.tail]), RECORD)
        held = held[held["event_time_ms"] < clock_ms]
        held = held[~np.isin(held["ordinal"], recent["ordinal"])]
        return held[np.lexsort((held["ordinal"], held["event_time_ms"]))]

    def _state_at(self, ordinal: int) -> UserState:
        if not self.first <= ordinal <= self.end:
            raise NoSuchOrdinalError(
                f"ordinal {ordinal} asked for, the log has the user's accepted events from "
                f"{self.first} to {self.end}: earlier ones were forgotten, for later ones let the "
                "lake sink catch up (`moveline lake --until-end`)."
            )
        if ordinal < self._state.next_ordinal:
            self._state, self._chunks = EMPTY_STATE, []
        known = 0 if self._state is EMPTY_STATE else self._at(self._state.next_ordinal)
        more = self.events[known : self._at(ordinal)]
        change = step(self._state, more, self.config)
        self._state = change.state
        self._chunks += [chunk.records for chunk in change.chunks]
        assert self._state.next_ordinal == ordinal, "the events given were not all accepted"
        return self._state

    def _without_later(self, ordinal: int, clock_ms: int) -> UserView:
        """Return the features when some of the events known are dated at or after the clock."""
        known = range(self.first, ordinal)
        seen = [i for i in known if self._event(i).event_time_ms < clock_ms]
        # Numbered as hashes of their own: that two were no repeats is decided already, and with
        # some left out the duplicate window would reach too far.
        kept = [msgspec.structs.replace(self._event(i), event_hash=i) for i in seen]
        state = step(EMPTY_STATE, kept, self.config).state
        view = view_user(state, clock_ms, self.config)
        session = view.user_session
        if session.is_open:
            session = session._replace(session_id=seen[session.session_id])
        return view._replace(
            ordinal=ordinal,
            recent=self._renumbered(view.recent),
            mid=self._renumbered(view.mid),
            user_session=session,
        )

    def _renumbered(self, records: Records) -> Records:
        """Return the records under their own ordinals and hashes."""
        ordinals = records["event_hash"].astype(np.int64)
        named = records.copy()
        named["ordinal"] = ordinals
        named["event_hash"] = [self._event(i).event_hash for i in ordinals.tolist()]
        return named


def read_user_logs(
    root: Path,
    topics: Sequence[str],
    users: Collection[int],
    config: StateConfig,
    *,
    advance: Callable[[LakeFile], None] | None = None,
) -> dict[int, list[Accepted]]:
    """Return the accepted events of some users from the lake, by arrival; none for the unknown.

    Of a user who was forgotten, the last forget comes first, its `item_id` the ordinal of the
    event after it.
    One file at a time is in memory, beside the events of the users asked for.

    Args:
        root: the lake's folder.
        topics: the topics of events, oldest first: the place of one is its `source`.
        users: whose.
        config: the rules that judge.
        advance: called after each file.

    Raises:
        LakeError: no lake, a hole, or an unreadable file.
    """
    wanted = np.unique(np.fromiter(users, np.int64, len(users)))
    logs: dict[int, list[Accepted]] = defaultdict(list)
    for source, topic in enumerate(topics):
        for file, table in read_events(root, topic):
            mine = table.filter(np.isin(table["user_id"].to_numpy(), wanted))
            for user, event in _accepted(mine, (source, file.partition), config):
                logs[user].append(event)
            if advance is not None:
                advance(file)
    return {user: _without_repeats(events, config) for user, events in logs.items()}


def _accepted(
    table: pa.Table, place: tuple[int, int], config: StateConfig
) -> list[tuple[int, Accepted]]:
    """Return (user, event) of the rows that the rules take, in offset order."""
    columns, keep = judged_columns(table, config)
    columns |= {name: table[name].to_numpy()[keep] for name in ("offset", "append_time_ms")}
    values: list[list[Any]] = [columns[name].tolist() for name in _EVENT_COLUMNS]
    rows = zip(*values, strict=True)
    places = zip(columns["user_id"].tolist(), columns["offset"].tolist(), rows, strict=True)
    return [(user, Accepted(Position(*place, offset), *row)) for user, offset, row in places]


def _without_repeats(events: list[Accepted], config: StateConfig) -> list[Accepted]:
    """Return the events that count, after the last forget if there is one."""
    columns = {
        name: np.array([getattr(event, name) for event in events])
        for name in ("event_hash", "action", "item_id")
    }
    keep, ordinals = number_one(columns, config.dedup_window)
    kept = [event for event, is_kept in zip(events, keep, strict=True) if is_kept]
    forgets = [i for i, event in enumerate(events) if event.is_forget]
    if not forgets:
        return kept
    last = events[forgets[-1]]
    going_on = max(ordinals[forgets[-1]], last.item_id)
    return [msgspec.structs.replace(last, item_id=going_on), *kept]
