"""What producers send, and what everything must look like after any part of it.

The generator knows which of its records are events; the decoder under test has no say in that.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.config import FORGET_ACTION, StateConfig
from features.events import Event, domain_hash, encode_event, event_hash
from features.keys import bucket_of
from features.oracle import oracle_state
from features.row import encode_row
from features.state import EMPTY_STATE, NO_DWELL, NO_VALUE, RECORD, Accepted, Position, step
from tests.sim.store import NUM_BUCKETS

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

# Eight records fill a tail: a user of twenty events has seen every branch.
CONFIG: Final = StateConfig(
    recent=3,
    mid=3,
    chunk=2,
    dedup_window=4,
    session_gap_ms=4_000,
    session_max_ms=12_000,
    actions=("impression", "click", "view", "purchase"),
    stream_actions=("click", "view", "purchase"),
    future_tolerance_ms=300_000,
)
NUM_ACTIONS: Final = len(CONFIG.actions)
_CODES: Final = CONFIG.codes
_FORGET_SHARE: Final = 0.01
# Times fall on a grid that divides the session gap, so that "exactly at the gap" happens.
_GRID_MS: Final = 1_000
_DOMAINS: Final = (None, None, "home", "search", "brot & käse")
# The users of the few buckets there are.
_USERS: Final = [user for user in range(1, 20_000) if bucket_of(user) < NUM_BUCKETS]


class Sent(NamedTuple):
    """A record; `event` is None when it is none, `is_storable` says whether the lake keeps it."""

    key: bytes | None
    value: bytes | None
    event: Event | None
    is_valid: bool


class Expected(NamedTuple):
    """What Redis must hold for a user.

    Attributes:
        chunks: by number, were none ever dropped.
        ends: for each chunk, the largest offset of its events and those of the chunks before it.
    """

    row: bytes
    chunks: dict[bytes, bytes]
    ends: list[int]


@dataclass
class UserLog:
    """One user's valid streamed events, in log order, and what was expected so far."""

    user: int
    partition: int
    offsets: list[int] = field(default_factory=list)
    events: list[Accepted] = field(default_factory=list)
    expected: dict[int, Expected] = field(default_factory=dict)
    sent: list[Sent] = field(default_factory=list)
    has_chunks: bool = False  # ever had: looking for none is slow

    def below(self, next_offset: int) -> Expected:
        """Return what the events before an offset amount to."""
        count = bisect_left(self.offsets, next_offset)
        if count not in self.expected:
            self.expected[count] = expected_of(self.events[:count])
            self.has_chunks |= bool(self.expected[count].chunks)
        return self.expected[count]


def expected_of(events: Sequence[Accepted]) -> Expected:
    """Return a user's row and chunks by one step from nothing, after the oracle has agreed."""
    if not events:
        return Expected(b"", {}, [])
    change = step(EMPTY_STATE, events, CONFIG)
    oracle = oracle_state(events, CONFIG)
    state = change.state
    chunks = [np.frombuffer(chunk.records, RECORD) for chunk in change.chunks]
    for records, numbered in zip(
        [state.records, *chunks], [oracle.tail, *oracle.chunks], strict=True
    ):
        assert [
            (r["ordinal"], r["event_hash"], r["event_time_ms"], r["item_id"], r["domain"])
            for r in records
        ] == [
            (n.ordinal, n.event.event_hash, n.event.event_time_ms, n.event.item_id, n.event.domain)
            for n in numbered
        ]
    assert (state.next_ordinal, state.position) == (oracle.next_ordinal, oracle.position)
    assert state.num_late == oracle.num_late
    assert (state.user_session and state.user_session._asdict()) == oracle.session
    newest = [max(n.event.position.offset for n in chunk) for chunk in oracle.chunks]
    return Expected(
        encode_row(state, NUM_ACTIONS),
        {b"%d" % c.number: c.records for c in change.chunks},
        list(itertools.accumulate(newest, max)),
    )


@dataclass
class Traffic:
    """The records of one seed."""

    rng: random.Random
    num_partitions: int
    num_users: int
    garbage_share: float
    late_share: float
    repeat_share: float
    users: list[UserLog] = field(init=False)
    number: int = 0
    invalid: dict[tuple[int, int], Sent] = field(default_factory=dict)
    storable: dict[int, list[tuple[int, int, Event]]] = field(default_factory=dict)
    domains: dict[tuple[int, int], str] = field(default_factory=dict)
    by_place: dict[tuple[int, int], list[UserLog]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Choose the users; a user stays in one partition."""
        ids = self.rng.sample(_USERS, self.num_users)
        self.users = [UserLog(user, i % self.num_partitions) for i, user in enumerate(ids)]
        for log in self.users:
            place = bucket_of(log.user), log.partition
            self.by_place.setdefault(place, []).append(log)

    def make(self, now_ms: int) -> tuple[UserLog, Sent]:
        """Return the next record and whose it is; a few users send most of them."""
        log = self.users[min(int(self.rng.expovariate(0.4)), len(self.users) - 1)]
        self.number += 1
        kind = self.rng.random()
        if kind < self.garbage_share:
            return log, self._garbage(log, now_ms)
        if kind < self.garbage_share + self.repeat_share and log.sent:
            return log, self._repeated(log, now_ms)
        sent = self._encoded(self._event(log.user, now_ms))
        log.sent.append(sent)
        return log, sent

    def place(self, log: UserLog, sent: Sent, offset: int, append_time_ms: int) -> None:
        """Remember where the broker has put a record."""
        event = sent.event
        if event is not None:
            rows = self.storable.setdefault(log.partition, [])
            rows.append((offset, append_time_ms, event))
        if event is None or not sent.is_valid:
            self.invalid[log.partition, offset] = sent
            return
        if event.action not in CONFIG.entering:
            return
        if event.domain is not None:
            self.domains[log.partition, offset] = event.domain
        log.offsets.append(offset)
        log.events.append(
            Accepted(
                Position(0, log.partition, offset),
                append_time_ms,
                event.item_id,
                event.event_time_ms,
                domain_hash(event.domain),
                event_hash(event.event_id),
                NO_DWELL if event.dwell_ms is None else event.dwell_ms,
                NO_VALUE if event.value is None else event.value,
                _CODES[event.action],
            )
        )

    def _event(self, user: int, now_ms: int, event_id: str | None = None) -> Event:
        rng = self.rng
        time_ms = now_ms // _GRID_MS * _GRID_MS
        if rng.random() < self.late_share:
            time_ms -= rng.randrange(1, 20) * _GRID_MS
        forgets = rng.random() < _FORGET_SHARE
        return Event(
            event_id=event_id or f"e{self.number}",
            user_id=user,
            item_id=0 if forgets else rng.choice([2**63 - 1, 1, 2, 3]),
            action=FORGET_ACTION if forgets else rng.choice(CONFIG.actions),
            event_time_ms=time_ms,
            domain=rng.choice(_DOMAINS),
            dwell_ms=rng.choice([None, 0, 1_200]),
            value=rng.choice([None, 0.0, 4.5]),
        )

    def _repeated(self, log: UserLog, now_ms: int) -> Sent:
        """An id again, a few events later: inside the window, at its edge, or past it."""
        sent = self.rng.choice(log.sent[-2 * CONFIG.dedup_window :])
        if sent.event is not None and self.rng.random() < 0.5:
            return self._encoded(self._event(log.user, now_ms, sent.event.event_id))
        return sent

    def _encoded(self, event: Event) -> Sent:
        return Sent(b"%d" % event.user_id, encode_event(event), event, is_valid=True)

    def _garbage(self, log: UserLog, now_ms: int) -> Sent:
        key = b"%d" % log.user
        event = self._event(log.user, now_ms)
        value = encode_event(event)
        ahead_ms = now_ms + CONFIG.future_tolerance_ms + 1
        odd = self.rng.choice(
            [
                event.__class__(event_id="a", user_id=1, item_id=1, action="fly", event_time_ms=9),
                event.__class__(
                    event_id="b", user_id=1, item_id=1, action="view", event_time_ms=ahead_ms
                ),
            ]
        )
        return self.rng.choice(
            [
                Sent(key, b"{broken", None, is_valid=False),
                Sent(key, None, None, is_valid=False),
                Sent(b"nobody", value, None, is_valid=False),
                Sent(b"1", encode_event(odd), odd, is_valid=False),
            ]
        )
