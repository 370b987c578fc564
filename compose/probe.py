"""Measures from outside what a producer and a recommender would feel."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from compose.errors import ComposeError
from features.clock import now_ms
from features.row import decode_newest
from streams.producer import Delivery

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from features.events import Event
    from features.redis import StateStore
    from scoring.client import Recommender
    from streams.producer import EventProducer, Outcome

# How long an event may stay invisible before the probe calls the worker stuck.
VISIBLE_TIMEOUT_S: Final = 30.0
# Between two looks at Redis: what a reading is exact to.
_LOOK_S: Final = 0.000_5


class NotVisibleError(ComposeError):
    """Acknowledged events did not reach Redis."""


@dataclass(frozen=True)
class Quantiles:
    """Median, 99th and 99.9th percentile, milliseconds."""

    p50_ms: float
    p99_ms: float
    p999_ms: float
    num: int


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Return the quantiles of some durations in seconds."""
    p50, p99, p999 = np.quantile(np.array(seconds) * 1000, [0.5, 0.99, 0.999]).tolist()
    return Quantiles(round(p50, 2), round(p99, 2), round(p999, 2), len(seconds))


@dataclass(frozen=True)
class Freshness:
    """How long events took to be readable, and how fast they were sent.

    Attributes:
        from_acknowledgement: from the moment the producer saw it. Seen up to one look at Redis
            late, which hides as much as looking at Redis late adds.
        from_append: from the broker's append time, by the clock both machines share: an upper
            bound, in steps of 1 ms.
        rate: events per second that were sent.
    """

    from_acknowledgement: Quantiles
    from_append: Quantiles
    rate: float


def measure_freshness(
    producer: EventProducer,
    store: StateStore,
    events: Iterable[Event],
    *,
    rate: float,
    watch_every: int = 1,
) -> Freshness:
    """Send events at a steady rate and look in Redis for every `watch_every`-th in between.

    Raises:
        NotVisibleError: an event did not arrive within VISIBLE_TIMEOUT_S.
    """
    watch = _Watch(store)
    started = time.perf_counter()
    number = 0
    for number, event in enumerate(events):
        due_s = started + number / rate
        while (ahead_s := due_s - time.perf_counter()) > 0:
            # Sleeps in the library, and wakes for acknowledgements: the cores are the worker's.
            producer.poll(min(ahead_s, _LOOK_S))
            watch.look()
        producer.send(event, on_delivery=None if number % watch_every else watch.note)
    sent_s = time.perf_counter() - started
    producer.flush()
    watch.wait()
    return Freshness(quantiles(watch.acknowledged_s), quantiles(watch.appended_s), number / sent_s)


class _Watch:
    """The events that are acknowledged and not seen yet, and how long the others took."""

    def __init__(self, store: StateStore) -> None:
        self.store = store
        self.waiting: list[tuple[int, Delivery]] = []
        self.acknowledged_s: list[float] = []
        self.appended_s: list[float] = []

    def note(self, event: Event, outcome: Outcome) -> None:
        if not isinstance(outcome, Delivery):
            raise outcome
        self.waiting.append((event.user_id, outcome))

    def look(self) -> None:
        """Move every event that Redis shows by now from those waiting to those seen."""
        if not self.waiting:
            return
        rows = self.store.read_rows([user for user, _ in self.waiting], newest=0)
        seen_s, seen_ms = time.perf_counter(), now_ms()
        waiting = []
        for (user, delivery), row in zip(self.waiting, rows, strict=True):
            if row is not None and decode_newest(row)[0].position.offset >= delivery.offset:
                self.acknowledged_s.append(max(0.0, seen_s - delivery.acked_s))
                self.appended_s.append((seen_ms - delivery.append_time_ms) / 1000)
            else:
                waiting.append((user, delivery))
        self.waiting = waiting

    def wait(self) -> None:
        """Return once all are seen."""
        deadline = time.perf_counter() + VISIBLE_TIMEOUT_S
        while self.waiting:
            self.look()
            if time.perf_counter() > deadline:
                user, delivery = self.waiting[0]
                raise NotVisibleError(
                    f"user {user}'s event at {delivery.partition}:{delivery.offset} was "
                    f"acknowledged and is not in Redis after {VISIBLE_TIMEOUT_S:g} s: see the "
                    "worker's log."
                )


def measure_requests(
    recommender: Recommender, users: Sequence[int], *, num_requests: int, k: int
) -> Quantiles:
    """Return how long one client waits for an answer, one request after the other."""
    seconds = []
    for i in range(num_requests):
        started = time.perf_counter()
        recommender.recommend(users[i % len(users)], k=k, deadline_s=5.0)
        seconds.append(time.perf_counter() - started)
    return quantiles(seconds)
