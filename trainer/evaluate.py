"""Quality on the held-out window: weights frozen at the split, every user's state live.

Each label group after the split is predicted from what came before it; all items are candidates,
repeats are allowed, and the events of a group are judged one by one: HR@10 is the share of events
whose item stands among the ten first, NDCG@10 gives rank r the worth 1 / log2(r + 1).
Both are means over events.

Legend: G groups, K ranked items, E events.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from torch import Tensor

from trainer.batches import BatchSource, in_order
from trainer.dataset import EventLog, Int64s, LabelGroups
from trainer.errors import EmptyWindowError
from trainer.models.beam import BEAM_WIDTH, generate
from trainer.models.gems import Gems

# The length of the list that is judged.
TOP_K = 10
# Bounds of the judgement, so that it costs seconds: users, and times of one user, drawn by seed.
MAX_USERS = 600
MAX_GROUPS_PER_USER = 60
# Groups ranked in one go.
BATCH_GROUPS = 64

# Ranks items (dense indices, 0 for nothing) for groups: [G, at least TOP_K].
Ranker = Callable[[LabelGroups], Int64s]


@dataclass(frozen=True, slots=True)
class Quality:
    """Means over the judged events."""

    hr10: float
    ndcg10: float
    num_events: int
    num_groups: int


def held_out_groups(
    log: EventLog,
    groups: LabelGroups,
    *,
    split_ms: int,
    seed: int,
    max_users: int = MAX_USERS,
    max_groups_per_user: int = MAX_GROUPS_PER_USER,
) -> LabelGroups:
    """A seeded sample of the groups after the split.

    Raises:
        EmptyWindowError: There are none.
    """
    rng = np.random.default_rng(seed)
    after = groups.select(groups.time_ms_G > split_ms)
    if len(after) == 0:
        newest = int(log.event_time_ms_N.max())
        msg = f"no event is newer than the split {split_ms} ms (the newest is {newest} ms)"
        raise EmptyWindowError(msg)
    users = np.unique(after.user_G)
    chosen = rng.permutation(users)[:max_users]
    after = after.select(np.isin(after.user_G, chosen))
    # Shuffle, then keep the first so many of each user: rank inside the user by a stable sort.
    order = rng.permutation(len(after))
    order = order[np.argsort(after.user_G[order], kind="stable")]
    user = after.user_G[order]
    rank = np.arange(len(order)) - np.searchsorted(user, user)
    return after.select(np.sort(order[rank < max_groups_per_user]))


def tuning_groups(
    log: EventLog,
    groups: LabelGroups,
    *,
    split_ms: int,
    seed: int,
    max_users: int,
    max_groups_per_user: int,
) -> LabelGroups:
    """The same sample where there are users enough; where they are few, each gives more.

    A choice is then not made by a few dozen labels where there are hundreds.

    Raises:
        EmptyWindowError: There are none.
    """
    num_users = len(np.unique(groups.user_G[groups.time_ms_G > split_ms]))
    return held_out_groups(
        log,
        groups,
        split_ms=split_ms,
        seed=seed,
        max_users=max_users,
        max_groups_per_user=max_groups_per_user * max_users // max(1, min(num_users, max_users)),
    )


def judge(source: BatchSource, groups: LabelGroups, rank: Ranker, *, name: str) -> Quality:
    """Rank every group and compare with what came."""
    num_batches = -(-len(groups) // BATCH_GROUPS)
    parts = in_order(groups, size=BATCH_GROUPS)
    shown = track(parts, f"evaluate {name}", total=num_batches, transient=True, console=_stderr())
    gain_E = np.concatenate([event_gains(source, part, rank(part)[:, :TOP_K]) for part in shown])
    return Quality(
        hr10=float((gain_E > 0).mean()),
        ndcg10=float(gain_E.mean()),
        num_events=len(gain_E),
        num_groups=len(groups),
    )


def event_gains(source: BatchSource, groups: LabelGroups, ranked_GK: Int64s) -> NDArray[np.float64]:
    """Discounted gain of each event of the groups [E]; an item training never saw gains 0."""
    group_E = np.repeat(np.arange(len(groups)), groups.num_rows_G)
    first_E = np.cumsum(groups.num_rows_G) - groups.num_rows_G
    row_E = groups.first_row_G[group_E] + np.arange(len(group_E)) - first_E[group_E]
    item_E = source.item_N[row_E]
    hit_EK = (ranked_GK[group_E] == item_E[:, None]) & (item_E > 0)[:, None]
    discount_K = 1.0 / np.log2(np.arange(ranked_GK.shape[1]) + 2.0)
    gain_E: NDArray[np.float64] = (hit_EK * discount_K).sum(axis=1)
    return gain_E


def model_ranker(model: Gems, source: BatchSource, *, beam_width: int = BEAM_WIDTH) -> Ranker:
    """Rank by the model's own beam search, every item of the vocabulary available."""
    num_items = model.item.num_embeddings

    def rank(groups: LabelGroups) -> Int64s:
        recent, mid = source.streams(groups)
        with torch.inference_mode():
            reading = model.read(model.history(recent, mid, source.older(groups)))
            allowed = torch.ones(len(groups), num_items, dtype=torch.bool)
            item, _ = generate(model, reading, allowed, k_max=TOP_K, beam_width=beam_width)
        return _numpy(item)

    return rank


def _stderr() -> Console:
    return Console(stderr=True)


def _numpy(items: Tensor) -> Int64s:
    ranked: Int64s = items.numpy()
    return ranked
