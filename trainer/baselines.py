"""Rankings that need no model. All of them count what is known at a group's time and no later.

A group whose time is the split (see protocols.py) is thus ranked from what was known at the split.

Legend: G groups, N known events, K ranked items, I dense items (0 unknown), S steps after an event.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from features.history import known_rows
from features.sources import HOUR_MS
from trainer.batches import BatchSource
from trainer.counted import Listed, LiveSources
from trainer.dataset import Int64s, LabelGroups
from trainer.evaluate import TOP_K, Ranker
from trainer.vocabulary import UNKNOWN

Float64s = NDArray[np.float64]
# Lists as a ranker gives them, and the share of each place in what was counted: [G, K] each.
Scored = tuple[Int64s, Float64s]
ScoredRanker = Callable[[LabelGroups], Scored]

# Events of a user that the plain count looks back on.
COUNT_WINDOW = 256
# Weight of an event per event that came after it, in the recency-weighted count, and how far that
# looks back where it is not bound to the streams of a model.
DECAY = 0.995
DECAY_WINDOW = 5_000
# How often the popularity list is renewed.
POPULARITY_REFRESH_MS = 86_400_000
# Recent popularity forgets half in this time: goods are in season for weeks, news for hours.
HALF_LIFE_MS = 14 * 24 * HOUR_MS
NEWS_HALF_LIFE_MS = 3 * HOUR_MS


def popularity(source: BatchSource, *, k: int = TOP_K, repeats: bool = True) -> Ranker:
    """Rank by the number of events so far, renewed daily from the first event on."""
    log = source.log
    order = np.argsort(log.event_time_ms_N, kind="stable")
    time_ms, item = log.event_time_ms_N[order], source.item_N[order]
    cached: dict[int, Listed] = {}

    def counted_at(number: int) -> Listed:
        if number not in cached:
            known = item[: int(np.searchsorted(time_ms, number * POPULARITY_REFRESH_MS))]
            counts = np.bincount(known, minlength=1).astype(np.float64)
            counts[UNKNOWN] = 0.0
            best = np.argsort(-counts, kind="stable").astype(np.int64)
            best = best[counts[best] > 0]
            cached[number] = best, counts[best] / max(1e-9, counts.sum())
        return cached[number]

    def at(groups: LabelGroups, number: int) -> Listed:
        return counted_at(int(groups.time_ms_G[number]) // POPULARITY_REFRESH_MS)

    return lists_of(_listed(source, at, k=k, repeats=repeats))


def recent_popularity(
    source: BatchSource, live: LiveSources, *, k: int = TOP_K, repeats: bool = True
) -> ScoredRanker:
    """Rank by the number of events lately, each worth half after a half-life; see counted.py."""

    def at(groups: LabelGroups, number: int) -> Listed:
        return live.popularity.at(int(groups.time_ms_G[number]))

    return _listed(source, _in_terms_of(source, at), k=k, repeats=repeats)


def own_frequency(
    source: BatchSource, *, window: int = COUNT_WINDOW, decay: float = 1.0, k: int = TOP_K
) -> Ranker:
    """Rank the user's own items by how often they were met; see `own_shares`."""
    return lists_of(own_shares(source, window=window, decay=decay, k=k))


def own_shares(
    source: BatchSource, *, window: int = COUNT_WINDOW, decay: float = 1.0, k: int = TOP_K
) -> ScoredRanker:
    """Rank the user's own items by how often they were met, ties by the newer one.

    Args:
        source: The log whose users are ranked for.
        window: Newest events that count.
        decay: Weight per event of age; 1 is the plain count.
        k: Length of the list.
    """

    def rank(groups: LabelGroups) -> Scored:
        item = _own_items(source, groups, window)
        width = item.shape[1]
        # The newer event is worth a hair more, which decides ties and nothing else.
        place = np.arange(width)
        weight = decay ** (width - 1.0 - place) + 1e-9 * place
        return _stacked([_heaviest(row, weight, k) for row in item])

    return rank


def recency_weighted(source: BatchSource) -> Ranker:
    """The recency-weighted count over all that the streams hold."""
    return own_frequency(source, window=source.num_recent + source.num_mid, decay=DECAY)


def own_recency(source: BatchSource, *, k: int = TOP_K) -> Ranker:
    """Rank the user's own items, the newest first."""

    def rank(groups: LabelGroups) -> Int64s:
        item = _own_items(source, groups, DECAY_WINDOW)
        place = np.arange(1.0, item.shape[1] + 1)
        return _stacked([_newest(row, place, k) for row in item])[0]

    return rank


def co_occurrence(
    source: BatchSource, live: LiveSources, *, k: int = TOP_K, repeats: bool = True
) -> ScoredRanker:
    """Rank what came soon after the user's last item, for anyone and up to the group's time."""

    def at(groups: LabelGroups, number: int) -> Listed:
        one = groups.select(slice(number, number + 1))
        return live.followers.at(int(live.last_items(one)[0]), int(one.time_ms_G[0]))

    return _listed(source, _in_terms_of(source, at), k=k, repeats=repeats)


def seen_items(source: BatchSource, groups: LabelGroups, number: int) -> Int64s:
    """Every item the user of one group had met before it; a late arrival counts too."""
    first = source.log.offsets[groups.user_G[number]]
    seen: Int64s = np.unique(source.item_N[first : groups.first_row_G[number]])
    return seen


def lists_of(rank: ScoredRanker) -> Ranker:
    """The lists without their shares."""
    return lambda groups: rank(groups)[0]


def _in_terms_of(
    source: BatchSource, at: Callable[[LabelGroups, int], Listed]
) -> Callable[[LabelGroups, int], Listed]:
    """Lists of raw ids as lists of the source's items; an item it does not know is left out."""
    by_id = np.argsort(source.log.item_id_N, kind="stable")
    ids_N, item_N = source.log.item_id_N[by_id], source.item_N[by_id]

    def named(groups: LabelGroups, number: int) -> Listed:
        item_id, share = at(groups, number)
        item = item_N[np.searchsorted(ids_N, item_id)]
        return item[item != UNKNOWN], share[item != UNKNOWN]

    return named


def _listed(
    source: BatchSource,
    at: Callable[[LabelGroups, int], Listed],
    *,
    k: int,
    repeats: bool,
) -> ScoredRanker:
    """Rank each label by a list of its own, without what was met where nothing repeats."""

    def rank(groups: LabelGroups) -> Scored:
        lists = []
        for number in range(len(groups)):
            best, share = at(groups, number)
            if not repeats:
                seen = seen_items(source, groups, number)
                fresh = ~np.isin(best[: k + len(seen)], seen)
                best, share = best[: k + len(seen)][fresh], share[: k + len(seen)][fresh]
            lists.append(_padded(best[:k], share[:k], k))
        return _stacked(lists)

    return rank


def _own_items(source: BatchSource, groups: LabelGroups, window: int) -> Int64s:
    """The user's newest known items [G, N], newest last, UNKNOWN in front."""
    longest = int((groups.first_row_G - source.log.offsets[groups.user_G]).max(initial=0))
    rows, known = known_rows(source.log, groups, max(1, min(window, longest)))
    return np.where(known, source.item_N[rows], UNKNOWN)


def _heaviest(item_N: Int64s, weight_N: Float64s, k: int) -> Scored:
    items, inverse = np.unique(item_N, return_inverse=True)
    total = np.bincount(inverse, weight_N, minlength=len(items))
    return _ordered(items, total.astype(np.float64), k)


def _newest(item_N: Int64s, place_N: Float64s, k: int) -> Scored:
    # Of the reversed row the first occurrence of each item is the newest.
    items, first = np.unique(item_N[::-1], return_index=True)
    return _ordered(items, place_N[::-1][first], k)


def _ordered(items: Int64s, weight: Float64s, k: int) -> Scored:
    weight = np.where(items == UNKNOWN, 0.0, weight)
    best = np.argsort(-weight, kind="stable")[:k]
    best = best[weight[best] > 0]
    return _padded(items[best], weight[best] / max(1e-9, weight.sum()), k)


def _padded(items: Int64s, share: Float64s, k: int) -> Scored:
    missing = k - len(items)
    return np.pad(items, (0, missing), constant_values=UNKNOWN), np.pad(share, (0, missing))


def _stacked(lists: list[Scored]) -> Scored:
    items, shares = zip(*lists, strict=True)
    return np.stack(items), np.stack(shares)
