"""Measures from outside what a producer and a recommender would feel."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from compose.errors import ComposeError
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


class NotVisibleError(ComposeError):
    """Acknowledged events did not reach Redis."""


@dataclass(frozen=True)
class Quantiles:
    """Median and 99th percentile, milliseconds."""

    p50_ms: float
    p99_ms: float
    num: int


def quantiles(seconds: Sequence[float]) -> Quantiles:
    """Return the quantiles of some durations in seconds."""
    p50, p99 = np.quantile(np.array(seconds) * 1000, [0.5, 0.99])
    return Quantiles(round(float(p50), 2), round(float(p99), 2), len(seconds))


def measure_freshness(
    producer: EventProducer, store: StateStore, events: Iterable[Event], *, rate: float
) -> Quantiles:
    """Send events at a steady rate; return the time from broker acknowledgement to Redis.

    Redis is read in between sends, so a reading can be late by one such read: an upper bound.

    Raises:
        NotVisibleError: an event did not arrive within VISIBLE_TIMEOUT_S.
    """
    acknowledged: list[tuple[int, Delivery]] = []
    seconds: list[float] = []

    def note(event: Event, outcome: Outcome) -> None:
        if not isinstance(outcome, Delivery):
            raise outcome
        acknowledged.append((event.user_id, outcome))

    started = time.perf_counter()
    for number, event in enumerate(events):
        while time.perf_counter() < started + number / rate:
            producer.poll(0)
            _note_visible(store, acknowledged, seconds)
        producer.send(event, on_delivery=note)
    producer.flush()
    deadline = time.perf_counter() + VISIBLE_TIMEOUT_S
    while acknowledged:
        _note_visible(store, acknowledged, seconds)
        if time.perf_counter() > deadline:
            user, delivery = acknowledged[0]
            raise NotVisibleError(
                f"user {user}'s event at {delivery.partition}:{delivery.offset} was acknowledged "
                f"and is not in Redis after {VISIBLE_TIMEOUT_S:g} s: see the worker's log."
            )
    return quantiles(seconds)


def _note_visible(
    store: StateStore, acknowledged: list[tuple[int, Delivery]], seconds: list[float]
) -> None:
    """Move every event that Redis shows by now from `acknowledged` to `seconds`."""
    if not acknowledged:
        return
    rows = store.read_rows([user for user, _ in acknowledged], newest=0)
    seen_s = time.perf_counter()
    waiting = []
    for (user, delivery), row in zip(acknowledged, rows, strict=True):
        if row is not None and decode_newest(row)[0].position.offset >= delivery.offset:
            seconds.append(max(0.0, seen_s - delivery.acked_s))
        else:
            waiting.append((user, delivery))
    acknowledged[:] = waiting


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
