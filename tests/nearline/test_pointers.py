"""Goal: Redis' pointers are the control topic's newest, whatever Redis was restored to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.redis import CatalogueStore, Pointers
from streams.control import write_pointers
from streams.pointer_follower import PointerFollower

if TYPE_CHECKING:
    from streams.kafka import KafkaConfig
    from streams.log_reader import LogReader
    from streams.topics import Topics


@pytest.fixture
def follower(reader: LogReader, topics: Topics, catalogue: CatalogueStore) -> PointerFollower:
    """What heals."""
    return PointerFollower(reader, topics.control, catalogue)


def test_the_newest_record_wins_over_whatever_redis_says(
    kafka: KafkaConfig, topics: Topics, follower: PointerFollower, catalogue: CatalogueStore
) -> None:
    catalogue.put_pointers(Pointers(1, 1))
    assert not follower.heal()
    assert catalogue.get_pointers() == Pointers(1, 1)
    for newest in (Pointers(7, 2), Pointers(8, 3)):
        write_pointers(kafka, topics, newest)
        assert follower.heal()
        assert catalogue.get_pointers() == newest
        assert not follower.heal()
    catalogue.client.flushall()
    assert follower.heal()
    catalogue.put_pointers(Pointers(7, 2))
    assert follower.heal()
    assert catalogue.get_pointers() == Pointers(8, 3)


def test_a_promotion_during_the_healing_is_not_taken_back(
    kafka: KafkaConfig,
    topics: Topics,
    follower: PointerFollower,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_pointers(kafka, topics, Pointers(1, 1))
    put, newer = CatalogueStore.put_pointers, [Pointers(2, 2)]

    def put_late(self: CatalogueStore, pointers: Pointers) -> None:
        # Between reading the topic and writing to Redis somebody promotes: topic, then Redis.
        while newer:
            write_pointers(kafka, topics, newer[0])
            put(self, newer.pop())
        put(self, pointers)

    monkeypatch.setattr(CatalogueStore, "put_pointers", put_late)
    assert follower.heal()
    assert follower.catalogue.get_pointers() == Pointers(2, 2)
