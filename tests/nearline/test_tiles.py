"""Goal: what is counted is counted once: hints lost, doubled, late; Redis older; two apps.

The tiles in the real Redis, filled from the real log, are compared with a count over all events.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from features.clock import now_ms
from features.errors import StoreUnavailableError
from features.nearline import TileStore, marks_key
from features.redis import CatalogueStore, Pointers, StateStore, Trending, connect
from streams.tiles import Popularity, TileCounter
from streams.trending import count_events, total_by_item, window_hours
from tests.nearline.traffic import Recent
from tests.worker.traffic import accepted_of, publish

if TYPE_CHECKING:
    from collections.abc import Mapping

    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.log_reader import LogReader
    from streams.topics import Topics
    from tests.worker.traffic import Sent

NUM_EVENTS = 3_000


@pytest.fixture
def sent(kafka: KafkaConfig, topics: Topics) -> list[Sent]:
    """Records in the topic."""
    records = Recent(seed=5, num_users=80, num_events=NUM_EVENTS).make(NUM_EVENTS)
    publish(kafka, topics.events, records)
    return records


@pytest.fixture
def counter(reader: LogReader, topics: Topics, store: StateStore) -> TileCounter:
    """What counts them."""
    tiles = TileStore(store.client, store.generation)
    return TileCounter(reader, topics.events, tiles, store.config)


def events_of(
    kafka: KafkaConfig, topics: Topics, sent: list[Sent], store: StateStore
) -> list[Accepted]:
    """Return the events that count, of all users."""
    by_user = accepted_of(kafka, topics, sent, store.config)
    return [event for of_user in by_user.values() for event in of_user]


def counted(tiles: TileStore, partitions: int) -> dict[int, dict[tuple[int, int], int]]:
    """Return what Redis holds by hour and (domain, item), partitions added up."""
    found: dict[int, Counter[tuple[int, int]]] = {}
    for partition in range(partitions):
        for hour, tile in tiles.read(partition, list(window_hours(now_ms(), 192))).items():
            columns = (tile.domain.tolist(), tile.item_id.tolist(), tile.num_events.tolist())
            for domain, item, count in zip(*columns, strict=True):
                found.setdefault(hour, Counter())[domain, item] += count
    return {hour: dict(counts) for hour, counts in found.items()}


def expected(events: list[Accepted]) -> dict[int, dict[tuple[int, int], int]]:
    """Return a count over the list."""
    return {hour: dict(counts) for hour, counts in count_events(events).items()}


def test_hints_lost_doubled_and_late(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    counter: TileCounter,
    sent: list[Sent],
    partitions: int,
) -> None:
    # Doubled for 0, late for 1 (after everything else), lost for 2 until its next one.
    for partition in (0, 0, 2, 2, 0, 1, 1):
        assert counter.advance(partition, budget_s=30) == 0
    events = events_of(kafka, topics, sent, store)
    assert counted(counter.tiles, partitions) == expected(events)
    more = Recent(seed=6, num_users=80).make(500)
    publish(kafka, topics.events, more)
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    events = events_of(kafka, topics, [*sent, *more], store)
    assert counted(counter.tiles, partitions) == expected(events)
    assert counter.metrics.registry.get_sample_value("moveline_nearline_events_total") == len(
        events
    )


def test_work_that_ends_early_goes_on_where_it_stood(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    counter: TileCounter,
    sent: list[Sent],
    partitions: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.tiles.STRETCH_RECORDS", 100)
    rounds = 0
    while sum([counter.advance(p, budget_s=0) for p in range(partitions)]):
        rounds += 1
    assert rounds > 3
    events = events_of(kafka, topics, sent, store)
    assert counted(counter.tiles, partitions) == expected(events)


def test_a_second_app_at_the_same_place_is_refused(
    kafka: KafkaConfig, topics: Topics, store: StateStore, counter: TileCounter, sent: list[Sent]
) -> None:
    before = counter.tiles.marks(0)
    counter.advance(0, budget_s=30)
    after = counter.tiles.marks(0)
    assert before.next_offset is None
    assert after.next_offset
    # A zombie that had read the same stretch: from nothing, and from the middle.
    for stood in (None, 5):
        assert not counter.tiles.add(
            0, {1: {(0, 0): 1}}, expected=stood, advance_to=after.next_offset
        )
    assert counter.tiles.marks(0) == after
    only = [e for e in events_of(kafka, topics, sent, store) if e.position.partition == 0]
    assert counted(counter.tiles, 1) == expected(only)


def test_a_redis_that_went_back_is_counted_up_again(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    counter: TileCounter,
    sent: list[Sent],
    partitions: int,
) -> None:
    client = store.client
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    pattern = f"moveline:{{t*:g{store.generation}:*"
    snapshot = {key: client.dump(key) for key in client.keys(pattern)}
    more = Recent(seed=8, num_users=80).make(500)
    publish(kafka, topics.events, more)
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    client.delete(*client.keys(pattern))
    for key, value in snapshot.items():
        client.restore(key, 0, value)
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    events = events_of(kafka, topics, [*sent, *more], store)
    assert counted(counter.tiles, partitions) == expected(events)
    client.delete(*client.keys(pattern))
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    assert counted(counter.tiles, partitions) == expected(events)


def test_a_first_start_reads_only_what_a_window_can_see(
    topics: Topics, store: StateStore, counter: TileCounter, sent: list[Sent]
) -> None:
    del sent
    counter.clock = lambda: now_ms() + 30 * 24 * 3_600_000
    assert counter.advance(0, budget_s=30) == 0
    assert counted(counter.tiles, 1) == {}
    assert counter.tiles.marks(0).next_offset is None
    del topics, store


class Pushed:
    """Takes statistics; Feast's side is tested in test_statistics.py."""

    def __init__(self) -> None:
        self.rows: list[dict[int, tuple[int, int]]] = []

    def push(self, rows: Mapping[int, tuple[int, int]], at_ms: int) -> None:
        """Keep the rows."""
        assert at_ms > 0
        self.rows.append(dict(rows))


def test_statistics_are_pushed_once_and_again_when_they_change(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    counter: TileCounter,
    sent: list[Sent],
    partitions: int,
    catalogue: CatalogueStore,
) -> None:
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    pushed, clock_ms = Pushed(), now_ms()
    popularity = Popularity(counter.tiles, catalogue, partitions, pushed, clock=lambda: clock_ms)
    events = events_of(kafka, topics, sent, store)
    tiles = list(popularity._tiles())
    assert tiles == []
    num_rows = popularity.push_statistics()
    hours = window_hours(clock_ms, 24)
    day = Counter(e.item_id for e in events if e.event_time_ms // 3_600_000 in hours)
    week = Counter(e.item_id for e in events)
    assert pushed.rows == [{item: (day[item], week[item]) for item in week}]
    assert num_rows == len(week)
    assert popularity.push_statistics() == 0
    clock_ms += 8 * 24 * 3_600_000
    assert popularity.push_statistics() == len(week)
    assert set(pushed.rows[1].values()) == {(0, 0)}
    assert total_by_item(popularity._tiles(), window_hours(clock_ms, 168)) == {}


def test_trending_is_left_alone_when_there_is_none_or_another_generation_is_live(
    counter: TileCounter, sent: list[Sent], partitions: int, catalogue: CatalogueStore
) -> None:
    del sent
    before = Trending((1,), (2.0,))
    catalogue.put_trending(before)
    popularity = Popularity(counter.tiles, catalogue, partitions, Pushed())
    assert popularity.put_trending() is None
    assert catalogue.get_trending() == before
    for partition in range(partitions):
        counter.advance(partition, budget_s=30)
    catalogue.put_pointers(Pointers(1, counter.tiles.generation + 1))
    assert popularity.put_trending() is None
    assert catalogue.get_trending() == before
    catalogue.put_pointers(Pointers(1, counter.tiles.generation))
    assert popularity.put_trending() == catalogue.get_trending() != before


def test_marks_of_expired_hours_go(
    counter: TileCounter, sent: list[Sent], partitions: int, catalogue: CatalogueStore
) -> None:
    del sent
    counter.advance(0, budget_s=30)
    assert counter.tiles.marks(0).changed_at
    ahead_ms = now_ms() + 10 * 24 * 3_600_000
    popularity = Popularity(counter.tiles, catalogue, partitions, Pushed(), clock=lambda: ahead_ms)
    popularity.put_trending()
    marks = counter.tiles.marks(0)
    assert marks.next_offset
    assert not marks.changed_at
    ttl_s = counter.tiles.client.ttl(marks_key(counter.tiles.generation, 0))
    assert ttl_s == -1


def test_a_redis_that_is_away_is_an_error_of_ours(store: StateStore) -> None:
    nobody = TileStore(connect("redis://127.0.0.1:9/0"), store.generation)
    with pytest.raises(StoreUnavailableError):
        nobody.marks(0)
    with pytest.raises(StoreUnavailableError):
        nobody.add(0, {}, expected=None, advance_to=1)
