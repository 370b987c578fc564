"""TIGER-like generation: semantic ids in, semantic ids out, one stream.

Source: TIGER, arXiv 2305.05065. Taken from it: an event is the codes of its item and nothing else,
an encoder reads them, a decoder with cross-attention generates the next item's codes. Ours: the
three codes of an event are added into one token instead of standing as three, and encoder, decoder,
semantic ids and beam search are those of GEMs with its other streams and its extensions off, so
that a difference between the two is not one of parts.

Legend: B users, N events, D width, E width of an item vector.
"""

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import OldEvents, Stream
from trainer.models.config import GemsConfig
from trainer.models.events import INITIAL_SPREAD, EventEncoder
from trainer.models.gems import Gems
from trainer.models.reading import History
from trainer.models.sequence import joined
from trainer.models.trie import ItemTrie
from trainer.semantic_ids import SemanticIds


class CodeEncoder(EventEncoder):
    """The codes of an event's item as one vector, and nothing else of the event."""

    def __init__(self, *, width: int, sizes: tuple[int, int, int]) -> None:
        nn.Module.__init__(self)
        self.codes = nn.ModuleList(
            nn.Embedding(size, width, _weight=INITIAL_SPREAD * torch.randn(size, width))
            for size in sizes
        )

    def forward(self, stream: Stream, item_vector_BNE: Tensor, trie: ItemTrie) -> Tensor:
        """Event vectors [B, N, D]; those of padding and of unknown items mean nothing."""
        code_BN3 = trie.codes_I3[stream.item]
        total = item_vector_BNE.new_zeros(())
        for level, table in enumerate(self.codes):
            total = total + table(code_BN3[..., level])
        known_BN1 = (stream.item > 0).unsqueeze(2)
        return functional.rms_norm(total * known_BN1, total.shape[-1:])


class Tiger(Gems):
    """GEMs with one stream of `num_recent` events and none of the named extensions."""

    def __init__(
        self,
        config: GemsConfig,
        semantic_ids: SemanticIds,
        *,
        item_vectors_VE: Tensor,
        item_counts_V: Tensor,
    ) -> None:
        plain = dataclasses.replace(
            config, streams=("recent",), copy="off", prior="off", leaf="codes", dense="off"
        )
        super().__init__(
            plain,
            semantic_ids,
            num_domains=0,
            item_vectors_VE=item_vectors_VE,
            item_counts_V=item_counts_V,
            # What counts users is the copy head, which is off.
            item_users_V=torch.zeros_like(item_counts_V),
        )
        self.events = CodeEncoder(width=plain.width, sizes=semantic_ids.sizes)

    def history(self, recent: Stream, mid: Stream, older: OldEvents | None) -> History:
        """Both streams as one; what is older is not read."""
        del older
        stream = joined(recent, mid)
        return super().history(stream, _empty(stream), None)


def _empty(stream: Stream) -> Stream:
    """One event of padding for each user: a stream that is absent."""
    return Stream(*(torch.zeros_like(column[:, :1]) for column in stream))
