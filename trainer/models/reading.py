"""What is known of a user, what GEMs reads of it, and how the parts of an answer are mixed.

Legend: B users, T targets, N events of a stream, G places for distinct items of the streams, S
summary tokens, X rows and V columns of a lifelong state, I dense items (0 unknown), D width.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.batches import Stream
from trainer.models.config import GemsConfig
from trainer.models.copying import CopyShares
from trainer.models.dense import DenseShares
from trainer.models.layers import Memory
from trainer.models.lifelong import NUM_ROWS, VALUE_WIDTH

# Probabilities below this are treated as this, so that logarithms and their gradients stay finite.
SMALLEST_SHARE = 1e-12


class History(NamedTuple):
    """What is known of B users: two streams of events and the lifelong memory.

    Attributes:
        lifelong_BXV: The state of lifelong.py, zeros without a memory.
        lifelong_count_B1: Events folded into it, int64; 0 means there is no memory.
    """

    recent: Stream
    mid: Stream
    lifelong_BXV: Tensor
    lifelong_count_B1: Tensor


class Reading(NamedTuple):
    """Everything the decoder keeps of B users after the first token.

    Attributes:
        memories: Per block and stream, keys and values.
        past: Per block, the first token as later tokens need it [B, 1, 1, D].
        state_BD: The state that predicts the first code.
        contribution_B3: Share of each stream in what the decoder changed; 0 for an absent one.
        shares: The copy distribution, None with copy off.
        copy_weight_B: Probability that the next item is a copy; 0 with copy off.
        dense: What the dense head says, None with dense off.
        summary_BSD: What the seeds read of the lifelong state.
        index_loss: Divergence of the indexers while they learn, a scalar.
    """

    memories: tuple[tuple[Memory, ...], ...]
    past: tuple[Tensor, ...]
    state_BD: Tensor
    contribution_B3: Tensor
    shares: CopyShares | None
    copy_weight_B: Tensor
    dense: DenseShares | None
    summary_BSD: Tensor
    index_loss: Tensor

    def generated_weight(self) -> Tensor:
        """Probability that the next item is generated, no copy and not of the dense head [B]."""
        rest_B = 1 - self.copy_weight_B
        return rest_B if self.dense is None else rest_B - self.dense.weight_B

    def pointed(self, targets_BT: Tensor) -> Tensor:
        """Probability that an item comes without being generated [B, T]."""
        pointed_BT = torch.zeros_like(self.copy_weight_B).unsqueeze(1).expand(targets_BT.shape)
        if self.shares is not None:
            pointed_BT = self.copy_weight_B.unsqueeze(1) * self.shares.of(targets_BT)
        if self.dense is not None:
            named_BT = self.dense.share_BI.gather(1, targets_BT)
            pointed_BT = pointed_BT + self.dense.weight_B.unsqueeze(1) * named_BT
        return pointed_BT

    def pointed_items(self, num_items: int) -> Tensor:
        """The same of every dense item [B, I]."""
        pointed_BI = self.copy_weight_B.new_zeros(self.copy_weight_B.shape[0], num_items)
        if self.shares is not None:
            copied_BG = self.copy_weight_B.unsqueeze(1) * self.shares.share_BG
            pointed_BI = pointed_BI.scatter_add(1, self.shares.item_BG, copied_BG)
        if self.dense is not None:
            pointed_BI = pointed_BI + self.dense.weight_B.unsqueeze(1) * self.dense.share_BI
        return pointed_BI


def copied_from(config: GemsConfig, recent: Stream, mid: Stream) -> tuple[Tensor, Tensor]:
    """Items and ages of what the copy head reads [B, N], newest last."""
    named = (("mid", mid), ("recent", recent))
    streams = [stream for name, stream in named if name in config.streams]
    item_BN = torch.cat([stream.item for stream in streams], dim=1)
    return item_BN, torch.cat([stream.age_ms for stream in streams], dim=1)


def mixed_log(log_generated: Tensor, pointed: Tensor, generated_weight: Tensor) -> Tensor:
    """Log of the mixture of a generated and a pointed probability.

    Mixing whole items mixes every prefix alike, because the mass of a prefix is the sum of its
    items; beam search and training therefore follow one distribution.

    Args:
        log_generated: As logarithm, given that the item is generated.
        pointed: See `Reading.pointed`.
        generated_weight: Probability that the item is generated.
    """
    from_model = log_generated + generated_weight.clamp(min=SMALLEST_SHARE).log()
    return torch.logaddexp(from_model, pointed.clamp(min=SMALLEST_SHARE).log())


def without_lifelong(recent: Stream, mid: Stream) -> History:
    """Streams of users who have no lifelong memory."""
    batch, device = recent.item.shape[0], recent.item.device
    return History(
        recent,
        mid,
        torch.zeros(batch, NUM_ROWS, VALUE_WIDTH, device=device),
        torch.zeros(batch, 1, dtype=torch.int64, device=device),
    )
