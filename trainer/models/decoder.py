"""The multi-stream decoder.

Source: GEMs, arXiv 2602.13631, section on the multi-stream decoder: causal self-attention over the
tokens of the semantic id, then one cross-attention with its own feed-forward layer per stream,
all read in parallel and fused without parameters. The normalisation of the queries is inferred.

Legend: B batch, T candidates per user (targets or beams), L tokens of a semantic id, P past tokens,
D width, N events of a stream, S = 3 streams: recent, mid-term, lifelong.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.models.layers import Attention, FeedForward, Memory, causal_mask

Fusion = Literal["delta_sum", "sum", "mean"]
NUM_STREAMS = 3


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

    def forward(self, x_BQD: Tensor, memory: Memory) -> Tensor:
        """The state after this stream alone was read, [B, Q, D]."""
        x_BQD = x_BQD + self.attention(self.norm(x_BQD), memory)
        changed: Tensor = x_BQD + self.feed_forward(x_BQD)
        return changed


def fuse(x_BQD: Tensor, read_SBQD: Tensor, present_SB11: Tensor, *, fusion: Fusion) -> Tensor:
    """Join the branches; an absent stream adds exactly nothing.

    `sum` is the paper's, which multiplies the residual by the number of streams at each block;
    `mean` divides by that number; `delta_sum` adds what each branch changed to one residual.
    """
    if fusion == "delta_sum":
        return x_BQD + ((read_SBQD - x_BQD) * present_SB11).sum(dim=0)
    total = (read_SBQD * present_SB11).sum(dim=0)
    num_present = present_SB11.sum(dim=0)
    if fusion == "mean":
        total = total / num_present.clamp(min=1)
    return torch.where(num_present > 0, total, x_BQD)


class DecoderBlock(nn.Module):
    """Self-attention over the semantic id, three streams read in parallel, fusion."""

    def __init__(self, width: int, num_heads: int, *, fusion: Fusion) -> None:
        super().__init__()
        self.fusion: Fusion = fusion
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.recent = Branch(width, num_heads)
        self.mid = Branch(width, num_heads)
        self.lifelong = Branch(width, num_heads)

    @property
    def branches(self) -> tuple[Branch, Branch, Branch]:
        """The branches in the order of the streams."""
        return self.recent, self.mid, self.lifelong

    def remember(self, streams: tuple[StreamTokens, ...]) -> tuple[Memory, ...]:
        """Keys and values of all streams."""
        return tuple(
            branch.remember(stream) for branch, stream in zip(self.branches, streams, strict=True)
        )

    def forward(
        self, x_BTLD: Tensor, past_BTPD: Tensor | None, memories: tuple[Memory, ...]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Read new tokens after `past_BTPD` (the third output of earlier calls, joined).

        Returns:
            The new state [B, T, L, D]; the length of what each stream changed [B, T, S] at the
            first new token; and what later tokens need of these, [B, T, L, D].
        """
        batch, num_beams, num_new, width = x_BTLD.shape
        normed: Tensor = self.norm(x_BTLD)
        source = normed if past_BTPD is None else torch.cat((past_BTPD, normed), dim=2)
        mask = causal_mask(source.shape[2] - num_new, num_new).to(source.device)
        memory = self.attention.remember(source.flatten(0, 1), mask.unsqueeze(0))
        attended: Tensor = self.attention(normed.flatten(0, 1), memory)
        x_BQD = x_BTLD.flatten(1, 2) + attended.view(batch, -1, width)
        read = [
            branch(x_BQD, stream) for branch, stream in zip(self.branches, memories, strict=True)
        ]
        read_SBQD = torch.stack(read)
        present = [stream.mask_B1QN.flatten(1).any(dim=1) for stream in memories]
        present_SB11 = torch.stack(present)[:, :, None, None].float()
        fused = fuse(x_BQD, read_SBQD, present_SB11, fusion=self.fusion)
        change_SBQ = ((read_SBQD - x_BQD) * present_SB11).norm(dim=-1)
        change_BTS = change_SBQ.view(NUM_STREAMS, batch, num_beams, num_new)[..., 0].permute(
            1, 2, 0
        )
        return fused.view(batch, num_beams, num_new, width), change_BTS, normed
