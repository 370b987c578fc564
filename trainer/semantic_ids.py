"""Semantic ids by residual k-means: three codes an item, no two items alike.

Source: GEMs, arXiv 2602.13631, section on item tokenisation (three levels of residual k-means).
That cells are bounded, how a collision is resolved, and how new items join, is ours.

Ties are broken at the last level: items that share their first two codes differ in the third, one
item a cell, the nearest item first, then the smaller item index.

Legend: V items, N new items, D dimensions, K codes of a level.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.errors import VocabularyError

# Codes of each level for a vocabulary of tens of thousands: 64 * 64 * 32 = 131,072 places.
CODE_SIZES = (64, 64, 32)
# Lloyd rounds; assignments of the data at hand stop moving much after about ten.
NUM_ROUNDS = 12
# A first-level cell may hold this many times its fair share; more would make one code meaningless.
MAX_FIRST_LEVEL_SHARE = 4.0
# Items measured against all codes at once, to bound memory.
CHUNK_ITEMS = 8192


@dataclass(frozen=True, slots=True)
class SemanticIds:
    """Codes [V, 3] of the items, and how many codes each level has."""

    codes_V3: Tensor
    sizes: tuple[int, int, int]


def learn_semantic_ids(
    vectors_VD: Tensor, *, sizes: tuple[int, int, int] = CODE_SIZES, seed: int
) -> SemanticIds:
    """Give every item its own code triple; the same input and seed give the same triples.

    Each level clusters what the levels before left over. An item proposes to its nearest code; a
    cell that is full keeps its nearest items (ties: the smaller item index), and the refused item
    proposes to its next nearest code (ties: the smaller code). A cell of the last level holds one
    item.

    Raises:
        VocabularyError: There are more items than places, or none.
    """
    num_items, places = len(vectors_VD), math.prod(sizes)
    if not 0 < num_items <= places:
        msg = f"{num_items} items do not fit the {places} semantic ids of {sizes}; raise code_sizes"
        raise VocabularyError(msg)
    generator = torch.Generator().manual_seed(seed)
    residual = vectors_VD
    cell_V = torch.zeros(num_items, dtype=torch.int64)
    codes: list[Tensor] = []
    for num_codes, capacity in zip(sizes, capacities(num_items, sizes), strict=True):
        centres_KD = _k_means(residual, num_codes, generator)
        distance_VK = _squared_distances(residual, centres_KD)
        code_V = assign_bounded(distance_VK, cell_V, capacity=capacity)
        codes.append(code_V)
        cell_V = cell_V * num_codes + code_V
        residual = residual - centres_KD[code_V]
    return SemanticIds(torch.stack(codes, dim=1), sizes)


def extend_semantic_ids(
    semantic_ids: SemanticIds, vectors_VD: Tensor, new_vectors_ND: Tensor
) -> SemanticIds:
    """Give new items triples of their own behind the old ones, none of which moves.

    A code's centre is the mean of what stands there, so that nothing but the ids and the vectors
    has to be kept. A cell of old items is as full as they make it; what is left of it is shared
    among the new ones by the rule of `learn_semantic_ids`.

    Args:
        semantic_ids: Of the old items.
        vectors_VD: What they were learned from.
        new_vectors_ND: Vectors of the new items in the same space.

    Returns:
        Codes [V + N, 3]: the old rows as they were, then the new ones.

    Raises:
        VocabularyError: There are more items than places.
    """
    num_old, sizes = len(vectors_VD), semantic_ids.sizes
    vectors = torch.cat((vectors_VD, new_vectors_ND))
    places = math.prod(sizes)
    if len(vectors) > places:
        msg = (
            f"{len(new_vectors_ND)} new items beside {num_old} do not fit the {places} semantic "
            f"ids of {sizes}; train from the start, which drops items that are gone, or with "
            "larger code_sizes"
        )
        raise VocabularyError(msg)
    residual, cell = vectors, torch.zeros(len(vectors), dtype=torch.int64)
    codes: list[Tensor] = []
    for old_V, num_codes, capacity in zip(
        semantic_ids.codes_V3.unbind(1), sizes, capacities(len(vectors), sizes), strict=True
    ):
        centres_KD, used_K = _means(residual[:num_old], old_V, num_codes)
        distance = _squared_distances(residual, centres_KD)
        # A code nobody stands at has no centre: it comes last, where all others are full.
        distance[:, ~used_K] = torch.finfo(distance.dtype).max
        # An old item proposes to its own code first and is nearer to it than anyone.
        distance[torch.arange(num_old), old_V] = -torch.inf
        code = assign_bounded(distance, cell, capacity=capacity)
        assert torch.equal(code[:num_old], old_V), "an old item moved"
        codes.append(code)
        cell = cell * num_codes + code
        residual = residual - centres_KD[code]
    return SemanticIds(torch.stack(codes, dim=1), sizes)


def capacities(num_items: int, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Items that a cell of each level may hold."""
    fair_share = math.ceil(MAX_FIRST_LEVEL_SHARE * num_items / sizes[0])
    return min(fair_share, sizes[1] * sizes[2]), sizes[2], 1


def _means(vectors_VD: Tensor, code_V: Tensor, num_codes: int) -> tuple[Tensor, Tensor]:
    """The mean of the vectors at each code [K, D], and which codes have any [K]."""
    total = torch.zeros(num_codes, vectors_VD.shape[1]).index_add_(0, code_V, vectors_VD)
    count = torch.bincount(code_V, minlength=num_codes)
    return total / count.clamp(min=1).unsqueeze(1), count > 0


def assign_bounded(distance_VK: Tensor, parent_V: Tensor, *, capacity: int) -> Tensor:
    """Assign a code to each item so that no (parent, code) holds more than `capacity` items.

    The outcome is the stable matching of `learn_semantic_ids`' rule; parents must not hold more
    than K * capacity items each.
    """
    num_items, num_codes = distance_VK.shape
    preference_VK = distance_VK.argsort(dim=1, stable=True)
    choice_V = torch.zeros(num_items, dtype=torch.int64)
    item_V = torch.arange(num_items)
    while True:
        code_V = preference_VK[item_V, choice_V]
        cell_V = parent_V * num_codes + code_V
        distance_V = distance_VK[item_V, code_V]
        by_distance = distance_V.argsort(stable=True)
        order = by_distance[cell_V[by_distance].argsort(stable=True)]
        sorted_cell = cell_V[order]
        first = torch.searchsorted(sorted_cell, sorted_cell)
        refused = order[item_V - first >= capacity]
        if len(refused) == 0:
            return code_V
        choice_V[refused] += 1
        assert int(choice_V.max()) < num_codes, "a parent holds more items than its cells"


def _k_means(vectors_VD: Tensor, num_codes: int, generator: torch.Generator) -> Tensor:
    """Centres [K, D]; a code that loses all its items restarts at the worst-served item."""
    start = torch.randperm(len(vectors_VD), generator=generator)
    centres = vectors_VD[start[torch.arange(num_codes) % len(start)]].clone()
    for _ in range(NUM_ROUNDS):
        nearest_V, distance_V = _nearest(vectors_VD, centres)
        total = torch.zeros_like(centres).index_add_(0, nearest_V, vectors_VD)
        count = torch.bincount(nearest_V, minlength=num_codes)
        empty = torch.nonzero(count == 0).flatten()
        centres = total / count.clamp(min=1).unsqueeze(1)
        worst = distance_V.argsort(descending=True, stable=True)
        centres[empty] = vectors_VD[worst[torch.arange(len(empty)) % len(worst)]]
    return centres


def _nearest(vectors_VD: Tensor, centres_KD: Tensor) -> tuple[Tensor, Tensor]:
    parts = [
        _squared_distances(vectors_VD[begin : begin + CHUNK_ITEMS], centres_KD).min(dim=1)
        for begin in range(0, len(vectors_VD), CHUNK_ITEMS)
    ]
    return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])


def _squared_distances(vectors_VD: Tensor, centres_KD: Tensor) -> Tensor:
    cross = vectors_VD @ centres_KD.T
    return vectors_VD.square().sum(1, keepdim=True) - 2 * cross + centres_KD.square().sum(1)
