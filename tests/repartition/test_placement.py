"""Where a key belongs decides whether an event counts: the rules alone, without servers."""

from __future__ import annotations

import pytest

from features.keys import log_partition, split_log_partition
from features.state import EMPTY_STATE, PartitionMovedError, Position, step
from scoring.asks import Ask
from scoring.reading import _reached
from streams.compare import MemoryStates
from streams.micro_batch import Record
from streams.placement import drop_misplaced
from streams.processor import Processor
from streams.seal import cut_at_seals, seal_headers
from streams.topics import Topics, source_of
from tests.conftest import SMALL
from tests.repartition.records import BELONGS, NOW_MS, USER, batch_of, record, seal


def processor(source: int = 0, states: MemoryStates | None = None) -> Processor:
    """Return one that knows three partitions."""
    one = Processor(states or MemoryStates(SMALL), SMALL, source=source, num_partitions=3)
    one.assign(range(3))
    return one


def test_what_comes_after_the_first_seal_does_not_count() -> None:
    other = (BELONGS + 1) % 3
    records = [record(0), record(5, partition=other, user=1), seal(1), record(2), seal(3)]
    batch = batch_of(*records)
    assert batch.seals == {BELONGS: 1}
    assert batch.ends == {BELONGS: 1, other: 6}
    assert [event.position.offset for event in batch.by_user[USER]] == [0]
    assert not batch.dead_letters
    kept, seals = cut_at_seals(records)
    assert (len(kept), seals) == (2, {BELONGS: 1})


def test_a_tombstone_with_a_key_or_without_the_header_is_no_seal() -> None:
    header = list(seal_headers(0))
    keyed = Record(0, 0, NOW_MS, b"7", None, header)
    bare = Record(0, 1, NOW_MS, None, None, None)
    valued = Record(0, 2, NOW_MS, None, b"x", header)
    batch = batch_of(keyed, bare, valued)
    assert len(batch.dead_letters) == 3
    assert not batch.seals


def test_a_users_first_event_in_the_wrong_partition_is_refused() -> None:
    one = processor()
    wrong = batch_of(record(0, partition=(BELONGS + 1) % 3))
    with pytest.raises(PartitionMovedError, match=f"user {USER} lies in partition"):
        one.apply(wrong)
    assert set(one.checkpoints[(BELONGS + 1) % 3]) == {-1}
    assert one.apply(batch_of(record(0))).num_applied == 1


def test_the_first_event_of_each_topic_is_checked() -> None:
    states = MemoryStates(SMALL)
    processor(0, states).apply(batch_of(record(0)))
    later = processor(1, states)
    with pytest.raises(PartitionMovedError, match=f"user {USER} lies in partition"):
        later.apply(batch_of(record(0, partition=(BELONGS + 1) % 3), source=1))
    assert later.apply(batch_of(record(1), source=1)).num_applied == 1


def test_misplaced_events_are_dropped_and_others_kept() -> None:
    batch = batch_of(record(0), record(1, partition=(BELONGS + 1) % 3))
    assert drop_misplaced(batch, 3) == 1
    assert [event.position.offset for event in batch.by_user[USER]] == [0]
    assert drop_misplaced(batch, 3) == 0
    alone = batch_of(record(1, partition=(BELONGS + 1) % 3))
    assert drop_misplaced(alone, 3) == 1
    assert not alone.by_user


def test_a_later_topic_follows_and_an_earlier_one_is_over() -> None:
    """Whatever the partition and offset: the source orders a user's events first."""
    first = step(EMPTY_STATE, batch_of(record(9)).by_user[USER], SMALL).state
    second = step(first, batch_of(record(0, partition=2), source=1).by_user[USER], SMALL)
    assert second.num_skipped == 0
    assert second.state.position == Position(1, 2, 0)
    again = step(second.state, batch_of(record(10)).by_user[USER], SMALL)
    assert (again.num_applied, again.num_skipped) == (0, 1)


def test_a_position_of_a_later_topic_is_waited_for() -> None:
    def state_at(*position: int) -> object:
        events = batch_of(record(position[2], partition=position[1]), source=position[0])
        return step(EMPTY_STATE, events.by_user[USER], SMALL).state

    asked = Ask(USER, 1, min_partition=log_partition(1, 2), min_offset=5)
    reached = {
        (0, 2, 900): False,
        (1, 2, 4): False,
        (1, 2, 5): True,
        (1, 1, 9): False,
        (2, 0, 0): True,
    }
    for position, expected in reached.items():
        assert _reached(asked, state_at(*position)) is expected, position  # type: ignore[arg-type]
    assert split_log_partition(log_partition(3, 10_000)) == (3, 10_000)


def test_the_topics_of_a_log_are_named_after_the_first() -> None:
    topics = Topics("shop")
    assert topics.at(0).events == "shop.events"
    assert topics.at(2).events == "shop.events-2"
    assert topics.at(2).items == topics.items
    assert [source_of(topics.at(number).events) for number in (0, 1, 12)] == [0, 1, 12]
