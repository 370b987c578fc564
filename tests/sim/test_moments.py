"""Moments that seeds reach once in thousands of runs, forced: Redis goes back between two commands.

Each test is run twice: it holds, and with its bug planted it does not.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

import pytest

from features.events import Event, encode_event
from features.state import Accepted, Position
from streams.effects import Effects
from streams.errors import OutOfStepError
from streams.micro_batch import MicroBatch, Record
from streams.processor import Processor
from tests.sim.planted import BY_HAND
from tests.sim.store import SimRedis, SimStore
from tests.sim.test_store import Silent
from tests.sim.traffic import _USERS, CONFIG, expected_of
from tests.sim.world import Crash

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from streams.micro_batch import DeadLetter

USER = _USERS[0]


@dataclass
class At(Silent):
    """A world in which something is done at one point, once."""

    moments: dict[str, Callable[[], object]] = field(default_factory=dict)

    def at(self, point: str) -> None:
        self.moments.pop(point, lambda: None)()


def events(*offsets: int) -> list[Accepted]:
    return [Accepted(Position(0, 0, o), 5, 7, 1_000 * o, 0, 100 + o, -1, 0.5, 1) for o in offsets]


def batch(*offsets: int, end: int) -> MicroBatch:
    return MicroBatch(by_user={USER: events(*offsets)}, ends={0: end})


def ready(redis: SimRedis, hooks: At | None = None) -> Processor:
    """Return a worker's processor that knows where Redis stands."""
    processor = Processor(SimStore(redis, CONFIG, hooks or At()), CONFIG)
    processor.assign([0])
    return processor


def law_holds(redis: SimRedis, log: Sequence[Accepted]) -> bool:
    """Return whether the user's row is that of the events before its bucket's checkpoint."""
    bucket = next(b for b in range(4) if redis.checkpoint(b, 0, 0) >= 0)
    at = redis.checkpoint(bucket, 0, 0)
    return redis.row(USER) == expected_of([e for e in log if e.position.offset < at]).row


def newer_row_then_back() -> bool:
    """A row is read that another worker has just written; then Redis goes back before that."""
    redis, hooks = SimRedis(), At()
    ready(redis).apply(batch(0, end=1))
    slow, before = ready(redis, hooks), len(redis.journal)
    ready(redis).apply(batch(1, 2, 3, end=4))
    hooks.moments["states loaded"] = lambda: redis.restore(before)
    with suppress(OutOfStepError):
        slow.apply(batch(1, end=2))
    return law_holds(redis, events(0, 1, 2, 3))


def older_row_then_forth() -> bool:
    """Redis goes back, an old row is read, another worker applies again what was lost."""
    redis, hooks = SimRedis(), At()
    ready(redis).apply(batch(0, end=1))
    before = len(redis.journal)
    ready(redis).apply(batch(1, 2, end=3))
    slow = ready(redis, hooks)
    redis.restore(before)
    hooks.moments["states loaded"] = lambda: ready(redis).apply(batch(1, 2, end=3))
    with suppress(OutOfStepError):
        slow.apply(batch(3, end=4))
    return law_holds(redis, events(0, 1, 2, 3))


def killed_while_sending_a_dead_letter() -> bool:
    """No checkpoint may pass a record that is in no dead letter yet."""
    redis = SimRedis()

    class Killed:
        def send(self, letters: Sequence[DeadLetter]) -> None:
            if letters:
                raise Crash

    processor = ready(redis)
    effects = Effects(processor, processor.states, Killed())  # type: ignore[arg-type]
    key = b"%d" % USER
    event = Event(event_id="a", user_id=USER, item_id=1, action="view", event_time_ms=1_000)
    records = [
        Record(0, 0, 1_000, key, b"{broken", None),
        Record(0, 1, 1_000, key, encode_event(event), None),
    ]
    with suppress(Crash):
        effects.apply(records)
    return max(cast("SimStore", processor.states).read_checkpoints(0, [0])[0]) <= 0


MOMENTS = {
    "ahead-not-refused": newer_row_then_back,
    "row-not-compared": older_row_then_forth,
    "letters-after-states": killed_while_sending_a_dead_letter,
}


@pytest.mark.parametrize("name", MOMENTS)
def test_the_law_holds(name: str) -> None:
    assert MOMENTS[name]()


@pytest.mark.parametrize("name", MOMENTS)
def test_the_bug_planted_is_caught(name: str) -> None:
    with BY_HAND[name].planted():
        assert not MOMENTS[name]()
