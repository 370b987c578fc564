"""Goal: tiles add up to what a count over the list of events says, however they are cut."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.nearline import TILE_HOURS_MAX, Tile
from features.state import Accepted, Position
from streams.trending import (
    DOMAINS_MAX,
    count_events,
    hour_of,
    rank,
    rank_by_domain,
    total_by_item,
    window_hours,
)
from tests.nearline.traffic import HOUR_MS, popularity

NOW_MS = 500_000 * HOUR_MS + 1_234


def event(item: int, time_ms: int, *, domain: int = 0, append_ms: int = NOW_MS) -> Accepted:
    """Return as much of an event as is counted."""
    return Accepted(Position(0, 0, 0), append_ms, item, time_ms, domain, 0, 0, 0.0, 1)


def as_tiles(events: list[Accepted], parts: int = 1) -> list[tuple[int, Tile]]:
    """Return the tiles of events dealt out to several partitions."""
    tiles = []
    for part in range(parts):
        for hour, counts in count_events(events[part::parts]).items():
            places = list(counts)
            tiles.append(
                (
                    hour,
                    Tile(
                        np.array([domain for domain, _ in places], np.uint64),
                        np.array([item for _, item in places], np.int64),
                        np.array(list(counts.values()), np.int64),
                    ),
                )
            )
    return tiles


@given(st.integers(0, 2**32), st.integers(1, 4))
def test_equal_to_counting_one_by_one(seed: int, parts: int) -> None:
    source = random.Random(seed)
    events = [
        event(
            source.choice([0, 1, 5, 2**63 - 1]),
            NOW_MS - source.randrange(-HOUR_MS, 9 * 24 * HOUR_MS),
            domain=source.choice([0, 7, 2**64 - 1]),
        )
        for _ in range(source.randrange(200))
    ]
    expected = popularity(events, NOW_MS)
    tiles = as_tiles(events, parts)
    assert total_by_item(tiles, window_hours(NOW_MS, 24)) == dict(expected.day)
    assert total_by_item(tiles, window_hours(NOW_MS, 168)) == dict(expected.week)
    trending = rank(tiles, NOW_MS)
    assert dict(zip(trending.item_ids, trending.scores, strict=True)) == pytest.approx(
        expected.score, abs=1e-5
    )
    assert list(trending.scores) == sorted(trending.scores, reverse=True)
    by_domain = rank_by_domain(tiles, NOW_MS)
    assert by_domain.keys() == expected.by_domain.keys()
    for domain, ranked in by_domain.items():
        found = dict(zip(ranked.item_ids, ranked.scores, strict=True))
        assert found == pytest.approx(expected.by_domain[domain], abs=1e-5)


def test_dealing_events_out_does_not_move_a_score() -> None:
    source = random.Random(3)
    events = [
        event(source.randrange(30), NOW_MS - source.randrange(24 * HOUR_MS)) for _ in range(3_000)
    ]
    assert len({rank(as_tiles(events, parts), NOW_MS) for parts in (1, 2, 3, 7)}) == 1


def test_edges_of_the_windows() -> None:
    first_ms = (hour_of(NOW_MS) - 23) * HOUR_MS
    events = [event(1, first_ms), event(2, first_ms - 1), event(3, NOW_MS + HOUR_MS)]
    assert rank(as_tiles(events), NOW_MS).item_ids == (1,)
    assert rank(as_tiles(events), NOW_MS + HOUR_MS).item_ids == (3,)
    assert total_by_item(as_tiles(events), window_hours(NOW_MS, 168)) == {1: 1, 2: 1}


def test_equal_scores_go_by_item_and_only_k_are_taken() -> None:
    events = [event(item, NOW_MS) for item in (9, 3, 7, 3, 5)]
    assert rank(as_tiles(events), NOW_MS, k=3).item_ids == (3, 5, 7)
    assert rank([], NOW_MS).item_ids == ()
    assert rank_by_domain([], NOW_MS) == {}


def test_an_event_too_old_when_it_came_is_not_counted_and_no_clock_is_asked() -> None:
    oldest = hour_of(NOW_MS) - TILE_HOURS_MAX
    events = [event(1, (oldest + 1) * HOUR_MS), event(2, (oldest + 1) * HOUR_MS - 1)]
    assert Counter(count_events(events).keys()) == {oldest + 1: 1}


def test_the_busiest_domains_have_a_list() -> None:
    events = [event(1, NOW_MS, domain=domain) for domain in range(DOMAINS_MAX + 5)]
    events += [event(2, NOW_MS, domain=DOMAINS_MAX + 4)] * 2
    ranked = rank_by_domain(as_tiles(events), NOW_MS)
    assert len(ranked) == DOMAINS_MAX
    assert ranked[DOMAINS_MAX + 4].item_ids == (2, 1)
