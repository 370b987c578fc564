"""Beam search over the tree of items that exist and are allowed.

Legend: B users, I dense items (0 unknown), W beams, P pairs of codes, C candidates, X, Y any.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.models.gems import Gems
from trainer.models.reading import Reading, mixed_log

# Items returned for a request; a caller that wants fewer cuts the list.
K_MAX = 100
# Prefixes kept after the first and the second code.
BEAM_WIDTH = 48


class Level(NamedTuple):
    """Pointed mass or permission of all nodes, level by level."""

    first: Tensor
    second: Tensor
    leaf: Tensor


def generate(
    model: Gems,
    reading: Reading,
    allowed_BI: Tensor,
    *,
    k_max: int = K_MAX,
    beam_width: int = BEAM_WIDTH,
) -> tuple[Tensor, Tensor]:
    """The most probable allowed items, best first, ties by smaller dense item.

    Args:
        model: The weights and the tree of items.
        reading: What the model read of the users.
        allowed_BI: True where a dense item may be returned; item 0 never is.
        k_max: Items to return.
        beam_width: Prefixes kept at each of the first two levels.

    Returns:
        Dense items [B, k_max] (0 where fewer are allowed or reached) and their log-probabilities
        (-inf there).
    """
    size1, size2, _ = model.trie.sizes
    allowed = Level(*model.trie.allowed_nodes(allowed_BI & (torch.arange(allowed_BI.shape[1]) > 0)))
    pointed = _pointed_mass(model, reading, allowed_BI)
    weight_B1 = reading.generated_weight().unsqueeze(1)
    weight_B11 = weight_B1.unsqueeze(1)

    log_first = model.log_first(reading.state_BD)
    score = _forbid(mixed_log(log_first, pointed.first, weight_B1), allowed.first)
    first_BW = _best(score, min(beam_width, size1))
    generated = log_first.gather(1, first_BW)

    state, past = _step(model, reading, 0, first_BW, None)
    log_second = generated.unsqueeze(2) + model.log_second(state, first_BW)
    score = _forbid(
        mixed_log(log_second, _rows(pointed.second, first_BW), weight_B11),
        _rows(allowed.second, first_BW),
    )
    best = _best(score.flatten(1), min(beam_width, score.shape[1] * size2))
    origin, second = best // size2, best % size2
    generated = log_second.flatten(1).gather(1, best)
    prefix_BW = first_BW.gather(1, origin) * size2 + second

    state, _ = _step(model, reading, 1, second, _follow(past, origin))
    log_third = generated.unsqueeze(2) + model.log_third(state, prefix_BW)
    score = _forbid(
        mixed_log(log_third, _rows(pointed.leaf, prefix_BW), weight_B11),
        _rows(allowed.leaf, prefix_BW),
    )
    item_BC = model.trie.item_PK[prefix_BW].flatten(1)
    return _ranked(item_BC, score.flatten(1), k_max)


def _pointed_mass(model: Gems, reading: Reading, allowed_BI: Tensor) -> Level:
    """Pointed probability of the allowed items below every node: others must not draw beams."""
    size1, size2, _ = model.trie.sizes
    mass_BI = reading.pointed_items(allowed_BI.shape[1]) * allowed_BI
    leaf = mass_BI[:, model.trie.item_PK.flatten()].view(-1, *model.trie.item_PK.shape)
    second = leaf.sum(dim=2).view(-1, size1, size2)
    return Level(second.sum(dim=2), second, leaf)


def _step(
    model: Gems, reading: Reading, level: int, code_BW: Tensor, past: tuple[Tensor, ...] | None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """States [B, W, D] after one more code of each beam, and the past joined with it."""
    tokens: Tensor = model.tokens[level](code_BW)
    if past is None:
        past = tuple(p.expand(-1, code_BW.shape[1], -1, -1) for p in reading.past)
    state, kept, _, _ = model.decode(tokens.unsqueeze(2), past, reading.memories)
    joined = tuple(torch.cat(pair, dim=2) for pair in zip(past, kept, strict=True))
    return state[:, :, 0], joined


def _follow(past: tuple[Tensor, ...], origin_BW: Tensor) -> tuple[Tensor, ...]:
    """The past of the beams that the kept ones came from."""
    return tuple(_rows(p.flatten(2), origin_BW).view(*origin_BW.shape, *p.shape[2:]) for p in past)


def _rows(table_BXY: Tensor, index_BW: Tensor) -> Tensor:
    """Row index_BW[b, w] of each user's table, [B, W, Y]."""
    return table_BXY.gather(1, index_BW.unsqueeze(2).expand(-1, -1, table_BXY.shape[2]))


def _forbid(score: Tensor, allowed: Tensor) -> Tensor:
    return score.masked_fill(~allowed, -math.inf)


def _best(score_BC: Tensor, count: int) -> Tensor:
    """Places of the `count` best, in ascending order of place; ties go to the smaller place."""
    order = score_BC.sort(dim=1, descending=True, stable=True)[1]
    return order[:, :count].sort(dim=1)[0]


def _ranked(item_BC: Tensor, score_BC: Tensor, k_max: int) -> tuple[Tensor, Tensor]:
    item, by_item = item_BC.sort(dim=1)
    score = score_BC.gather(1, by_item)
    score, by_score = score.sort(dim=1, descending=True, stable=True)
    item = item.gather(1, by_score).masked_fill(score == -math.inf, 0)
    missing = max(0, k_max - item.shape[1])
    item = torch.nn.functional.pad(item, (0, missing))
    score = torch.nn.functional.pad(score, (0, missing), value=-math.inf)
    return item[:, :k_max], score[:, :k_max]
