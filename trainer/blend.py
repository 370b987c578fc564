"""Rankings mixed with constant weights that the tuning window calibrates.

The share of an item is the weighted sum of the shares that the sources give it. The weights are
those under which the events of the tuning window are likeliest, found by expectation-maximisation.
What is served (models/sources.py) starts at such weights and goes on to weigh each request by what
is known of it; a blend here is a rival without a model.

Legend: G labels, K places of a list, E events, S sources.
"""

from collections.abc import Sequence

import numpy as np

from trainer.baselines import Float64s, Scored, ScoredRanker, seen_items
from trainer.batches import BatchSource
from trainer.dataset import Int64s, LabelGroups
from trainer.streaming_evaluation import LIST_LENGTH
from trainer.vocabulary import UNKNOWN

# Rounds of expectation-maximisation; weights of a handful of sources settle within a few dozen.
NUM_ROUNDS = 200


def calibrated(share_ES: Float64s, *, made_up_S: Float64s | None = None) -> Float64s:
    """The weights [S] under which the events are likeliest.

    Args:
        share_ES: What each source gave the item that came; an event that no source named tells
            nothing.
        made_up_S: Events that each source is taken to have named alone, besides; they decide where
            there are few others. None if left out.
    """
    named = share_ES[share_ES.sum(axis=1) > 0]
    made_up = np.zeros(share_ES.shape[1]) if made_up_S is None else made_up_S
    weight_S = np.full(share_ES.shape[1], 1.0 / share_ES.shape[1])
    if not len(named) and not made_up.any():
        return weight_S
    for _ in range(NUM_ROUNDS):
        part_ES = named * weight_S
        part_ES = part_ES / np.maximum(part_ES.sum(axis=1, keepdims=True), np.finfo(float).tiny)
        weight_S = part_ES.sum(axis=0) + made_up
        weight_S = weight_S / weight_S.sum()
    return weight_S


def target_shares(scored: Scored, group_E: Int64s, item_E: Int64s) -> Float64s:
    """The share that lists give to the items of some events [E]; 0 where they lack them."""
    item_GK, share_GK = scored
    found_EK = item_GK[group_E] == item_E[:, None]
    shares: Float64s = (found_EK * share_GK[group_E]).sum(axis=1)
    return shares


def blended(sources: Sequence[ScoredRanker], weight_S: Float64s) -> ScoredRanker:
    """Rank by the weighted sum of the sources' shares."""

    def rank(groups: LabelGroups) -> Scored:
        scored = [source(groups) for source in sources]
        item_GC = np.concatenate([item for item, _ in scored], axis=1)
        share_GC = np.concatenate(
            [weight * share for weight, (_, share) in zip(weight_S, scored, strict=True)], axis=1
        )
        lists = [_summed(*row) for row in zip(item_GC, share_GC, strict=True)]
        return np.stack([item for item, _ in lists]), np.stack([share for _, share in lists])

    return rank


def met_lowered(rank: ScoredRanker, source: BatchSource, factor: float) -> ScoredRanker:
    """A ranking whose shares are multiplied by a factor where the user met the item."""

    def lowered(groups: LabelGroups) -> Scored:
        item_GK, share_GK = rank(groups)
        met_GK = np.stack(
            [np.isin(row, seen_items(source, groups, at)) for at, row in enumerate(item_GK)]
        )
        return item_GK, np.where(met_GK, share_GK * factor, share_GK)

    return lowered


def _summed(item_C: Int64s, share_C: Float64s) -> Scored:
    items, inverse = np.unique(item_C, return_inverse=True)
    total = np.bincount(inverse, share_C) * (items != UNKNOWN)
    best = np.argsort(-total, kind="stable")[:LIST_LENGTH]
    best = best[total[best] > 0]
    missing = (0, LIST_LENGTH - len(best))
    return np.pad(items[best], missing, constant_values=UNKNOWN), np.pad(total[best], missing)
