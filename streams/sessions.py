"""Sweeps users' states for closed sessions and publishes each once.

  1. the marker moves and the record enters the outbox, in one script;
  2. the broker acknowledges the record;
  3. the record leaves the outbox.
A crash after 1 or 2 leaves the record in the outbox: the next sweep sends the same bytes again.
"""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.clock import now_ms
from features.errors import CorruptRowError
from features.keys import NUM_BUCKETS, bucket_of
from features.nearline import SessionNote, SessionStore
from features.row import decode_newest, decode_row
from streams.closing import (
    AppliedClock,
    Closing,
    Marker,
    close_current,
    close_replaced,
    decode_marker,
    encode_closed,
    encode_marker,
)
from streams.errors import DeliveryError, HistoryGoneError
from streams.nearline_metrics import NearlineMetrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from features.nearline import Unsent
    from features.redis import StateStore
    from features.state import UserState
    from features.view import Records
    from streams.kafka import Producer
    from streams.log_reader import LogReader
    from streams.topics import Topics

log = logging.getLogger("moveline.nearline")

DELIVERY_TIMEOUT_S: Final = 10.0


class History(NamedTuple):
    """A user's state, and all that Redis holds of the events behind it where they are needed."""

    state: UserState
    records: Records | None


def _merged(state: UserState, waiting: Records) -> History:
    """Return each event once: the chunks were read after the row, and may hold some of its own."""
    records = np.concatenate([waiting, state.records])
    records = records[records["ordinal"] < state.next_ordinal]
    _, first = np.unique(records["ordinal"], return_index=True)
    return History(state, records[first])


@dataclass
class SessionSweeper:
    """Looks at every user, a bounded step at a time.

    Attributes:
        lateness_ms: how long after its gap a session is kept open for events on their way.
        cursor: where the round over all users stands; lost with the process, at no harm.
    """

    states: StateStore
    sessions: SessionStore
    reader: LogReader
    producer: Producer
    topics: Topics
    partitions: int
    lateness_ms: int
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    clock: Callable[[], int] = now_ms
    applied: AppliedClock = field(default_factory=AppliedClock)
    cursor: int = 0

    def step(self, *, budget_s: float) -> bool:
        """Look at some users; return whether that ended a round over all of them.

        Raises:
            StoreError: Redis did not answer.
            StreamError: Kafka did not.
        """
        deadline = time.monotonic() + budget_s
        if self.cursor == 0:
            self._send(range(NUM_BUCKETS))
        clocks = self._clocks()
        while True:
            cursor, users = self.sessions.scan_users(self.cursor)
            self._sweep(users, clocks)
            self.cursor = cursor
            self.metrics.swept.inc(len(users))
            if cursor == 0:
                self.metrics.rounds.inc()
            if cursor == 0 or time.monotonic() > deadline:
                return cursor == 0

    def round(self) -> None:
        """Look at every user."""
        while not self.step(budget_s=1.0):
            pass

    def _clocks(self) -> dict[int, list[int | None]]:
        """Return by partition and bucket up to which time states are complete.

        In this order: a record acknowledged before the clock was read lies before the end.
        """
        clock_ms = self.clock()
        topic = self.topics.events
        ends = {p: self.reader.bounds(topic, p).high for p in range(self.partitions)}
        self.applied.observe(clock_ms, ends)
        checkpoints = self.states.read_checkpoints(self.topics.source, list(ends))
        return {p: self.applied.at(p, of_bucket) for p, of_bucket in checkpoints.items()}

    def _sweep(self, users: list[int], clocks: dict[int, list[int | None]]) -> None:
        """Note what is closed of these users, whose rows are read after the clocks."""
        states = self._newest(users)
        markers = self.sessions.markers({user: bucket_of(user) for user in states})
        notes: dict[int, list[SessionNote]] = defaultdict(list)
        histories = self._histories(states, markers)
        for user, state in states.items():
            bucket = bucket_of(user)
            clock_ms = self._clock_of(state, clocks, bucket)
            known = histories.get(user, History(state, None))
            note = self._note(user, known, markers[user], clock_ms)
            if note is not None:
                notes[bucket].append(note)
        for bucket, of_bucket in notes.items():
            self.sessions.note(bucket, of_bucket)
        self._send(list(notes))

    def _clock_of(
        self, state: UserState, clocks: dict[int, list[int | None]], bucket: int
    ) -> int | None:
        """Return up to which time a user's state is complete, None if that is not known."""
        if state.position.source == self.topics.source:
            return clocks.get(state.position.partition, [None] * NUM_BUCKETS)[bucket]
        # Nothing of the user in the newest topic yet: what comes can come from any partition.
        times = [of_bucket[bucket] for of_bucket in clocks.values()]
        known = [time_ms for time_ms in times if time_ms is not None]
        return min(known) if known and len(known) == len(times) else None

    def _newest(self, users: list[int]) -> dict[int, UserState]:
        """Return states without their events; they are not needed for most users."""
        rows = self.states.read_rows(users, newest=0)
        found: dict[int, UserState] = {}
        for user, row in zip(users, rows, strict=True):
            if row is None:
                continue
            try:
                found[user] = decode_newest(row)[0]
            except CorruptRowError:
                # Departed ids stand before the trailer, and it cannot be read without them.
                whole = self.states.read_rows([user])[0]
                if whole is not None:
                    found[user] = decode_row(whole)
        return found

    def _histories(
        self, states: dict[int, UserState], markers: dict[int, bytes]
    ) -> dict[int, History]:
        """Return the events of users who have opened a session since their marker."""
        behind = [
            user
            for user, state in states.items()
            if state.user_session is not None
            and decode_marker(markers[user]).session_id < state.user_session.session_id
        ]
        return {
            user: _merged(decode_row(row), chunks)
            for user, (row, chunks) in zip(
                behind, self.sessions.read_histories(behind), strict=True
            )
            if row is not None
        }

    def _note(
        self, user: int, known: History, raw_marker: bytes, clock_ms: int | None
    ) -> SessionNote | None:
        try:
            closing = self._closing(known, decode_marker(raw_marker), clock_ms)
        except HistoryGoneError as error:
            log.warning("user %d: %s", user, error)
            self.metrics.unknown.inc()
            onward = Marker(error.session_id, is_published=False)
            return SessionNote(user, raw_marker, encode_marker(onward), ())
        if closing is None:
            return None
        self.metrics.closed.inc(len(closing.sessions))
        config, generation = self.states.config, self.states.generation
        records = tuple(
            (one.session_id, encode_closed(one, generation=generation, user_id=user, config=config))
            for one in closing.sessions
        )
        return SessionNote(user, raw_marker, encode_marker(closing.marker), records)

    def _closing(self, known: History, marker: Marker, clock_ms: int | None) -> Closing | None:
        current, config = known.state.user_session, self.states.config
        late_ms = None if clock_ms is None else clock_ms - self.lateness_ms
        if current is None or marker.session_id > current.session_id:
            return None
        if marker.session_id == current.session_id:
            return close_current(marker, current, late_ms, config)
        if known.records is None:
            return None
        return close_replaced(marker, current, known.records, late_ms, config)

    def _send(self, buckets: Sequence[int]) -> None:
        """Return once the outboxes of those buckets are sent and cleared.

        Raises:
            DeliveryError: the broker did not take a record; it stays in the outbox.
        """
        unsent = self.sessions.unsent(buckets)
        if not unsent:
            return
        failed = self._produce(unsent)
        if self.producer.flush(DELIVERY_TIMEOUT_S) or failed:
            raise DeliveryError(
                f"closed sessions were not acknowledged within {DELIVERY_TIMEOUT_S:g} s "
                f"({failed[:1]}): they are kept and sent again. Check {self.topics.sessions} "
                "with `moveline status`.",
                retriable=True,
            )
        self.sessions.sent(unsent)
        self.metrics.published.inc(len(unsent))

    def _produce(self, unsent: Iterable[Unsent]) -> list[object]:
        failed: list[object] = []
        for one in unsent:
            self.producer.produce(
                self.topics.sessions,
                value=one.record,
                key=one.user,
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
            self.producer.poll(0)
        return failed
