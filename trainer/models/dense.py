"""Named extension `dense`: a distribution over the whole catalogue, by nearness of vectors.

Not in the paper; generative retrieval beside a dense one is known from LIGER, arXiv 2411.18814. A
label teaches a generated id one target, while every event of the recent stream can teach a vector
one of its own (next_items.py): where nobody repeats anything, and a short training has to tell
which unmet item comes next, that is what a single-stream model gains most from.

A query is the mean of the newest events' vectors, the newest weighing most, plus what the causal
recent encoder says; it starts as that mean alone. Items have vectors and a bias of their own here,
trained copies of those that all parts read.

Legend: B users, R recent events, A newest events, D width, E width of an item vector, T targets,
I dense items (0 unknown).
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import Stream
from trainer.models.next_items import ItemTable, next_targets

# Newest events whose vectors are meant.
NUM_NEWEST = 8
# What the weight of an event in that mean starts at, as a logarithm, for each event after it.
FADING = 2.0
# What the mean is multiplied with at the start: a query as long as this tells unit vectors apart.
INITIAL_GAIN = 3.0


class DenseShares(NamedTuple):
    """What the head says about B users.

    Attributes:
        query_BRE: After each event of the recent stream.
        share_BI: Of each item after the newest event; sums to 1, item 0 gets 0.
        weight_B: Probability that the next item is named by the head.
    """

    query_BRE: Tensor
    share_BI: Tensor
    weight_B: Tensor


class DenseHead(nn.Module):
    """Matches the recent stream with every item's vector."""

    def __init__(
        self, width: int, item_vectors_VE: Tensor, item_counts_V: Tensor, *, dropout: float
    ) -> None:
        super().__init__()
        self.items = ItemTable(item_vectors_VE, item_counts_V)
        self.fading_A = nn.Parameter(-FADING * torch.arange(NUM_NEWEST).float())
        self.gain = nn.Parameter(torch.tensor(INITIAL_GAIN))
        self.norm = nn.RMSNorm(width)
        self.dropout = nn.Dropout(dropout)
        self.state = nn.Linear(width, item_vectors_VE.shape[1], bias=False)
        self.gate = nn.Linear(width, 1)
        nn.init.zeros_(self.state.weight)

    def forward(self, item_BR: Tensor, x_BRD: Tensor, state_BD: Tensor) -> DenseShares:
        """What the head says; see `queries`, and the decoder's state decides how much it counts."""
        query_BRE = self.queries(item_BR, x_BRD)
        share_BI = self.items.logits(query_BRE[:, -1]).softmax(dim=1)
        return DenseShares(query_BRE, share_BI, self.gate(state_BD).squeeze(1).sigmoid())

    def queries(self, item_BR: Tensor, x_BRD: Tensor) -> Tensor:
        """The query after each event [B, R, E], blind to what came after it.

        Args:
            item_BR: Dense items, newest last, 0 in front.
            x_BRD: The events as the causal encoder left them.
        """
        vector_BRE = self.items.vector(item_BR)
        num_events = vector_BRE.shape[1]
        padded = functional.pad(vector_BRE, (0, 0, NUM_NEWEST - 1, 0))
        mean_BRE = torch.zeros_like(vector_BRE)
        for age, weight in enumerate(self.fading_A.softmax(dim=0)):
            begin = NUM_NEWEST - 1 - age
            mean_BRE = mean_BRE + weight * padded[:, begin : begin + num_events]
        told: Tensor = self.state(self.dropout(self.norm(x_BRD)))
        return self.gain * mean_BRE + told

    def loss(self, query_BRE: Tensor, recent: Stream, targets_BT: Tensor) -> Tensor:
        """Sampled softmax over an item of each event's next time, and over the targets."""
        next_BR = next_targets(recent)
        return self.items.next_loss(query_BRE, next_BR, query_BRE[:, -1], targets_BT)
