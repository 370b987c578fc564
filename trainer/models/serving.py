"""The exported form of GEMs: raw features in, item ids and scores out.

Legend: B users, R recent events, M mid-term events, X excluded items, V items of the
vocabulary, K items returned.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import PADDING, Stream
from trainer.models.beam import BEAM_WIDTH, K_MAX, generate
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems, History
from trainer.models.indexer import FULL, TOP_K
from trainer.models.lifelong import NUM_ROWS, VALUE_WIDTH, index_of
from trainer.vocabulary import Vocabulary

# Items a request may exclude by name: all of a user's recent and mid-term events fit.
NUM_EXCLUDED = 512


class Tensors(NamedTuple):
    """Name, dtype and shape (without the batch) of one input or output."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def input_signature(config: GemsConfig, *, num_items: int) -> list[Tensors]:
    """The inputs in the order of `GemsServing.forward`; all but the last are batched."""
    fields = ("item", "age_ms", "domain", "action", "dwell_ms")
    lengths = {"recent": config.num_recent, "mid": config.num_mid}
    streams = [
        Tensors(f"{stream}_{field}", torch.int64, (length,))
        for stream, length in lengths.items()
        for field in fields
    ]
    return [
        *streams,
        Tensors("lifelong", torch.float32, (NUM_ROWS, VALUE_WIDTH)),
        Tensors("lifelong_count", torch.int64, (1,)),
        Tensors("exclude_item", torch.int64, (NUM_EXCLUDED,)),
        Tensors("available", torch.bool, (num_items,)),
    ]


def output_signature() -> list[Tensors]:
    """The outputs of `GemsServing.forward`, in order; all are batched."""
    return [
        Tensors("item_id", torch.int64, (K_MAX,)),
        Tensors("score", torch.float32, (K_MAX,)),
        Tensors("contribution", torch.float32, (3,)),
    ]


def compressor_input_signature() -> list[Tensors]:
    """The inputs of `Compressor.forward`, in order; -1 stands for any number of events."""
    names = ("item", "action", "domain", "dwell_ms", "event_time_ms")
    return [Tensors(name, torch.int64, (-1,)) for name in names]


def compressor_output_signature() -> list[Tensors]:
    """The outputs of `Compressor.forward`, in order."""
    return [
        Tensors("state", torch.float32, (NUM_ROWS, VALUE_WIDTH)),
        Tensors("count", torch.int64, (1,)),
    ]


class GemsServing(nn.Module):
    """Maps raw ids inside the graph, so that serving passes features as they are stored."""

    item_ids_V: Tensor
    domain_ids: Tensor

    def __init__(
        self, model: Gems, vocabulary: Vocabulary, *, beam_width: int = BEAM_WIDTH
    ) -> None:
        super().__init__()
        self.model = model.for_serving()
        self.beam_width = beam_width
        self.mid_attention = "indexer" if model.config.mid_attention == "indexer" else "full"
        self.register_buffer("item_ids_V", torch.from_numpy(vocabulary.item_ids_V))
        self.register_buffer("domain_ids", torch.from_numpy(vocabulary.domain_ids))

    def choose_mid_attention(self, chosen: Literal["full", "indexer"]) -> None:
        """Serve mid-term attention this way; only a model with an indexer has a choice."""
        self.mid_attention = chosen
        self.model.set_stage(TOP_K if chosen == "indexer" else FULL)

    def forward(  # noqa: PLR0913, PLR0917, D417 - the served signature, tensor by tensor
        self,
        recent_item: Tensor,
        recent_age_ms: Tensor,
        recent_domain: Tensor,
        recent_action: Tensor,
        recent_dwell_ms: Tensor,
        mid_item: Tensor,
        mid_age_ms: Tensor,
        mid_domain: Tensor,
        mid_action: Tensor,
        mid_dwell_ms: Tensor,
        lifelong: Tensor,
        lifelong_count: Tensor,
        exclude_item: Tensor,
        available: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Recommend for B users.

        Args:
            recent_item: [B, R] ids, newest last, PADDING in front.
            recent_age_ms: [B, R] time of the newest event minus event time.
            recent_domain: [B, R] 64-bit domain hashes, their bits read as int64.
            mid_item: [B, M] likewise, the events before these; M may differ between calls.
            lifelong: [B, 64, 64] state of the events before those, zeros without one.
            lifelong_count: [B, 1] number of events in it.
            available: [V] by place in the vocabulary; a withdrawn item is False.
            exclude_item: [B, X] ids that must not be returned, PADDING elsewhere.

        Returns:
            Item ids [B, K] (PADDING where fewer were found), log-probabilities [B, K] and the share
            of each stream in the decision [B, 3].
        """
        recent = self._stream(
            recent_item, recent_age_ms, recent_domain, recent_action, recent_dwell_ms
        )
        mid = self._stream(mid_item, mid_age_ms, mid_domain, mid_action, mid_dwell_ms)
        reading = self.model.read(History(recent, mid, lifelong, lifelong_count))
        allowed_BI = self._allowed(available, exclude_item)
        item, score = generate(self.model, reading, allowed_BI, beam_width=self.beam_width)
        item_id = functional.pad(self.item_ids_V, (1, 0), value=PADDING)[item]
        return item_id, score, reading.contribution_B3

    def _stream(
        self, item: Tensor, age_ms: Tensor, domain: Tensor, action: Tensor, dwell_ms: Tensor
    ) -> Stream:
        mask = item != PADDING
        return Stream(
            item=index_of(self.item_ids_V, item),
            age_ms=age_ms * mask,
            domain=index_of(self.domain_ids, domain) * mask,
            action=action * mask,
            dwell_ms=dwell_ms * mask,
            mask=mask,
        )

    def _allowed(self, available_V: Tensor, exclude_BX: Tensor) -> Tensor:
        available_I = functional.pad(available_V, (1, 0))
        excluded = index_of(self.item_ids_V, exclude_BX)
        allowed = available_I.unsqueeze(0).repeat(exclude_BX.shape[0], 1)
        return allowed.scatter(1, excluded, value=False)
