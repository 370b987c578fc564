"""Rankings that need no model. All of them count what is known at a group's time and no later.

A group whose time is the split (see protocols.py) is thus ranked from what was known at the split.

Legend: G groups, N known events, K ranked items, I dense items (0 unknown), S steps after an event.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from features.history import known_rows
from trainer.batches import BatchSource
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
# Recent popularity forgets half in this time: goods are in season for weeks, news for hours. Its
# list is renewed so many times within it, and events older than so many of it weigh nothing.
HALF_LIFE_MS = 14 * 86_400_000
NEWS_HALF_LIFE_MS = 3 * 3_600_000
REFRESHES_PER_HALF_LIFE = 12
HALF_LIVES_COUNTED = 10
# Co-occurrence looks at the newest so many events with the user's last item, whoever's they were,
# and at so many events after each; the s-th after weighs 1 / s.
NUM_OCCURRENCES = 1_000
NUM_STEPS = 5


def popularity(source: BatchSource, *, k: int = TOP_K, repeats: bool = True) -> Ranker:
    """Rank by the number of events so far, renewed daily from the first event on."""
    return lists_of(
        _renewed(source, k=k, repeats=repeats, refresh_ms=POPULARITY_REFRESH_MS, half_life_ms=None)
    )


def recent_popularity(
    source: BatchSource, *, half_life_ms: int, k: int = TOP_K, repeats: bool = True
) -> ScoredRanker:
    """Rank by the number of events so far, each worth half after a half-life."""
    refresh_ms = half_life_ms // REFRESHES_PER_HALF_LIFE
    return _renewed(source, k=k, repeats=repeats, refresh_ms=refresh_ms, half_life_ms=half_life_ms)


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


def co_occurrence(source: BatchSource, *, k: int = TOP_K, repeats: bool = True) -> ScoredRanker:
    """Rank what came soon after the user's last item, for anyone and up to the group's time."""
    log = source.log
    by_item = np.lexsort((log.event_time_ms_N, source.item_N))
    sorted_item, sorted_ms = source.item_N[by_item], log.event_time_ms_N[by_item]

    def one(last: int, time_ms: int) -> tuple[Int64s, NDArray[np.float64]]:
        begin, end = np.searchsorted(sorted_item, (last, last + 1))
        end = begin + np.searchsorted(sorted_ms[begin:end], time_ms)
        rows_N = by_item[max(begin, end - NUM_OCCURRENCES) : end]
        after_NS = rows_N[:, None] + np.arange(1, NUM_STEPS + 1)
        inside_NS = after_NS < log.num_events
        after_NS = np.minimum(after_NS, log.num_events - 1)
        inside_NS &= log.user_N[after_NS] == log.user_N[rows_N][:, None]
        inside_NS &= log.event_time_ms_N[after_NS] < time_ms
        weight_NS = np.broadcast_to(1.0 / np.arange(1, NUM_STEPS + 1), after_NS.shape)
        return source.item_N[after_NS[inside_NS]], weight_NS[inside_NS]

    def rank(groups: LabelGroups) -> Scored:
        last = _own_items(source, groups, 1)[:, -1]
        lists = []
        for number, (item, time_ms) in enumerate(
            zip(last.tolist(), groups.time_ms_G.tolist(), strict=True)
        ):
            after, weight = one(item, time_ms) if item != UNKNOWN else _NOTHING
            if not repeats:
                fresh = ~np.isin(after, seen_items(source, groups, number))
                after, weight = after[fresh], weight[fresh]
            lists.append(_heaviest(after, weight, k))
        return _stacked(lists)

    return rank


_NOTHING = (np.zeros(0, np.int64), np.zeros(0))


def seen_items(source: BatchSource, groups: LabelGroups, number: int) -> Int64s:
    """Every item the user of one group had met before it; a late arrival counts too."""
    first = source.log.offsets[groups.user_G[number]]
    seen: Int64s = np.unique(source.item_N[first : groups.first_row_G[number]])
    return seen


def lists_of(rank: ScoredRanker) -> Ranker:
    """The lists without their shares."""
    return lambda groups: rank(groups)[0]


def _renewed(
    source: BatchSource, *, k: int, repeats: bool, refresh_ms: int, half_life_ms: int | None
) -> ScoredRanker:
    """Rank by counts that are taken anew each time a refresh is due."""
    log = source.log
    order = np.argsort(log.event_time_ms_N, kind="stable")
    time_ms, item = log.event_time_ms_N[order], source.item_N[order]
    num_items = int(item.max(initial=0)) + 1
    cached: dict[int, Scored] = {}

    def counted_at(number: int) -> Scored:
        if number not in cached:
            now_ms = number * refresh_ms
            known = slice(0, int(np.searchsorted(time_ms, now_ms)))
            weight = None
            if half_life_ms is not None:
                oldest_ms = now_ms - HALF_LIVES_COUNTED * half_life_ms
                known = slice(int(np.searchsorted(time_ms, oldest_ms)), known.stop)
                weight = 0.5 ** ((now_ms - time_ms[known]) / half_life_ms)
            counts = np.bincount(item[known], weight, minlength=num_items).astype(np.float64)
            counts[UNKNOWN] = 0.0
            best = np.argsort(-counts, kind="stable").astype(np.int64)
            best = best[counts[best] > 0]
            cached[number] = best, counts[best] / max(1e-9, counts.sum())
        return cached[number]

    def rank(groups: LabelGroups) -> Scored:
        lists = []
        for number, refresh in enumerate((groups.time_ms_G // refresh_ms).tolist()):
            best, share = counted_at(refresh)
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
