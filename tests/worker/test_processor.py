"""The compare-and-set: a stale writer is refused, reads again, and applies each event once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from features.errors import StoreUnavailableError
from features.keys import NUM_BUCKETS, bucket_of, checkpoints_key
from features.redis import execute
from features.row import encode_row
from features.state import EMPTY_STATE, Accepted, Position, UserState, step
from streams.errors import OutOfStepError
from streams.micro_batch import MicroBatch
from streams.processor import Processor, StateCache

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from features.redis import BucketWrite, StateStore
    from features.row import RowFormat

# Two users of one bucket; user 2 lives in another.
NEIGHBOUR = next(user for user in range(2, 10**6) if bucket_of(user) == bucket_of(1))


def events(*offsets: int, user: int = 1, partition: int = 0) -> list[Accepted]:
    return [
        Accepted(
            Position(0, partition, o), 10 + o, 100 + o, 10 + o, 0, user * 1_000 + o, -1, 0.0, 1
        )
        for o in offsets
    ]


def batch(by_user: dict[int, list[Accepted]]) -> MicroBatch:
    """Return these events as the worker would have read them, and nothing after them."""
    ends: dict[int, int] = {}
    for one in (event.position for log in by_user.values() for event in log):
        ends[one.partition] = max(ends.get(one.partition, 0), one.offset + 1)
    return MicroBatch(by_user=by_user, ends=ends)


def assigned(store: StateStore) -> Processor:
    """Return a processor that has just been given partition 0."""
    processor = Processor(store, store.config)
    processor.assign([0])
    return processor


def expected_row(store: StateStore, applied: list[Accepted]) -> bytes:
    state = step(EMPTY_STATE, applied, store.config).state
    return encode_row(state, len(store.config.actions))


def checkpoint(store: StateStore, user: int, partition: int = 0) -> int:
    return store.read_checkpoints(0, [partition])[partition][bucket_of(user)]


def test_a_zombie_is_refused_and_catches_up(store: StateStore) -> None:
    zombie = assigned(store)
    assert zombie.apply(batch({1: events(0)})).num_applied == 1
    owner = assigned(store)
    assert owner.apply(batch({1: events(1, 2)})).num_applied == 2
    with pytest.raises(OutOfStepError, match=r"1 of 1 buckets.*left at offset 1\)"):
        zombie.apply(batch({1: events(1, 2, 3)}))
    assert store.read_rows([1]) == [expected_row(store, events(0, 1, 2))]
    zombie.assign([0])
    report = zombie.apply(batch({1: events(1, 2, 3)}))
    assert (report.num_skipped, report.num_applied) == (2, 1)
    assert store.read_rows([1]) == [expected_row(store, events(0, 1, 2, 3))]
    # And the owner, whose cache the zombie has now made stale.
    with pytest.raises(OutOfStepError):
        owner.apply(batch({1: events(3, 4)}))
    owner.assign([0])
    report = owner.apply(batch({1: events(3, 4)}))
    assert (report.num_skipped, report.num_applied) == (1, 1)
    assert store.read_rows([1]) == [expected_row(store, events(0, 1, 2, 3, 4))]


def test_a_zombie_first_write_does_not_replace_a_row(store: StateStore) -> None:
    zombie, owner = assigned(store), assigned(store)
    before = zombie._states_of({1: None})
    assert before == {1: EMPTY_STATE}
    zombie.cache.put(1, EMPTY_STATE)
    owner.apply(batch({1: events(0, 1)}))
    with pytest.raises(OutOfStepError):
        zombie.apply(batch({1: events(0)}))
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]
    # Not even where it knows the checkpoint: the row is not the one it was computed from.
    zombie.assign([0])
    zombie.cache.put(1, EMPTY_STATE)
    with pytest.raises(OutOfStepError):
        zombie.apply(batch({1: events(2)}))
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]
    assert checkpoint(store, 1) == 2
    zombie.assign([0])
    assert zombie.apply(batch({1: events(0)})).num_applied == 0
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]


def test_only_the_refused_buckets_are_applied_again(store: StateStore) -> None:
    zombie = assigned(store)
    zombie.apply(batch({1: events(0), 2: events(0, user=2)}))
    assigned(store).apply(batch({1: events(1)}))
    read = batch({1: events(1, 2), 2: events(1, user=2)})
    with pytest.raises(OutOfStepError, match="1 of 2 buckets"):
        zombie.apply(read)
    assert store.read_rows([1, 2]) == [
        expected_row(store, events(0, 1)),
        expected_row(store, events(0, 1, user=2)),
    ]
    zombie.assign([0])
    report = zombie.apply(read)
    # Of user 1 the event that the owner applied, of user 2 the one that was written just now.
    assert (report.num_applied, report.num_skipped) == (1, 2)
    rows = store.read_rows([1, 2])
    assert rows == [
        expected_row(store, events(0, 1, 2)),
        expected_row(store, events(0, 1, user=2)),
    ]


def test_a_bucket_is_written_whole_or_not_at_all(store: StateStore) -> None:
    """A neighbour's stale row refuses the user's write too, and the checkpoint stays."""
    processor = assigned(store)
    processor.apply(batch({1: events(0), NEIGHBOUR: events(1, user=NEIGHBOUR)}))
    processor.cache.put(NEIGHBOUR, EMPTY_STATE)
    read = batch({1: events(2), NEIGHBOUR: events(3, user=NEIGHBOUR)})
    with pytest.raises(OutOfStepError):
        processor.apply(read)
    assert store.read_rows([1, NEIGHBOUR]) == [
        expected_row(store, events(0)),
        expected_row(store, events(1, user=NEIGHBOUR)),
    ]
    assert checkpoint(store, 1) == 2
    processor.assign([0])
    assert processor.apply(read).num_applied == 2
    assert store.read_rows([1, NEIGHBOUR]) == [
        expected_row(store, events(0, 2)),
        expected_row(store, events(1, 3, user=NEIGHBOUR)),
    ]
    assert checkpoint(store, 1) == 4


def test_chunks_of_a_refused_write_are_not_stored(store: StateStore) -> None:
    """State and chunks are one write: a zombie's chunk must not overwrite the owner's."""
    zombie = assigned(store)
    fill = store.config.tail_max
    zombie.apply(batch({1: events(*range(fill - 1))}))
    assigned(store).apply(batch({1: events(*range(fill - 1, 2 * fill))}))
    with pytest.raises(OutOfStepError):
        zombie.apply(batch({1: events(*range(fill - 1, fill + 3))}))
    applied = events(*range(2 * fill))
    change = step(EMPTY_STATE, applied, store.config)
    held = store.client.hgetall(f"moveline:{{b632}}:g{store.generation}:chunks:1")
    assert held == {b"%d" % chunk.number: chunk.records for chunk in change.chunks}
    assert store.read_rows([1]) == [expected_row(store, applied)]


def test_a_row_ahead_of_its_checkpoint_is_refused(store: StateStore) -> None:
    """Another worker wrote after the checkpoints were read and before the row was."""
    late = assigned(store)
    assigned(store).apply(batch({1: events(0, 1)}))
    with pytest.raises(OutOfStepError, match=r"1 of 1 users \(first: 1\) are ahead"):
        late.apply(batch({1: events(0, 1, 2)}))
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]
    assert checkpoint(store, 1) == 2


@dataclass
class LostReply:
    """A store that writes and then loses the reply: what a broken connection looks like.

    A double, because the moment between write and reply cannot be hit on purpose from outside.
    """

    store: StateStore

    @property
    def row_format(self) -> RowFormat:
        """Write rows as the real one does."""
        return self.store.row_format

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]:
        """Read as the real one does."""
        return self.store.load(user_ids)

    def read_checkpoints(self, source: int, partitions: Sequence[int]) -> dict[int, list[int]]:
        """Read as the real one does."""
        return self.store.read_checkpoints(source, partitions)

    def write_buckets(self, writes: Iterable[BucketWrite]) -> list[int]:
        """Write, and say that Redis is away."""
        self.store.write_buckets(writes)
        raise StoreUnavailableError("reply lost")


def test_a_lost_reply_is_not_applied_twice(store: StateStore) -> None:
    processor = Processor(LostReply(store), store.config)
    processor.assign([0])
    with pytest.raises(StoreUnavailableError):
        processor.apply(batch({1: events(0, 1)}))
    processor.states = store
    with pytest.raises(OutOfStepError):
        processor.apply(batch({1: events(0, 1)}))
    processor.assign([0])
    report = processor.apply(batch({1: events(0, 1)}))
    assert (report.num_applied, report.num_skipped) == (0, 2)
    assert store.read_rows([1]) == [expected_row(store, events(0, 1))]


def test_reading_starts_where_the_last_bucket_stands(store: StateStore) -> None:
    processor = Processor(store, store.config)
    assert processor.assign([0, 1]) == {0: 0, 1: 0}
    processor.apply(batch({1: events(0, 4)}))
    assert checkpoint(store, 1) == 5
    assert Processor(store, store.config).assign([0, 1]) == {0: 0, 1: 0}
    processor.advance_idle({0: 7, 1: 3})
    assert store.read_checkpoints(0, [0, 1]) == {0: [7] * NUM_BUCKETS, 1: [3] * NUM_BUCKETS}
    assert Processor(store, store.config).assign([0, 1]) == {0: 7, 1: 3}
    store.client.delete(checkpoints_key(store.generation, 5))
    assert Processor(store, store.config).assign([0, 1]) == {0: 0, 1: 0}


def test_a_redis_that_went_back_is_noticed_while_nothing_happens(store: StateStore) -> None:
    processor = assigned(store)
    processor.advance_idle({0: 4})
    key = checkpoints_key(store.generation, 7)
    before = execute(store.client, "DUMP", key)
    processor.advance_idle({0: 9})
    processor.advance_idle({0: 9})
    execute(store.client, "RESTORE", key, 0, before, "REPLACE")
    with pytest.raises(OutOfStepError, match="partition 0"):
        processor.advance_idle({0: 9})
    assert processor.assign([0]) == {0: 4}
    # Likewise where there is something to advance.
    processor.advance_idle({0: 9})
    execute(store.client, "RESTORE", key, 0, before, "REPLACE")
    with pytest.raises(OutOfStepError, match=r"1 of 1024 buckets.*bucket 7"):
        processor.advance_idle({0: 12})


def test_a_revoked_partition_is_left_alone(store: StateStore) -> None:
    processor = Processor(store, store.config)
    processor.assign([0, 1])
    processor.apply(batch({1: events(0), 2: events(0, user=2, partition=1)}))
    processor.revoke([0])
    assert (processor.cache.bytes_held, len(processor.cache.states)) == (0, 0)
    assigned(store).apply(batch({1: events(1)}))
    processor.advance_idle({0: 9, 1: 9})
    assert checkpoint(store, 1) == 2
    assert checkpoint(store, 2, partition=1) == 9


def test_the_cache_keeps_to_its_bytes(store: StateStore) -> None:
    cache = StateCache(bytes_max=10_000)
    processor = Processor(store, store.config, cache=cache)
    processor.assign([0])
    for user in range(1, 40):
        assert processor.apply(batch({user: events(0, 1, user=user)})).num_applied == 2
        assert cache.bytes_held <= cache.bytes_max
    assert 0 < len(cache.states) < 39
    # Evicted users are read back and continued.
    report = processor.apply(batch({1: events(1, 2)}))
    assert (report.num_applied, report.num_skipped) == (1, 1)
    cache.clear()
    assert (cache.bytes_held, len(cache.states)) == (0, 0)
