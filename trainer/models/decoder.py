"""The multi-stream decoder.

Source: GEMs, arXiv 2602.13631, section on the multi-stream decoder: causal self-attention over the
tokens of the semantic id, then one cross-attention with its own feed-forward layer per stream,
all read in parallel and fused without parameters. The normalisation of the queries is inferred.
The learned `gate` is none of ours to serve: it exists to be compared with (the paper reports that
learned fusion drifts to the recent stream).

Legend: B batch, T candidates per user (targets or beams), L tokens of a semantic id, P past tokens,
Q = T * L queries, D width, N events of a stream, S = 3 streams: recent, mid-term, lifelong.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from trainer.models.indexer import IndexedBranch, IndexerConfig
from trainer.models.layers import Attention, Branch, Memory, StreamTokens, causal_mask

ParameterFree = Literal["delta_sum", "sum", "mean"]
Fusion = ParameterFree | Literal["gate"]
NUM_STREAMS = 3


class BlockOutput(NamedTuple):
    """What a block leaves.

    Attributes:
        state_BTLD: The new state.
        change_BTS: Length of what each stream changed at the first new token.
        kept_BTLD: What later tokens need of these.
        index_loss: Divergence of the indexer from its teacher, a scalar; 0 unless it learns.
    """

    state_BTLD: Tensor
    change_BTS: Tensor
    kept_BTLD: Tensor
    index_loss: Tensor


def fuse(
    x_BQD: Tensor, read_SBQD: Tensor, present_SB11: Tensor, *, fusion: ParameterFree
) -> Tensor:
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


class Gate(nn.Module):
    """Ablation only: shares of the present streams, learned from the state before reading."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.share = nn.Linear(width, NUM_STREAMS)

    def forward(self, x_BQD: Tensor, read_SBQD: Tensor, present_SB11: Tensor) -> Tensor:
        """The state plus the streams' changes, weighted; the shares of all present sum to 1."""
        logits_SBQ1 = self.share(x_BQD).permute(2, 0, 1).unsqueeze(3)
        lowest = torch.finfo(x_BQD.dtype).min
        share_SBQ1 = logits_SBQ1.masked_fill(present_SB11 == 0, lowest).softmax(dim=0)
        change_SBQD: Tensor = (read_SBQD - x_BQD) * share_SBQ1 * present_SB11
        return x_BQD + change_SBQD.sum(dim=0)


class DecoderBlock(nn.Module):
    """Self-attention over the semantic id, three streams read in parallel, fusion."""

    def __init__(
        self,
        width: int,
        num_heads: int,
        *,
        fusion: Fusion,
        indexer: IndexerConfig | None = None,
    ) -> None:
        super().__init__()
        self.fusion: Fusion = fusion
        self.norm = nn.RMSNorm(width)
        self.attention = Attention(width, num_heads)
        self.recent = Branch(width, num_heads)
        self.mid = (
            Branch(width, num_heads)
            if indexer is None
            else IndexedBranch(width, num_heads, indexer)
        )
        self.lifelong = Branch(width, num_heads)
        if fusion == "gate":
            self.gate = Gate(width)

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
    ) -> BlockOutput:
        """Read new tokens after `past_BTPD` (what earlier calls kept, joined)."""
        batch, num_beams, num_new, width = x_BTLD.shape
        normed: Tensor = self.norm(x_BTLD)
        source = normed if past_BTPD is None else torch.cat((past_BTPD, normed), dim=2)
        mask = causal_mask(source.shape[2] - num_new, num_new).to(source.device)
        memory = self.attention.remember(source.flatten(0, 1), mask.unsqueeze(0))
        attended: Tensor = self.attention(normed.flatten(0, 1), memory)
        x_BQD = x_BTLD.flatten(1, 2) + attended.view(batch, -1, width)
        answers = [
            branch(x_BQD, stream) for branch, stream in zip(self.branches, memories, strict=True)
        ]
        read_SBQD = torch.stack([state for state, _ in answers])
        index_loss = torch.stack([loss for _, loss in answers]).sum()
        present = [stream.mask_B1QN.flatten(1).any(dim=1) for stream in memories]
        present_SB11 = torch.stack(present)[:, :, None, None].float()
        if self.fusion == "gate":
            fused = self.gate(x_BQD, read_SBQD, present_SB11)
        else:
            fused = fuse(x_BQD, read_SBQD, present_SB11, fusion=self.fusion)
        change_SBQ = ((read_SBQD - x_BQD) * present_SB11).norm(dim=-1)
        change_SBT = change_SBQ.view(NUM_STREAMS, batch, num_beams, num_new)[..., 0]
        return BlockOutput(
            fused.view(batch, num_beams, num_new, width),
            change_SBT.permute(1, 2, 0),
            normed,
            index_loss,
        )
