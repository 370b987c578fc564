"""HSTU: pointwise gated attention over the items of one stream.

Source: HSTU, arXiv 2402.17152, as the research code of generative-recommenders computes it (see
`HstuLayer`). There is no 1/sqrt(d) in front of the products, as in that code. The normalised output
with temperature 0.05 is replaced by the loss that all rivals share (sequence.py).

Legend: B users, N events, D width, H heads, E = D / H.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import Stream
from trainer.models.layers import causal
from trainer.models.next_items import next_starts
from trainer.models.sequence import INITIAL_SPREAD, SequenceConfig, SequenceModel

# Buckets of the time between two events, and their width in natural logarithms of seconds.
NUM_TIME_BUCKETS = 128
BUCKET_WIDTH = 0.301
MS_PER_SECOND = 1000.0
EPSILON = 1e-6


class HstuLayer(nn.Module):
    """Y = W_o dropout(U * LayerNorm(A V)) + X with A = SiLU(Q K^T + bias) / N, masked after.

    N is the window and not the number of real events: the sum then still tells how many events
    were relevant, which a softmax would erase. There is no separate feed-forward layer.
    """

    def __init__(self, config: SequenceConfig) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.num_events = config.num_events
        self.in_ = nn.Linear(config.width, 4 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.in_.weight, std=INITIAL_SPREAD)

    def forward(self, x_BND: Tensor, bias_BNN: Tensor, mask_BNN: Tensor) -> Tensor:
        """Same shape as the input."""
        width = x_BND.shape[2:]
        mixed: Tensor = functional.silu(self.in_(functional.layer_norm(x_BND, width, eps=EPSILON)))
        gate, value, query, key = mixed.chunk(4, dim=-1)
        product_BHNN = self._split(query) @ self._split(key).transpose(2, 3)
        weight_BHNN = functional.silu(product_BHNN + bias_BNN.unsqueeze(1)) / self.num_events
        weight_BHNN = weight_BHNN * mask_BNN.unsqueeze(1)
        read_BND = (weight_BHNN @ self._split(value)).transpose(1, 2).flatten(2)
        gated = gate * functional.layer_norm(read_BND, width, eps=EPSILON)
        changed: Tensor = self.out(self.dropout(gated)) + x_BND
        return changed

    def _split(self, flat_BND: Tensor) -> Tensor:
        batch, num_events, width = flat_BND.shape
        heads = (batch, num_events, self.num_heads, width // self.num_heads)
        return flat_BND.view(heads).transpose(1, 2)


class Hstu(SequenceModel):
    """A stack of HSTU layers over item and position, with biases by distance in place and time."""

    def __init__(
        self, config: SequenceConfig, *, item_vectors_VE: Tensor, item_counts_V: Tensor
    ) -> None:
        super().__init__(config, item_vectors_VE=item_vectors_VE, item_counts_V=item_counts_V)
        self.position_ND = nn.Parameter(
            INITIAL_SPREAD * torch.randn(config.num_events, config.width)
        )
        self.distance = nn.Embedding(config.num_events, config.num_layers)
        self.time = nn.Embedding(NUM_TIME_BUCKETS, config.num_layers)
        for table in (self.distance, self.time):
            nn.init.normal_(table.weight, std=INITIAL_SPREAD)
        self.layers = nn.ModuleList(HstuLayer(config) for _ in range(config.num_layers))

    def states(self, stream: Stream) -> Tensor:
        """State of each event [B, N, D]; that of padding means nothing."""
        num_events = stream.item.shape[1]
        scaled_BND = self.items.vector(stream.item) * math.sqrt(self.config.width)
        x_BND: Tensor = self.dropout(scaled_BND + self.position_ND[-num_events:])
        mask_BNN = causal(stream.mask)
        bias_BNNL = self.time(time_buckets(stream)) + self.distance(_distances(mask_BNN))
        for number, layer in enumerate(self.layers):
            x_BND = layer(x_BND, bias_BNNL[..., number], mask_BNN)
        return x_BND


def time_buckets(stream: Stream) -> Tensor:
    """Bucket of the time from event j (column) to the time that event i (row) predicts [B, N, N].

    That is the time after its own; the newest time, of which nobody knows what follows, is measured
    against itself.
    """
    num_events = stream.age_ms.shape[1]
    next_BN = next_starts(stream).clamp(max=num_events - 1)
    next_age_BN = stream.age_ms.gather(1, next_BN)
    seconds = (stream.age_ms.unsqueeze(1) - next_age_BN.unsqueeze(2)).abs() / MS_PER_SECOND
    return (seconds.clamp(min=1.0).log() / BUCKET_WIDTH).long().clamp(max=NUM_TIME_BUCKETS - 1)


def _distances(mask_BNN: Tensor) -> Tensor:
    """How many places event j stands before event i, 0 above the diagonal [N, N]."""
    place_N = torch.arange(mask_BNN.shape[1], device=mask_BNN.device)
    return (place_N.unsqueeze(1) - place_N.unsqueeze(0)).clamp(min=0)
