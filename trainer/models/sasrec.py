"""SASRec: causal self-attention over the items of one stream.

Source: SASRec, arXiv 1808.09781, with its layer normalisation in front of each part and one
learned vector per position. The binary loss is replaced by the one that all rivals share
(sequence.py); positions count from the newest event, so that a history that grows keeps them.

Legend: B users, N events, D width.
"""

import math

import torch
from torch import Tensor, nn

from trainer.batches import Stream
from trainer.models.layers import Attention, FeedForward, causal
from trainer.models.sequence import INITIAL_SPREAD, SequenceConfig, SequenceModel


class CausalLayer(nn.Module):
    """Self-attention of each event to itself and what came before, then a feed-forward layer."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward = FeedForward(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BND: Tensor, mask_BNN: Tensor) -> Tensor:
        """Same shape as the input."""
        normed: Tensor = self.norm(x_BND)
        memory = self.attention.remember(normed, mask_BNN)
        x_BND = x_BND + self.dropout(self.attention(normed, memory))
        changed: Tensor = x_BND + self.dropout(self.feed_forward(x_BND))
        return changed


class SasRec(SequenceModel):
    """A stack of causal layers over item and position."""

    def __init__(
        self, config: SequenceConfig, *, item_vectors_VE: Tensor, item_counts_V: Tensor
    ) -> None:
        super().__init__(config, item_vectors_VE=item_vectors_VE, item_counts_V=item_counts_V)
        self.position_ND = nn.Parameter(
            INITIAL_SPREAD * torch.randn(config.num_events, config.width)
        )
        self.layers = nn.ModuleList(
            CausalLayer(config.width, config.num_heads, config.dropout)
            for _ in range(config.num_layers)
        )

    def states(self, stream: Stream) -> Tensor:
        """State of each event [B, N, D]; that of padding means nothing."""
        num_events = stream.item.shape[1]
        scaled_BND = self.items.vector(stream.item) * math.sqrt(self.config.width)
        x_BND: Tensor = self.dropout(scaled_BND + self.position_ND[-num_events:])
        mask_BNN = causal(stream.mask)
        for layer in self.layers:
            x_BND = layer(x_BND, mask_BNN)
        return x_BND
