"""Popularity over integer hours: which tile an event counts in, and what tiles add up to. Pure."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.nearline import HOUR_MS, TILE_HOURS_MAX, Tile
from features.redis import Trending
from features.sources import (
    HALF_LIFE_H_DEFAULT,
    NUM_COUNTED,
    POPULARITY_HOURS_MAX,
    popularity_hours,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

    from features.nearline import Counts, Int64s, Uint64s
    from features.state import Accepted

WEEK_HOURS: Final = POPULARITY_HOURS_MAX
TRENDING_K: Final = NUM_COUNTED
# Domains with a list of their own, the busiest first; users of a rarer one get the whole's list.
DOMAINS_MAX: Final = 1_000


def hour_of(time_ms: int) -> int:
    """Return the hour since 1970 that a time lies in.

    >>> hour_of(3_599_999), hour_of(3_600_000)
    (0, 1)
    """
    return time_ms // HOUR_MS


def count_events(events: Iterable[Accepted]) -> dict[int, Counts]:
    """Return events by hour and (domain, item).

    One that was already too old for every window when the broker took it is left out: by its
    append time, never by a clock, so that counting again counts alike.
    """
    counts: dict[int, Counts] = defaultdict(lambda: defaultdict(int))
    for event in events:
        if event.is_forget:
            continue
        hour = event.event_time_ms // HOUR_MS
        if hour > event.append_time_ms // HOUR_MS - TILE_HOURS_MAX:
            counts[hour][event.domain, event.item_id] += 1
    return counts


def window_hours(now_ms: int, num_hours: int) -> range:
    """Return the hours of a window that ends with the hour of the clock, oldest first."""
    last = hour_of(now_ms)
    return range(last - num_hours + 1, last + 1)


class Weighted(NamedTuple):
    """Tiles added up: (domain, item) pairs sorted by item, then domain, each once."""

    domain: Uint64s
    item_id: Int64s
    score: np.ndarray[tuple[int], np.dtype[np.float64]]


def rank(
    tiles: Iterable[tuple[int, Tile]],
    now_ms: int,
    *,
    half_life_h: int = HALF_LIFE_H_DEFAULT,
    k: int = TRENDING_K,
) -> Trending:
    """Return the K items with the most decayed events lately, best first.

    Args:
        tiles: (hour, tile), each pair once, in any order; hours too long ago do not count.
        now_ms: the clock; an hour that has not begun does not count.
        half_life_h: hours in which an event's weight halves; decides how long ago is too long.
        k: items at most.
    """
    added = _decayed(tiles, now_ms, half_life_h)
    return _best(added.item_id, added.score, k, half_life_h)


def rank_by_domain(
    tiles: Iterable[tuple[int, Tile]],
    now_ms: int,
    *,
    half_life_h: int = HALF_LIFE_H_DEFAULT,
    k: int = TRENDING_K,
) -> dict[int, Trending]:
    """Return the same for each of the busiest domains, by the domain's hash."""
    added = _decayed(tiles, now_ms, half_life_h)
    domains, inverse = np.unique(added.domain, return_inverse=True)
    totals = np.bincount(inverse, added.score, minlength=domains.size)
    ranked = {}
    for at in np.lexsort((domains, -totals))[:DOMAINS_MAX]:
        inside = inverse == at
        ranked[int(domains[at])] = _best(added.item_id[inside], added.score[inside], k, half_life_h)
    return ranked


def total_by_item(tiles: Iterable[tuple[int, Tile]], hours: range) -> dict[int, int]:
    """Return every item's events in those hours; an item without any is left out."""
    inside = [tile for hour, tile in tiles if hour in hours]
    if not inside:
        return {}
    items = np.concatenate([tile.item_id for tile in inside])
    counts = np.concatenate([tile.num_events for tile in inside])
    each, inverse = np.unique(items, return_inverse=True)
    totals = np.zeros(each.size, np.int64)
    np.add.at(totals, inverse, counts)
    return dict(zip(each.tolist(), totals.tolist(), strict=True))


def _decayed(tiles: Iterable[tuple[int, Tile]], now_ms: int, half_life_h: int) -> Weighted:
    """Return the tiles that count added up.

    Whole events are added first and weighted after, hour by hour from the oldest: floating-point
    sums depend on their order, and the same tiles must give the same scores.
    """
    by_hour = defaultdict(list)
    for hour, tile in tiles:
        by_hour[hour].append(tile)
    hours = [
        hour for hour in window_hours(now_ms, popularity_hours(half_life_h)) if hour in by_hour
    ]
    inside = [tile for hour in hours for tile in by_hour[hour]]
    if not inside:
        return Weighted(np.array([], np.uint64), np.array([], np.int64), np.array([], np.float64))
    place = np.empty(sum(tile.item_id.size for tile in inside), [("i", "<i8"), ("d", "<u8")])
    place["i"] = np.concatenate([tile.item_id for tile in inside])
    place["d"] = np.concatenate([tile.domain for tile in inside])
    pairs, inverse = np.unique(place, return_inverse=True)
    score = np.zeros(pairs.size)
    end = 0
    for hour in hours:
        counts = np.concatenate([tile.num_events for tile in by_hour[hour]])
        begin, end = end, end + counts.size
        whole = np.bincount(inverse[begin:end], counts, minlength=pairs.size)
        score += whole * 0.5 ** ((hour_of(now_ms) - hour) / half_life_h)
    return Weighted(pairs["d"], pairs["i"], score)


def _best(
    items: Int64s,
    scores: np.ndarray[tuple[int], np.dtype[np.float64]],
    k: int,
    half_life_h: int,
) -> Trending:
    each, inverse = np.unique(items, return_inverse=True)
    totals = np.bincount(inverse, scores, minlength=each.size).round(6)
    best = np.lexsort((each, -totals))[:k]
    return Trending(
        tuple(each[best].tolist()),
        tuple(totals[best].tolist()),
        round(float(totals.sum()), 6),
        half_life_h,
    )
