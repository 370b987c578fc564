"""What the single-stream rivals share: the item table, the loss, the scores.

A rival reads one stream, the newest N events, and every event of it is trained to name an event of
the user's next time: not one of its own time, because the events of one time are predicted
together. All rivals take the same events, targets and negatives; only `states` differs.

The item table starts at the vectors that GEMs' items carry and the item bias at the logarithm of
the item's count, so that no model starts behind.

Legend: B users, N events, D width, V items, I = V + 1 dense items (0 unknown), T targets of a
label, P pairs of a state and a target, S negatives.
"""

import math
from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import Batch, Stream
from trainer.loop import Learner

# Negatives drawn evenly from all items, and drawn from the other targets of the batch; a batch
# shares both. Their logits are lowered by the logarithm of how often they are expected in the draw.
NUM_UNIFORM = 512
NUM_IN_BATCH = 512
# Events of one user that are trained in one step, drawn anew each time: as many as the short window
# has, so that the long window costs attention and not logits.
NUM_TRAINED = 64
# Added to counts before their logarithm.
SMOOTHING = 0.5
# Stands for minus infinity where a negative is the target itself; as in HSTU's research code.
ACCIDENTAL_HIT = -5e4
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

    share_I: Tensor

    def __init__(
        self, config: SequenceConfig, *, item_vectors_VE: Tensor, item_counts_V: Tensor
    ) -> None:
        super().__init__()
        assert item_vectors_VE.shape[1] == config.width, "the item table starts at the vectors"
        self.config = config
        self.item = nn.Embedding(
            len(item_vectors_VE) + 1,
            config.width,
            padding_idx=0,
            _weight=functional.pad(item_vectors_VE, (0, 0, 1, 0)).clone(),
        )
        counts_I = functional.pad(item_counts_V.float() + SMOOTHING, (1, 0))
        self.bias_I = nn.Parameter(counts_I.clamp(min=SMOOTHING).log())
        self.register_buffer("share_I", counts_I / counts_I.sum())
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.LayerNorm(config.width)

    @abstractmethod
    def states(self, stream: Stream) -> Tensor:
        """What each event, and those before it, say about the next time [B, N, D]."""

    def scores(self, recent: Stream, mid: Stream) -> Tensor:
        """Logit of every dense item after the newest event [B, I]; that of item 0 is -inf."""
        last_BD = self.norm(self.states(joined(recent, mid))[:, -1])
        logit_BI: Tensor = last_BD @ self.item.weight.T + self.bias_I
        return functional.pad(logit_BI[:, 1:], (1, 0), value=-math.inf)

    def loss(self, batch: Batch) -> Tensor:
        """Sampled softmax, mean over pairs of a state and an item of the next time."""
        stream = joined(batch.recent, batch.mid)
        state_BND = self.norm(self.states(stream))
        inner_BN = next_targets(stream)
        keep_BK = _some(inner_BN.shape[1], NUM_TRAINED)
        inner_state = state_BND[:, keep_BK]
        last_state = state_BND[:, -1:].expand(-1, batch.targets_BT.shape[1], -1)
        state_XD = torch.cat((inner_state, last_state), dim=1).flatten(0, 1)
        target_X = torch.cat((inner_BN[:, keep_BK], batch.targets_BT), dim=1).flatten()
        real = target_X > 0
        if not real.any():
            nothing: Tensor = state_BND.sum() * 0.0
            return nothing
        return self.sampled_softmax(state_XD[real], target_X[real])

    def num_targets(self, batch: Batch) -> int:
        """See `Learner`; every event has a target, but for those of the newest time."""
        return self.num_tokens(batch) + int((batch.targets_BT > 0).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See `Learner`."""
        return int(batch.recent.mask.sum()) + int(batch.mid.mask.sum())

    def sampled_softmax(self, state_PD: Tensor, target_P: Tensor) -> Tensor:
        """Mean negative log-likelihood of the targets among themselves and the negatives."""
        negative_S = self.negatives(target_P)
        own_P = (state_PD * self.item(target_P)).sum(dim=1) + self._corrected_bias(target_P)
        other_PS = state_PD @ self.item(negative_S).T + self._corrected_bias(negative_S)
        hit_PS = target_P.unsqueeze(1) == negative_S
        other_PS = other_PS.masked_fill(hit_PS, ACCIDENTAL_HIT)
        logit = torch.cat((own_P.unsqueeze(1), other_PS), dim=1)
        mean: Tensor = -logit.log_softmax(dim=1)[:, 0].mean()
        return mean

    def negatives(self, target_P: Tensor) -> Tensor:
        """Dense items [S]: some of the targets, the others drawn evenly."""
        num_items = self.item.num_embeddings - 1
        uniform = 1 + torch.randint(num_items, (NUM_UNIFORM,), device=target_P.device)
        drawn = torch.randint(len(target_P), (NUM_IN_BATCH,), device=target_P.device)
        return torch.cat((uniform, target_P[drawn]))

    def _corrected_bias(self, item: Tensor) -> Tensor:
        """The item's bias less the logarithm of how often it is expected among the negatives."""
        num_items = self.item.num_embeddings - 1
        expected = NUM_UNIFORM / num_items + NUM_IN_BATCH * self.share_I[item]
        corrected: Tensor = self.bias_I[item] - expected.log()
        return corrected


def joined(recent: Stream, mid: Stream) -> Stream:
    """Both streams as one, newest last."""
    return Stream(*(torch.cat(pair, dim=1) for pair in zip(mid, recent, strict=True)))


def next_starts(stream: Stream) -> Tensor:
    """Place of the first event of the next time after each event [B, N]; N where there is none.

    >>> age = torch.tensor([[5, 5, 3, 0, 0]])
    >>> next_starts(Stream(age, age, age, age, age, age > -1)).tolist()
    [[2, 2, 3, 5, 5]]
    """
    num_events = stream.age_ms.shape[1]
    place_N = torch.arange(num_events, device=stream.age_ms.device)
    new_BN = functional.pad(stream.age_ms[:, 1:] != stream.age_ms[:, :-1], (1, 0), value=False)
    start_BN = torch.where(new_BN, place_N, num_events)
    later_BN = functional.pad(start_BN[:, 1:], (0, 1), value=num_events)
    return later_BN.flip(1).cummin(dim=1).values.flip(1)


def next_targets(stream: Stream) -> Tensor:
    """An item of the next time for each event, drawn evenly [B, N]; 0 where there is none."""
    num_events = stream.item.shape[1]
    start_BN = next_starts(stream)
    ends = functional.pad(start_BN, (0, 1), value=num_events)
    end_BN = ends.gather(1, start_BN)
    draw_BN = torch.rand(start_BN.shape, device=start_BN.device)
    place_BN = start_BN + (draw_BN * (end_BN - start_BN)).long()
    item_BN = functional.pad(stream.item, (0, 1)).gather(1, place_BN)
    return item_BN * stream.mask


def _some(count: int, limit: int) -> Tensor:
    """Places below `count`: all, or `limit` of them drawn at random, ascending."""
    if count <= limit:
        return torch.arange(count)
    return torch.randperm(count)[:limit].sort().values
