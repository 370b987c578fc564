"""GEMs with PyTorch's own attention layer, to be measured against.

The same model in every other part, with the same weights: each `Attention` is replaced by a
`torch.nn.MultiheadAttention`, in the encoder and in the decoder's self- and cross-attentions. That
layer takes events, not keys and values, so it projects them whenever it is asked.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from trainer.models.layers import Attention, Memory

if TYPE_CHECKING:
    from trainer.models.gems import Gems


class StockAttention(nn.Module):
    """`torch.nn.MultiheadAttention` where the model expects an `Attention`."""

    def __init__(self, ours: Attention) -> None:
        """Take over the weights."""
        super().__init__()
        width = ours.query.in_features
        self.layer = nn.MultiheadAttention(width, ours.num_heads, bias=False, batch_first=True)
        with torch.no_grad():
            projections = torch.cat((ours.query.weight, ours.key_value.weight))
            self.layer.in_proj_weight.copy_(projections)
            self.layer.out_proj.weight.copy_(ours.out.weight)

    def remember(self, source_BND: Tensor, mask_BQN: Tensor) -> Memory:
        """Keep the events as they are, in the place of keys and values."""
        source_B1ND = source_BND.unsqueeze(1)
        return Memory(source_B1ND, source_B1ND, mask_BQN.unsqueeze(1))

    def forward(self, query_BQD: Tensor, memory: Memory) -> Tensor:
        """Answer [B, Q, D]; a query that may look nowhere gets 0, where the layer gives NaN."""
        source_BND = memory.key_BHNE[:, 0]
        mask_BQN = memory.mask_B1QN[:, 0]
        seen_BQ1 = mask_BQN.any(dim=-1, keepdim=True)
        hidden_BQN = ~(mask_BQN | ~seen_BQ1)
        # One mask of each user for all of their queries, or one of each query for all users.
        of_users = hidden_BQN.shape[1] == 1
        answer, _ = self.layer(
            query_BQD,
            source_BND,
            source_BND,
            attn_mask=None if of_users else hidden_BQN[0],
            key_padding_mask=hidden_BQN[:, 0].expand(len(source_BND), -1) if of_users else None,
            need_weights=False,
        )
        # The layer answers with axes swapped in memory, and the model takes views.
        return (answer * seen_BQ1).contiguous()


def stock_gems(model: Gems) -> Gems:
    """A copy of the model with stock attention, the same weights in it."""
    stock = copy.deepcopy(model)
    for parent in list(stock.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Attention):
                setattr(parent, name, StockAttention(child))
    return stock
