"""Goal: what follows an item is what a walk over everybody's events says, and is counted once."""

from __future__ import annotations

import random
from collections import defaultdict
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.errors import CorruptRowError
from features.followers import (
    FOLLOWERS_MAX,
    NO_FOLLOWERS,
    NO_LIST,
    Followers,
    added,
    changed_key,
    decode_followers,
    decode_list,
    encode_followers,
    encode_list,
    followers_key,
    list_key,
    read_changed,
    read_followers,
    read_lists,
    settle,
)
from features.nearline import HOUR_MS, TileStore
from features.redis import Pointers
from features.sources import NUM_STEPS
from features.state import RECORD, Accepted, Position
from streams.follower_lists import FollowerCounter, FollowerLists
from streams.followers import counts_of, pairs_of
from streams.tiles import TileCounter
from tests.nearline.traffic import Recent
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import accepted_of, publish

if TYPE_CHECKING:
    from collections.abc import Iterable

    from features.redis import CatalogueStore, StateStore
    from features.view import Records
    from streams.kafka import KafkaConfig
    from streams.log_reader import LogReader
    from streams.topics import Topics

NOW_MS = 500_000 * HOUR_MS
NO_RECORDS = np.zeros(0, RECORD)


def event(item: int, *, minute: int, number: int) -> Accepted:
    """Return one of a user's events; its number makes it different from the others."""
    time_ms = NOW_MS + minute * 60_000
    return Accepted(Position(0, 0, number), time_ms, item, time_ms, 0, number, 0, 0.0, 1)


def record(one: Accepted, ordinal: int) -> Records:
    """Return the record that a row holds of an event."""
    row = np.zeros(1, RECORD)
    row["item_id"], row["event_time_ms"] = one.item_id, one.event_time_ms
    row["event_hash"], row["ordinal"] = one.event_hash, ordinal
    return row


def steps_of(events: Iterable[Accepted], known: Records = NO_RECORDS) -> list[tuple[int, int, int]]:
    return sorted((one.item_id, one.after, one.step) for one in pairs_of(list(events), known))


def walked(events: list[Accepted]) -> dict[tuple[int, int], float]:
    """Return what a walk over a user's events finds, steps of one hour weighing 1 / s."""
    found: dict[tuple[int, int], float] = defaultdict(float)
    for place, one in enumerate(events):
        for step in range(1, min(NUM_STEPS, place) + 1):
            found[events[place - step].item_id, one.item_id] += 1.0 / step
    return dict(found)


def test_an_event_follows_the_three_before_it() -> None:
    events = [event(item, minute=item, number=item) for item in range(1, 6)]
    assert steps_of(events) == [
        (1, 2, 1), (1, 3, 2), (1, 4, 3),
        (2, 3, 1), (2, 4, 2), (2, 5, 3),
        (3, 4, 1), (3, 5, 2),
        (4, 5, 1),
    ]  # fmt: skip


def test_what_came_before_the_stretch_stands_in_the_row() -> None:
    events = [event(item, minute=item, number=item) for item in range(1, 5)]
    rows = np.concatenate([record(one, number) for number, one in enumerate(events)])
    assert steps_of(events[3:], rows[:3]) == [(1, 4, 3), (2, 4, 2), (3, 4, 1)]
    assert steps_of(events[3:], rows) == [(1, 4, 3), (2, 4, 2), (3, 4, 1)], "it may be ahead"
    assert steps_of(events[:2], rows) == [(1, 2, 1)], "what comes later follows when it is counted"


def test_a_repeat_and_a_forget_follow_nothing() -> None:
    one, two = event(1, minute=1, number=1), event(2, minute=2, number=2)
    assert steps_of([one, two, two]) == [(1, 2, 1)]
    forget = Accepted(Position(0, 0, 9), NOW_MS, 0, NOW_MS, 0, 9, 0, 0.0, 255)
    assert forget.is_forget
    assert steps_of([one, forget, two]) == [(1, 2, 1)]


@given(st.integers(0, 2**32))
def test_stretches_cut_anywhere_count_alike(seed: int) -> None:
    """Counted stretch by stretch, with the row as far as the worker is, equals one walk."""
    source = random.Random(seed)
    events = [event(source.randrange(4), minute=n, number=n + 1) for n in range(12)]
    rows = np.concatenate([record(one, number) for number, one in enumerate(events)])
    counts: dict[int, Followers] = {}
    begin = 0
    while begin < len(events):
        end = source.randint(begin + 1, len(events))
        ahead = source.randint(begin, len(events))
        for item, new in counts_of(pairs_of(events[begin:end], rows[:ahead]), 48).items():
            counts[item] = added([counts.get(item, NO_FOLLOWERS), new], 48, num_max=FOLLOWERS_MAX)
        begin = end
    found = {
        (item, after): weight
        for item, one in counts.items()
        for after, weight in zip(one.item_id.tolist(), one.weight.tolist(), strict=True)
    }
    assert found == pytest.approx(walked(events))


def test_weights_halve_and_the_lightest_go() -> None:
    old = Followers(100, 3.0, np.array([1, 2]), np.array([2.0, 1.0]))
    new = Followers(148, 1.5, np.array([2, 3]), np.array([1.0, 0.5]))
    both = added([old, new], 48, num_max=10)
    assert (both.hour, both.total) == (148, 3.0)
    assert dict(zip(both.item_id.tolist(), both.weight.tolist(), strict=True)) == {
        2: 1.5,
        1: 1.0,
        3: 0.5,
    }
    assert both.item_id.tolist() == [2, 1, 3], "heaviest first"
    kept = added([new, old], 48, num_max=2)
    assert (kept.item_id.tolist(), kept.total) == ([2, 1], 3.0), "what goes stays in the total"


def test_bytes() -> None:
    one = Followers(490_000, 2.5, np.array([7, 2**63 - 1]), np.array([1.5, 0.25]))
    raw = encode_followers(one)
    assert raw.hex() == (
        "0100" "0200" "107a070000000000" "0000000000000440"
        "0700000000000000" "000000000000f83f" "ffffffffffffff7f" "000000000000d03f"
    )  # fmt: skip
    read = decode_followers(raw)
    assert (read.hour, read.total) == (490_000, 2.5)
    assert (read.item_id.tolist(), read.weight.tolist()) == ([7, 2**63 - 1], [1.5, 0.25])
    listed = encode_list(one)
    assert listed.hex() == "07000000000000009a99193fffffffffffffff7fcdcccc3d"
    assert decode_list(listed).item_id.tolist() == [7, 2**63 - 1]
    assert decode_list(None) is decode_list(listed[:-1]) is NO_LIST
    assert decode_followers(None) is NO_FOLLOWERS
    for damaged in (raw[:-1], b"short", b"\2" + raw[1:]):
        with pytest.raises(CorruptRowError, match="delete the key"):
            decode_followers(damaged)


def test_keys() -> None:
    assert followers_key(1, 3, 42) == "moveline:{t3}:g1:after:42"
    assert changed_key(1, 3) == "moveline:{t3}:g1:after-changed"
    assert list_key(42) == "moveline:after:42"


def test_from_the_log_to_the_lists(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    catalogue: CatalogueStore,
    reader: LogReader,
    partitions: int,
) -> None:
    """Hints doubled and late, a worker ahead, two turns: lists equal a walk over all events."""
    counter = FollowerCounter(store)
    tiles = TileStore(store.client, store.generation)
    tile_counter = TileCounter(reader, topics.events, tiles, store.config, followers=counter)
    lists = FollowerLists(counter, catalogue, partitions)
    traffic, sent = Recent(seed=5, num_users=60, num_events=1_500).make(1_500), []
    with running(kafka, topics, store) as worker:
        for part in (traffic[:700], traffic[700:]):
            publish(kafka, topics.events, part)
            sent += part
            wait_caught_up(kafka, topics, worker)
            for partition in (*range(partitions), 0, 1):
                assert tile_counter.advance(partition, budget_s=30) == 0
            assert lists.put() > 0
            assert lists.put() == 0, "all of them are settled"
    expected: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    for of_user in accepted_of(kafka, topics, sent, store.config).values():
        told = {one.event_hash: one for one in reversed(of_user)}.values()
        in_time = sorted(told, key=lambda one: (one.event_time_ms, one.position.offset))
        for pair in pairs_of(in_time, NO_RECORDS):
            weight = 0.5 ** (-(pair.hour - NOW_MS // HOUR_MS) / counter.half_life_h) / pair.step
            expected[pair.item_id][pair.after] += weight
    items = sorted(expected)
    alike = 0.0
    for item, found in zip(items, read_lists(store.client, items), strict=True):
        total = sum(expected[item].values())
        got = dict(zip(found.item_id.tolist(), found.share.tolist(), strict=True))
        alike += sum(min(weight / total, got.get(one, 0)) for one, weight in expected[item].items())
    assert alike / len(items) > 0.95, "only events that came late find others before them"


def test_what_is_counted_twice_is_refused(store: StateStore, catalogue: CatalogueStore) -> None:
    tiles = TileStore(store.client, store.generation)
    one = Followers(9, 1.0, np.array([7]), np.array([1.0]))
    assert tiles.add(0, {}, expected=None, advance_to=5, followers={3: one}, followers_kept_s=60)
    two = one._replace(total=2.0)
    assert not tiles.add(
        0, {}, expected=None, advance_to=5, followers={3: two}, followers_kept_s=60
    )
    (held,) = read_followers(store.client, store.generation, [(0, 3)])
    assert held.total == 1.0
    assert read_changed(store.client, store.generation, range(2)) == {0: {3: 5}, 1: {}}
    assert 0 < store.client.ttl(followers_key(store.generation, 0, 3)) <= 60
    lists = FollowerLists(FollowerCounter(store), catalogue, 2)
    catalogue.put_pointers(Pointers(None, store.generation + 1))
    assert lists.put() == 0, "another generation is live"
    catalogue.put_pointers(Pointers(None, store.generation))
    assert lists.put() == 1
    (found,) = read_lists(store.client, [3])
    assert (found.item_id.tolist(), found.share.tolist()) == ([7], [1.0])


def test_what_changed_again_stays_to_be_done(store: StateStore) -> None:
    tiles = TileStore(store.client, store.generation)
    one = Followers(9, 1.0, np.array([7]), np.array([1.0]))
    tiles.add(0, {}, expected=None, advance_to=5, followers={3: one, 4: one}, followers_kept_s=60)
    seen = read_changed(store.client, store.generation, [0])[0]
    tiles.add(0, {}, expected=5, advance_to=8, followers={3: one}, followers_kept_s=60)
    settle(store.client, store.generation, 0, seen)
    assert read_changed(store.client, store.generation, [0]) == {0: {3: 8}}
