"""Named extension `sources`: live counts stand beside the model in one mixture.

Not in the paper. Weights are frozen while the world goes on: on news most of what is read tomorrow
does not exist today. Counts of the last hours know it at once. The share of an item is the weighted
sum of the shares that the model and the sources give it; the weights are a softmax of a linear map
of a few facts about the request, none of them a clock. A source that says nothing has no weight.
Counts are of all users: of an item that this user met already they say too much where people do
not come back to things, so that its counted share is lowered by a factor of the gate. The model
needs no such factor: it reads the same events.

Legend: B users, W = 1 + S parts (the model, then S sources), K places of a list, F facts,
C = K + S * K places of all lists together, X other items.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from features.sources import SOURCES
from trainer.batches import PADDING

NUM_SOURCES = len(SOURCES)
# How sure the model must be to be told apart from not at all.
SMALLEST_TOP = 1e-6
# Below this a share of the model is taken for this much, so that no listed item vanishes.
SMALLEST_SHARE = 1e-30
# What the parts weigh where no window has said it: a trace of the sources, so that new items are
# found at all.
UNTUNED_WEIGHTS = (0.9, 0.05, 0.05)
FACTS = (
    "log_history",
    "log_top",
    "copy_weight",
    *(f"{kind}_{source}" for kind in ("mass", "top") for source in SOURCES),
)


class Mixed(NamedTuple):
    """Raw items [B, K], best first, their share [B, K], and what each part gave to these [B, W]."""

    item_BK: Tensor
    share_BK: Tensor
    mass_BW: Tensor


def facts(history_B: Tensor, top_B: Tensor, copy_weight_B: Tensor, share_BSK: Tensor) -> Tensor:
    """The facts about each request that weights depend on [B, F].

    Args:
        history_B: Events in the recent and the mid-term stream.
        top_B: Probability of the item that the model holds for likeliest.
        copy_weight_B: Probability that the model copies.
        share_BSK: What the sources say.
    """
    mass_BS, top_BS = share_BSK.sum(dim=2), share_BSK.amax(dim=2)
    log_history = history_B.to(share_BSK.dtype).log1p()
    log_top = top_B.clamp(min=SMALLEST_TOP).log()
    own = torch.stack((log_history, log_top, copy_weight_B), dim=1)
    return torch.cat((own, mass_BS, top_BS), dim=1)


class SourceGate(nn.Module):
    """Weighs the model and the sources; see trainer/calibration.py for where numbers come from."""

    centre_F: Tensor
    spread_F: Tensor
    met_factor: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("met_factor", torch.tensor(1.0))
        self.register_buffer("centre_F", torch.zeros(len(FACTS)))
        self.register_buffer("spread_F", torch.ones(len(FACTS)))
        self.weight_WF = nn.Parameter(torch.zeros(1 + NUM_SOURCES, len(FACTS)))
        self.bias_W = nn.Parameter(torch.zeros(1 + NUM_SOURCES))

    @classmethod
    def constant(cls, weight_W: list[float]) -> Self:
        """A gate that weighs all requests alike."""
        gate = cls()
        with torch.no_grad():
            gate.bias_W.copy_(torch.tensor(weight_W).clamp(min=SMALLEST_TOP).log())
        return gate

    @classmethod
    def untuned(cls) -> Self:
        """The gate of a model that was not weighed against its sources."""
        return cls.constant(list(UNTUNED_WEIGHTS))

    def forward(self, facts_BF: Tensor, speaks_BS: Tensor) -> Tensor:
        """The weight of each part [B, W], 0 for a source that says nothing; they sum to 1."""
        known_BF = (facts_BF - self.centre_F) / self.spread_F
        logit_BW = known_BF @ self.weight_WF.T + self.bias_W
        speaks_BW = functional.pad(speaks_BS, (1, 0), value=True)
        return logit_BW.masked_fill(~speaks_BW, -math.inf).softmax(dim=1)

    def lowered(self, share_BSK: Tensor, met_BSK: Tensor) -> Tensor:
        """The sources' shares, times `met_factor` where the user met the item."""
        return torch.where(met_BSK, share_BSK * self.met_factor, share_BSK)


def is_in(item_BC: Tensor, item_BX: Tensor) -> Tensor:
    """Whether each item is one of the others of its user [B, C]."""
    sorted_BX = item_BX.sort(dim=1)[0]
    place_BC = torch.searchsorted(sorted_BX, item_BC).clamp(max=item_BX.shape[1] - 1)
    return sorted_BX.gather(1, place_BC) == item_BC


def mixed(
    item_BK: Tensor,
    share_BK: Tensor,
    counted_item_BSK: Tensor,
    counted_share_BSK: Tensor,
    weight_BW: Tensor,
) -> Mixed:
    """The best K of all items that any part names, ties by the smaller id.

    Args:
        item_BK: Raw ids of the model's list, PADDING where it has none.
        share_BK: Their probabilities.
        counted_item_BSK: Raw ids of the sources' lists, PADDING where there is none.
        counted_share_BSK: Their shares.
        weight_BW: Of each part.
    """
    size, num_places = item_BK.shape
    lists_BWK = torch.cat((item_BK.unsqueeze(1), counted_item_BSK), dim=1)
    told_BWK = torch.cat((share_BK.unsqueeze(1), counted_share_BSK), dim=1)
    told_BWK = told_BWK * weight_BW.unsqueeze(2) * (lists_BWK != PADDING)
    item_BC, order_BC = lists_BWK.flatten(1).sort(dim=1, stable=True)
    is_new_BC = functional.pad(item_BC[:, 1:] != item_BC[:, :-1], (1, 0), value=False)
    group_BC = is_new_BC.long().cumsum(dim=1)
    part_BC = torch.div(order_BC, num_places, rounding_mode="floor")
    told_BC = told_BWK.flatten(1).gather(1, order_BC)
    by_part_BWC = torch.stack(
        [
            torch.zeros_like(told_BC).scatter_add(1, group_BC, told_BC * (part_BC == part))
            for part in range(1 + NUM_SOURCES)
        ],
        dim=1,
    )
    total_BC, best_BC = by_part_BWC.sum(dim=1).sort(dim=1, descending=True, stable=True)
    best_BK = best_BC[:, :num_places]
    share = total_BC[:, :num_places]
    named_BC = torch.full_like(item_BC, PADDING).scatter(1, group_BC, item_BC)
    item = named_BC.gather(1, best_BK).masked_fill(share == 0, PADDING)
    place_BWK = best_BK.unsqueeze(1).expand(size, 1 + NUM_SOURCES, num_places)
    return Mixed(item, share, by_part_BWC.gather(2, place_BWK).sum(dim=2))


def probabilities(log_BK: Tensor) -> Tensor:
    """The shares of a list of log-probabilities; none vanishes that is listed."""
    return log_BK.exp().clamp(min=SMALLEST_SHARE) * (log_BK != -math.inf)


def contributions(contribution_B3: Tensor, mass_BW: Tensor) -> Tensor:
    """The share of recent, mid-term and lifelong stream and of each source in an answer [B, 5].

    The model's part is divided as its streams changed the decoder; they sum to 1, or to 0 where
    nobody said anything.
    """
    parts_B5 = torch.cat((contribution_B3 * mass_BW[:, :1], mass_BW[:, 1:]), dim=1)
    return parts_B5 / parts_B5.sum(dim=1, keepdim=True).clamp(min=SMALLEST_SHARE)
