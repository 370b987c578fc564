"""Vectors of events.

Legend: B batch, N events of a stream, D width, E width of an item vector.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import Stream
from trainer.models.trie import ItemTrie

MS_PER_DAY = 86_400_000.0
# Ages and dwell times fall into one bucket per half power of two, from a second to 34 years.
NUM_TIME_BUCKETS = 64
MS_PER_SECOND = 1000.0
# Action codes are uint8 but only the first few are in use; larger ones share the last vector.
NUM_ACTIONS = 32
# Spread of freshly drawn vectors.
INITIAL_SPREAD = 0.1


def log_bucket(time_ms: Tensor) -> Tensor:
    """Bucket of a duration: 0 for none or unknown, then two buckets per doubling of seconds."""
    seconds = time_ms.float().clamp(min=0) / MS_PER_SECOND
    return (2.0 * (seconds + 1.0).log2()).long().clamp(max=NUM_TIME_BUCKETS - 1)


class EventEncoder(nn.Module):
    """Item, semantic id, domain, action, age and dwell time of an event as one vector.

    Every feature has a table of its own and the vectors are added before the non-linearity: the
    same functions as concatenating them in front of a linear layer, at a fraction of the cost.
    """

    def __init__(
        self, *, width: int, item_width: int, num_domains: int, sizes: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.item = nn.Linear(item_width, width)
        self.codes = nn.ModuleList(_table(size, width) for size in sizes)
        self.domain = _table(num_domains + 1, width)
        self.action = _table(NUM_ACTIONS, width)
        self.age = _table(NUM_TIME_BUCKETS, width)
        self.dwell = _table(NUM_TIME_BUCKETS, width)
        self.mix = nn.Linear(width, width)

    def forward(self, stream: Stream, item_vector_BNE: Tensor, trie: ItemTrie) -> Tensor:
        """Event vectors [B, N, D]; those of padding mean nothing and are masked by the caller."""
        code_BN3 = trie.codes_I3[stream.item]
        # Item 0 is no leaf of the tree and has no codes.
        known_BN1 = (stream.item > 0).unsqueeze(2)
        total: Tensor = self.item(item_vector_BNE)
        for level, table in enumerate(self.codes):
            total = total + table(code_BN3[..., level]) * known_BN1
        total = total + self.domain(stream.domain)
        total = total + self.action(stream.action.clamp(min=0, max=NUM_ACTIONS - 1))
        total = total + self.age(log_bucket(stream.age_ms))
        total = total + self.dwell(log_bucket(stream.dwell_ms))
        mixed: Tensor = self.mix(functional.silu(total))
        return functional.rms_norm(mixed, mixed.shape[-1:])


def _table(size: int, width: int) -> nn.Embedding:
    return nn.Embedding(size, width, _weight=INITIAL_SPREAD * torch.randn(size, width))
