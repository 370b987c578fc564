"""Attention and feed-forward parts.

Legend: B batch, Q queries, N keys, D width, H heads, E = D / H.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

# Hidden width of a feed-forward layer as a multiple of its input.
FEED_FORWARD_FACTOR = 2


class Memory(NamedTuple):
    """Keys and values of one stream, projected once and asked many times.

    Attributes:
        mask_B1QN: True where a query may look; Q is 1 where all queries may look alike.
        index_key_BNX: Keys of the indexer (indexer.py); None where attention is always full.
    """

    key_BHNE: Tensor
    value_BHNE: Tensor
    mask_B1QN: Tensor
    index_key_BNX: Tensor | None = None


class Attention(nn.Module):
    """Multi-head attention; a query that may look nowhere gets exactly 0."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width, bias=False)
        self.key_value = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def remember(self, source_BND: Tensor, mask_BQN: Tensor) -> Memory:
        """Project keys and values; the mask is [B, Q, N] or [B, 1, N]."""
        key_value: Tensor = self.key_value(source_BND)
        key, value = key_value.chunk(2, dim=-1)
        return Memory(self.split(key), self.split(value), mask_BQN.unsqueeze(1))

    def forward(self, query_BQD: Tensor, memory: Memory) -> Tensor:
        """Answer [B, Q, D]."""
        seen_B1Q1 = memory.mask_B1QN.any(dim=-1, keepdim=True)
        # A query without any valid key looks everywhere to stay finite, and is zeroed below.
        answer = functional.scaled_dot_product_attention(
            self.split(self.query(query_BQD)),
            memory.key_BHNE,
            memory.value_BHNE,
            attn_mask=memory.mask_B1QN | ~seen_B1Q1,
        )
        merged: Tensor = self.out((answer * seen_B1Q1).transpose(1, 2).flatten(2))
        return merged

    def split(self, flat_BND: Tensor) -> Tensor:
        """Heads apart [B, H, N, E]."""
        batch, num_rows, width = flat_BND.shape
        heads = (batch, num_rows, self.num_heads, width // self.num_heads)
        return flat_BND.view(heads).transpose(1, 2)


class FeedForward(nn.Module):
    """Two linear layers around a SiLU, the input normalised first."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, FEED_FORWARD_FACTOR * width)
        self.down = nn.Linear(FEED_FORWARD_FACTOR * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as the input."""
        down: Tensor = self.down(functional.silu(self.up(self.norm(x))))
        return down


class StreamTokens(NamedTuple):
    """Encoded events of one stream and which of them are real."""

    tokens_BND: Tensor
    mask_BN: Tensor


class Branch(nn.Module):
    """Cross-attention to one stream with its own feed-forward layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.norm_memory = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward = FeedForward(width)

    def remember(self, stream: StreamTokens) -> Memory:
        """Keys and values of the stream."""
        return self.attention.remember(
            self.norm_memory(stream.tokens_BND), stream.mask_BN.unsqueeze(1)
        )

    def read(self, query_BQD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The answer [B, Q, D] and a loss of the branch's own, here always 0."""
        return self.attention(query_BQD, memory), query_BQD.new_zeros(())

    def forward(self, x_BQD: Tensor, memory: Memory) -> tuple[Tensor, Tensor]:
        """The state after this stream alone was read [B, Q, D], and the branch's own loss."""
        answer_BQD, loss = self.read(self.norm(x_BQD), memory)
        x_BQD = x_BQD + answer_BQD
        changed: Tensor = x_BQD + self.feed_forward(x_BQD)
        return changed, loss


class EncoderLayer(nn.Module):
    """Self-attention over the valid events of a stream, then a feed-forward layer."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.feed_forward = FeedForward(width)

    def forward(self, x_BND: Tensor, mask_BQN: Tensor) -> Tensor:
        """Same shape as the input; the mask is [B, N, N], or [B, 1, N] where all look alike."""
        normed: Tensor = self.norm(x_BND)
        memory = self.attention.remember(normed, mask_BQN)
        x_BND = x_BND + self.attention(normed, memory)
        changed: Tensor = x_BND + self.feed_forward(x_BND)
        return changed


def causal_mask(num_past: int, num_new: int) -> Tensor:
    """[num_new, num_past + num_new], True where a new token may look: the past, and up to itself.

    >>> causal_mask(1, 2).int().tolist()
    [[1, 1, 0], [1, 1, 1]]
    """
    position = torch.arange(num_past + num_new)
    return position[None, :] <= position[num_past:, None]


def causal(mask_BN: Tensor) -> Tensor:
    """True where an event (row) may look: at real events up to itself [B, N, N].

    >>> causal(torch.tensor([[False, True, True]])).int().tolist()
    [[[0, 0, 0], [0, 1, 0], [0, 1, 1]]]
    """
    num_events = mask_BN.shape[1]
    past_NN = torch.ones(num_events, num_events, dtype=torch.bool, device=mask_BN.device).tril()
    return past_NN & mask_BN.unsqueeze(1)
