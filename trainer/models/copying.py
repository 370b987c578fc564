"""Named extension `copy`: a distribution over the items a user already met.

Not in the paper. Where people repeat themselves, the user's own frequent items beat any generative
model of this size, so the model may point at its own streams. The pointer starts as plain counting
(a share proportional to the number of occurrences) and learns what recency and state change.

Legend: B batch, N events of both streams, G = N places for distinct items, D width, E width of an
item vector, F features of an item, I dense items (0 unknown), T decay times.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.models.events import MS_PER_DAY

# Memory lengths over which occurrences are counted; retail repeats weekly to seasonally.
DECAY_DAYS = (4.0, 14.0, 45.0, 150.0)
# Hidden width of the scorer.
NUM_HIDDEN = 64
# Below this a count is none: keeps logarithms finite.
FLOOR = 1e-3
# Added to an age before its logarithm: a tenth of a day is as good as now.
SHORTEST_DAYS = 0.1
# Softens the ratio of two short times.
HALF_A_DAY = 0.5
# Stands for the logarithm of the days between occurrences of an item met once.
NO_GAP = 5.0

# Mean and spread of the features over grocery baskets, in their order (`CopyHead.__init__`): what
# a layer reads should be of one size. Other logs differ, and the layer learns the rest.
CENTRES = (0.2, -5.8, -4.0, -1.5, -0.3, 3.7, 4.6, 0.0, 6.0, 4.4, 0.45)
SPREADS = (0.5, 2.2, 2.6, 1.5, 0.6, 1.6, 0.9, 0.9, 1.0, 1.7, 0.36)


class CopyShares(NamedTuple):
    """The pointer's distribution over the distinct known items of each user.

    Attributes:
        share_BG: Sums to 1, or to 0 where a user has no known item.
        item_BG: The dense item each share belongs to, 0 on unused places.
    """

    share_BG: Tensor
    item_BG: Tensor

    def of(self, targets_BT: Tensor) -> Tensor:
        """The share of each target [B, T], 0 for one that would be no copy."""
        same_BTG = targets_BT.unsqueeze(2) == self.item_BG.unsqueeze(1)
        return (same_BTG * self.share_BG.unsqueeze(1)).sum(dim=2)


class Occurrences(NamedTuple):
    """What the streams say about each distinct item of a user.

    Attributes:
        item_BG: Dense items, 0 on unused places.
        features_BGF: The first one is the logarithm of the number of occurrences.
    """

    item_BG: Tensor
    features_BGF: Tensor


class CopyHead(nn.Module):
    """Scores each distinct item of the streams from its occurrences and the decoder's state."""

    decay_days_T: Tensor
    facts_IF: Tensor
    centre_F: Tensor
    spread_F: Tensor
    # Small and read by every label, it can learn faster than the encoders; on groceries it has to,
    # or a short training ends before it knows more than counting.
    rate_factor = 3.0

    def __init__(self, width: int, item_width: int, facts_IF: Tensor) -> None:
        super().__init__()
        self.register_buffer("facts_IF", facts_IF)
        self.register_buffer("decay_days_T", torch.tensor(DECAY_DAYS))
        self.register_buffer("centre_F", torch.tensor(CENTRES))
        self.register_buffer("spread_F", torch.tensor(SPREADS))
        # The count and the decayed counts, the three of the rhythm, the length of the history, and
        # what is known of the item from everybody.
        num_features = 1 + len(DECAY_DAYS) + 3 + 1 + facts_IF.shape[1]
        self.features = nn.Linear(num_features, NUM_HIDDEN)
        self.item = nn.Linear(item_width, NUM_HIDDEN, bias=False)
        self.state = nn.Linear(width, NUM_HIDDEN, bias=False)
        self.hidden = nn.Linear(NUM_HIDDEN, NUM_HIDDEN)
        self.score = nn.Linear(NUM_HIDDEN, 1)
        self.match = nn.Linear(width, item_width, bias=False)
        self.match_gain = nn.Parameter(torch.zeros(()))
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, seen: Occurrences, vector_BGE: Tensor, state_BD: Tensor) -> CopyShares:
        """Shares of the items; unused places get none."""
        features_BGF = (seen.features_BGF - self.centre_F) / self.spread_F
        hidden = functional.silu(
            self.features(features_BGF) + self.item(vector_BGE) + self.state(state_BD).unsqueeze(1)
        )
        hidden = functional.silu(self.hidden(hidden))
        match_BG = (vector_BGE @ self.match(state_BD).unsqueeze(2)).squeeze(2)
        learned_BG = self.score(hidden).squeeze(2) + self.match_gain * match_BG
        # Unlearned, the logarithm of the count alone makes shares proportional to counts.
        known_BG = seen.item_BG > 0
        logit_BG = (seen.features_BGF[..., 0] + learned_BG).masked_fill(~known_BG, -math.inf)
        some_B1 = known_BG.any(dim=1, keepdim=True)
        share_BG = torch.where(some_B1, logit_BG, 0.0).softmax(dim=1) * some_B1
        return CopyShares(share_BG, seen.item_BG)

    def occurrences(self, item_BN: Tensor, age_ms_BN: Tensor) -> Occurrences:
        """Group the events of each user by item; events are given newest last."""
        sorted_BN, order_BN = item_BN.sort(dim=1, stable=True)
        new_BN = functional.pad(sorted_BN[:, 1:] != sorted_BN[:, :-1], (1, 0), value=False)
        group_BN = new_BN.long().cumsum(dim=1)
        day_BN = age_ms_BN.float().clamp(min=0) / MS_PER_DAY
        weight_BNT = torch.exp(-day_BN.unsqueeze(2) / self.decay_days_T)
        counted_BNT = functional.pad(weight_BNT, (1, 0), value=1.0)
        num_sums = counted_BNT.shape[2]
        counted_BNT = counted_BNT.gather(1, order_BN.unsqueeze(2).expand(-1, -1, num_sums))
        into_BNT = group_BN.unsqueeze(2).expand(-1, -1, num_sums)
        sums_BGT = torch.zeros_like(counted_BNT).scatter_add(1, into_BNT, counted_BNT)
        # Every place in use includes its own events, so the starting 0 and N - 1 never win there.
        newest_BG = torch.zeros_like(order_BN).scatter_reduce(1, group_BN, order_BN, "amax")
        last = torch.full_like(order_BN, item_BN.shape[1] - 1)
        oldest_BG = last.scatter_reduce(1, group_BN, order_BN, "amin")
        rhythm_BG3 = _rhythm(day_BN.gather(1, newest_BG), day_BN.gather(1, oldest_BG), sums_BGT)
        total_B1 = (item_BN > 0).sum(dim=1, keepdim=True).add(1).log()
        total_BG1 = total_B1.unsqueeze(1).expand(-1, item_BN.shape[1], -1)
        used_BG = torch.arange(item_BN.shape[1], device=item_BN.device) <= group_BN[:, -1:]
        item_BG = item_BN.gather(1, newest_BG) * used_BG
        log_sums = sums_BGT.clamp(min=FLOOR).log()
        features = torch.cat((log_sums, rhythm_BG3, total_BG1, self.facts_IF[item_BG]), dim=2)
        return Occurrences(item_BG, features)


def item_facts(item_counts_V: Tensor, item_users_V: Tensor) -> Tensor:
    """How much an item is met, and how often by the same user; both as logarithms [I, 2]."""
    events_I = functional.pad(item_counts_V.float(), (1, 0))
    users_I = functional.pad(item_users_V.float(), (1, 0))
    return torch.stack((events_I.log1p(), events_I.log1p() - users_I.log1p()), dim=1)


def _rhythm(newest_day_BG: Tensor, oldest_day_BG: Tensor, sums_BGT: Tensor) -> Tensor:
    """Age of the newest occurrence, mean gap between occurrences, and how overdue the next is.

    All as logarithms, [B, G, 3]; an item met once has no gap, and counts as met in time.
    """
    count_BG = sums_BGT[..., 0]
    # Unused places may hold the wrong way round what they never use; logarithms must stay finite.
    span_BG = (oldest_day_BG - newest_day_BG).clamp(min=0)
    gap_BG = span_BG / (count_BG - 1).clamp(min=1)
    log_newest = (newest_day_BG + SHORTEST_DAYS).log()
    log_gap = torch.where(count_BG > 1, (gap_BG + SHORTEST_DAYS).log(), NO_GAP)
    overdue = (newest_day_BG + HALF_A_DAY).log() - (gap_BG + HALF_A_DAY).log()
    return torch.stack((log_newest, log_gap, overdue * (count_BG > 1)), dim=2)
