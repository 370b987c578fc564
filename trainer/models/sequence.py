"""What the single-stream rivals share: the item table, the loss, the scores.

A rival reads one stream, the newest N events, and every event of it is trained to name an event of
the user's next time (next_items.py). All rivals take the same events, targets and negatives; only
`states` differs.

Legend: B users, N events, D width, V items, I = V + 1 dense items (0 unknown), T targets of a
label, K events that are trained.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from trainer.batches import Batch, Stream
from trainer.loop import Learner
from trainer.models.next_items import ItemTable, next_targets

# Events of one user that are trained in one step, drawn anew each time: as many as the short window
# has, so that the long window costs attention and not logits.
NUM_TRAINED = 64
# Spread of freshly drawn vectors.
INITIAL_SPREAD = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceConfig:
    """Sizes of a single-stream model; `num_events` is its window."""

    width: int = 64
    num_heads: int = 2
    num_layers: int = 2
    num_events: int = 64
    dropout: float = 0.1


class SequenceModel(Learner[Batch]):
    """A model of one stream that scores every item."""

    def __init__(
        self, config: SequenceConfig, *, item_vectors_VE: Tensor, item_counts_V: Tensor
    ) -> None:
        super().__init__()
        assert item_vectors_VE.shape[1] == config.width, "the item table starts at the vectors"
        self.config = config
        self.items = ItemTable(item_vectors_VE, item_counts_V)
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width)

    @abstractmethod
    def states(self, stream: Stream) -> Tensor:
        """What each event, and those before it, say about the next time [B, N, D]."""

    def scores(self, recent: Stream, mid: Stream) -> Tensor:
        """Logit of every dense item after the newest event [B, I]; that of item 0 is -inf."""
        last_BD = self.norm(self.states(joined(recent, mid))[:, -1])
        return self.items.logits(last_BD)

    def loss(self, batch: Batch) -> Tensor:
        """Sampled softmax, mean over pairs of a state and an item of the next time."""
        stream = joined(batch.recent, batch.mid)
        state_BND = self.norm(self.states(stream))
        inner_BN = next_targets(stream)
        keep_BK = _some(inner_BN.shape[1], NUM_TRAINED)
        return self.items.next_loss(
            state_BND[:, keep_BK], inner_BN[:, keep_BK], state_BND[:, -1], batch.targets_BT
        )

    def num_targets(self, batch: Batch) -> int:
        """See `Learner`; every event has a target, but for those of the newest time."""
        return self.num_tokens(batch) + int((batch.targets_BT > 0).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See `Learner`."""
        return int(batch.recent.mask.sum()) + int(batch.mid.mask.sum())


def joined(recent: Stream, mid: Stream) -> Stream:
    """Both streams as one, newest last."""
    return Stream(*(torch.cat(pair, dim=1) for pair in zip(mid, recent, strict=True)))


def _some(count: int, limit: int) -> Tensor:
    """Places below `count`: all, or `limit` of them drawn at random, ascending."""
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count)[:limit].sort().values
