"""The compare-and-set: a stale writer is refused, reads again, and applies each event once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from features.errors import StoreUnavailableError
from features.row import encode_row
from features.state import EMPTY_STATE, Accepted, Position, UserState, step
from streams.errors import StateContendedError
from streams.processor import REFUSALS_MAX, Processor, StateCache

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.redis import StateStore
    from features.row import RowWrite


def events(*offsets: int, user: int = 1) -> list[Accepted]:
    return [
        Accepted(Position(0, 0, o), 10 + o, 100 + o, 10 + o, 0, user * 1_000 + o, -1, 0.0, 1)
        for o in offsets
    ]


def expected_row(store: StateStore, applied: list[Accepted]) -> bytes:
    state = step(EMPTY_STATE, applied, store.config).state
    return encode_row(state, len(store.config.actions))


def test_a_zombie_is_refused_and_catches_up(store: StateStore) -> None:
    zombie, owner = Processor(store, store.config), Processor(store, store.config)
    assert zombie.apply({1: events(0)}).num_applied == 1
    assert owner.apply({1: events(1, 2)}).num_applied == 2
    report = zombie.apply({1: events(1, 2, 3)})
    assert (report.num_refused, report.num_skipped, report.num_applied) == (1, 2, 1)
    assert store.read_rows([1]) == [expected_row(store, events(0, 1, 2, 3))]
    # And the owner, whose cache the zombie has now made stale.
    report = owner.apply({1: events(3, 4)})
    assert (report.num_refused, report.num_skipped, report.num_applied) == (1, 1, 1)
    assert store.read_rows([1]) == [expected_row(store, events(0, 1, 2, 3, 4))]


def test_a_zombie_first_write_does_not_replace_a_row(store: StateStore) -> None:
    zombie, owner = Processor(store, store.config), Processor(store, store.config)
    before = zombie._states_of({1: None})
    assert before == {1: EMPTY_STATE}
    zombie.cache.put(1, EMPTY_STATE)
    owner.apply({1: events(0, 1)})
    assert zombie.apply({1: events(0)}).num_applied == 0
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]


def test_only_the_refused_users_are_applied_again(store: StateStore) -> None:
    zombie, owner = Processor(store, store.config), Processor(store, store.config)
    zombie.apply({1: events(0), 2: events(0, user=2)})
    owner.apply({1: events(1)})
    report = zombie.apply({1: events(1, 2), 2: events(1, user=2)})
    assert (report.num_refused, report.num_applied, report.num_skipped) == (1, 2, 1)
    rows = store.read_rows([1, 2])
    assert rows == [
        expected_row(store, events(0, 1, 2)),
        expected_row(store, events(0, 1, user=2)),
    ]


def test_chunks_of_a_refused_write_are_not_stored(store: StateStore) -> None:
    """State and chunks are one write: a zombie's chunk must not overwrite the owner's."""
    zombie, owner = Processor(store, store.config), Processor(store, store.config)
    fill = store.config.tail_max
    zombie.apply({1: events(*range(fill - 1))})
    owner.apply({1: events(*range(fill - 1, 2 * fill))})
    zombie.apply({1: events(*range(fill - 1, fill + 3))})
    applied = events(*range(2 * fill))
    change = step(EMPTY_STATE, applied, store.config)
    held = store.client.hgetall(f"moveline:{{b632}}:g{store.generation}:chunks:1")
    assert held == {b"%d" % chunk.number: chunk.records for chunk in change.chunks}
    assert store.read_rows([1]) == [expected_row(store, applied)]


@dataclass
class AlwaysRefused:
    """A store whose writes are refused for ever.

    A double, because no real Redis can be made to have another writer win every single time.
    """

    store: StateStore
    num_writes: int = 0

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]:
        """Read as the real one does."""
        return self.store.load(user_ids)

    def write(self, writes: Mapping[int, RowWrite]) -> list[int]:
        """Refuse everybody."""
        self.num_writes += 1
        return list(writes)


def test_refused_for_ever_ends_with_a_sentence(store: StateStore) -> None:
    states = AlwaysRefused(store)
    with pytest.raises(StateContendedError, match=r"1 users \(first: 1\).*moveline status"):
        Processor(states, store.config).apply({1: events(0)})
    assert states.num_writes == REFUSALS_MAX + 1


@dataclass
class LostReply(AlwaysRefused):
    """A store that writes and then loses the reply: what a broken connection looks like.

    A double, because the moment between write and reply cannot be hit on purpose from outside.
    """

    def write(self, writes: Mapping[int, RowWrite]) -> list[int]:
        """Write, and say that Redis is away."""
        self.store.write(writes)
        raise StoreUnavailableError("reply lost")


def test_a_lost_reply_is_not_applied_twice(store: StateStore) -> None:
    processor = Processor(LostReply(store), store.config)
    with pytest.raises(StoreUnavailableError):
        processor.apply({1: events(0, 1)})
    processor.states = store
    report = processor.apply({1: events(0, 1)})
    assert (report.num_applied, report.num_skipped) == (0, 2)
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]


def test_the_cache_keeps_to_its_bytes(store: StateStore) -> None:
    cache = StateCache(bytes_max=10_000)
    processor = Processor(store, store.config, cache)
    for user in range(1, 40):
        processor.apply({user: events(0, 1, user=user)})
        assert cache.bytes_held <= cache.bytes_max
    assert 0 < len(cache.states) < 39
    # Evicted users are read back and continued.
    report = processor.apply({1: events(1, 2)})
    assert (report.num_applied, report.num_skipped) == (1, 1)
    cache.clear()
    assert (cache.bytes_held, len(cache.states)) == (0, 0)
