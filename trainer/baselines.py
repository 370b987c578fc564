"""Rankings that need no model.

Legend: G groups, N known events, K ranked items.
"""

import numpy as np
from numpy.typing import NDArray

from trainer.batches import BatchSource
from trainer.dataset import Int64s, LabelGroups
from trainer.evaluate import TOP_K, Ranker
from trainer.vocabulary import UNKNOWN

# Events of a user that the plain count looks back on.
COUNT_WINDOW = 256
# Weight of an event per event that came after it, in the recency-weighted count.
DECAY = 0.995
# How often the popularity list is renewed.
POPULARITY_REFRESH_MS = 86_400_000


def popularity(source: BatchSource) -> Ranker:
    """Rank by the number of events so far, renewed daily from the first event on."""
    log = source.log
    order = np.argsort(log.event_time_ms_N, kind="stable")
    time_ms, item = log.event_time_ms_N[order], source.item_N[order]
    num_items = max(TOP_K, int(item.max(initial=0)) + 1)
    cached: dict[int, Int64s] = {}

    def top_on(day: int) -> Int64s:
        if day not in cached:
            known = np.searchsorted(time_ms, day * POPULARITY_REFRESH_MS)
            counts = np.bincount(item[:known], minlength=num_items)
            counts[UNKNOWN] = -1
            cached[day] = np.argsort(-counts, kind="stable")[:TOP_K]
        return cached[day]

    def rank(groups: LabelGroups) -> Int64s:
        days = (groups.time_ms_G // POPULARITY_REFRESH_MS).tolist()
        return np.stack([top_on(day) for day in days])

    return rank


def own_frequency(source: BatchSource, *, window: int = COUNT_WINDOW, decay: float = 1.0) -> Ranker:
    """Rank the user's own items by how often they were met, ties by the newer one.

    Args:
        source: The log whose users are ranked for.
        window: Newest events that count; bounded by the streams of `source`.
        decay: Weight per event of age; 1 is the plain count.
    """

    def rank(groups: LabelGroups) -> Int64s:
        rows, known = source.history_rows(groups)
        rows, known = rows[:, -window:], known[:, -window:]
        item = np.where(known, source.item_N[rows], UNKNOWN)
        width = item.shape[1]
        # The newer event is worth a hair more, which decides ties and nothing else.
        place = np.arange(width)
        weight = decay ** (width - 1.0 - place) + 1e-9 * place
        return np.stack([_heaviest(row, weight) for row in item])

    return rank


def _heaviest(item_N: Int64s, weight_N: NDArray[np.float64]) -> Int64s:
    items, inverse = np.unique(item_N, return_inverse=True)
    total = np.bincount(inverse, weight_N)
    total[items == UNKNOWN] = 0.0
    best = np.argsort(-total, kind="stable")[:TOP_K]
    best = best[total[best] > 0]
    return np.pad(items[best], (0, TOP_K - len(best)), constant_values=UNKNOWN)


def recency_weighted(source: BatchSource) -> Ranker:
    """The recency-weighted count over all that the streams hold."""
    return own_frequency(source, window=source.num_recent + source.num_mid, decay=DECAY)
