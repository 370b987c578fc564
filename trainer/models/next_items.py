"""What every event of a stream can be taught: an item of the user's next time, out of all items.

Every event of a stream is trained to name an event of the user's next time: not one of its own
time, because the events of one time are predicted together. One user so teaches as many targets as
the stream has events. The table of items starts at vectors read off the log and the items' bias at
the logarithm of their count, so that no model starts behind.

Legend: B users, N events, K of them that are trained, T targets of a label, E width of an item
vector, V items, I = V + 1 dense items (0 unknown), P pairs of a query and a target, S negatives.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import Stream

# Negatives drawn evenly from all items, and drawn from the other targets of the batch; a batch
# shares both. Their logits are lowered by the logarithm of how often they are expected in the draw.
NUM_UNIFORM = 512
NUM_IN_BATCH = 512
# Added to counts before their logarithm.
SMOOTHING = 0.5
# Stands for minus infinity where a negative is the target itself; as in HSTU's research code.
ACCIDENTAL_HIT = -5e4


class ItemTable(nn.Module):
    """A vector and a bias of each item, both trained."""

    share_I: Tensor

    def __init__(self, item_vectors_VE: Tensor, item_counts_V: Tensor) -> None:
        super().__init__()
        self.vector = nn.Embedding(
            len(item_vectors_VE) + 1,
            item_vectors_VE.shape[1],
            padding_idx=0,
            _weight=functional.pad(item_vectors_VE, (0, 0, 1, 0)).clone(),
        )
        counts_I = functional.pad(item_counts_V.float() + SMOOTHING, (1, 0))
        self.bias_I = nn.Parameter(counts_I.clamp(min=SMOOTHING).log())
        self.register_buffer("share_I", counts_I / counts_I.sum())

    def logits(self, query_BE: Tensor) -> Tensor:
        """Of every dense item [B, I]; that of item 0 is -inf."""
        logit_BI: Tensor = query_BE @ self.vector.weight.T + self.bias_I
        return functional.pad(logit_BI[:, 1:], (1, 0), value=-math.inf)

    def next_loss(
        self, query_BKE: Tensor, next_BK: Tensor, last_BE: Tensor, targets_BT: Tensor
    ) -> Tensor:
        """Sampled softmax over pairs of a query and an item of the time that follows it.

        Args:
            query_BKE: After K events of the stream.
            next_BK: Of `next_targets`, for these events.
            last_BE: The query after the newest event.
            targets_BT: What came then.
        """
        last_BTE = last_BE.unsqueeze(1).expand(-1, targets_BT.shape[1], -1)
        query_PE = torch.cat((query_BKE, last_BTE), dim=1).flatten(0, 1)
        return self.sampled_softmax(query_PE, torch.cat((next_BK, targets_BT), dim=1).flatten())

    def sampled_softmax(self, query_PE: Tensor, target_P: Tensor) -> Tensor:
        """Mean negative log-likelihood of the targets among themselves and the negatives.

        Targets 0 count nothing; without any other the loss is 0.
        """
        real_P = target_P > 0
        query_PE, target_P = query_PE[real_P], target_P[real_P]
        if len(target_P) == 0:
            nothing: Tensor = query_PE.sum() * 0.0
            return nothing
        negative_S = self.negatives(target_P)
        own_P = (query_PE * self.vector(target_P)).sum(dim=1) + self._corrected_bias(target_P)
        other_PS = query_PE @ self.vector(negative_S).T + self._corrected_bias(negative_S)
        hit_PS = target_P.unsqueeze(1) == negative_S
        other_PS = other_PS.masked_fill(hit_PS, ACCIDENTAL_HIT)
        logit = torch.cat((own_P.unsqueeze(1), other_PS), dim=1)
        mean: Tensor = -logit.log_softmax(dim=1)[:, 0].mean()
        return mean

    def negatives(self, target_P: Tensor) -> Tensor:
        """Dense items [S]: some of the targets, the others drawn evenly."""
        num_items = self.vector.num_embeddings - 1
        uniform = 1 + torch.randint(num_items, (NUM_UNIFORM,), device=target_P.device)
        drawn = torch.randint(len(target_P), (NUM_IN_BATCH,), device=target_P.device)
        return torch.cat((uniform, target_P[drawn]))

    def _corrected_bias(self, item: Tensor) -> Tensor:
        """The item's bias less the logarithm of how often it is expected among the negatives."""
        num_items = self.vector.num_embeddings - 1
        expected = NUM_UNIFORM / num_items + NUM_IN_BATCH * self.share_I[item]
        corrected: Tensor = self.bias_I[item] - expected.log()
        return corrected


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
