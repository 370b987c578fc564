"""The exported form of GEMs: raw features in, item ids and scores out.

Legend: B users, R recent events, M mid-term events, X excluded or candidate items, V items of the
vocabulary, I = V + 1 dense items (0 unknown), S live sources, K items returned or in a source's
list, C = S * K.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import PADDING, Stream
from trainer.models.beam import BEAM_WIDTH, K_MAX, generate
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems
from trainer.models.indexer import FULL, TOP_K
from trainer.models.lifelong import NUM_ROWS, VALUE_WIDTH, index_of
from trainer.models.reading import History
from trainer.models.sources import (
    NUM_SOURCES,
    SourceGate,
    contributions,
    facts,
    is_in,
    mixed,
    probabilities,
)
from trainer.vocabulary import Vocabulary

# Items a request may exclude by name: all of a user's recent and mid-term events fit.
NUM_EXCLUDED = 512
# Items a request may name to be chosen from; what is beyond does not fit and is not looked at.
NUM_CANDIDATES = 512
# Stands for no domain in a request, and for that of an item without any.
ANY_DOMAIN = 0


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
        Tensors("candidate_item", torch.int64, (NUM_CANDIDATES,)),
        Tensors("in_domain", torch.int64, (1,)),
        Tensors("counted_item", torch.int64, (NUM_SOURCES, K_MAX)),
        Tensors("counted_share", torch.float32, (NUM_SOURCES, K_MAX)),
        Tensors("counted_domain", torch.int64, (NUM_SOURCES,)),
        Tensors("available", torch.bool, (num_items,)),
    ]


def output_signature() -> list[Tensors]:
    """The outputs of `GemsServing.forward`, in order; all are batched."""
    return [
        Tensors("item_id", torch.int64, (K_MAX,)),
        Tensors("score", torch.float32, (K_MAX,)),
        Tensors("contribution", torch.float32, (3 + NUM_SOURCES,)),
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
    item_domain_V: Tensor

    def __init__(
        self,
        model: Gems,
        vocabulary: Vocabulary,
        *,
        gate: SourceGate | None = None,
        item_domain_V: Tensor | None = None,
        beam_width: int = BEAM_WIDTH,
    ) -> None:
        """Take a copy of what an answer needs.

        Args:
            model: As trained.
            vocabulary: Its ids.
            gate: Weighs the live sources; untuned if left out.
            item_domain_V: The usual domain of each item; none has one if left out.
            beam_width: Of the search.
        """
        super().__init__()
        self.model = model.for_serving()
        self.gate = SourceGate.untuned() if gate is None else gate
        self.beam_width = beam_width
        self.mid_attention = "indexer" if model.config.mid_attention == "indexer" else "full"
        item_ids_V = torch.from_numpy(vocabulary.item_ids_V)
        self.register_buffer("item_ids_V", item_ids_V)
        self.register_buffer("domain_ids", torch.from_numpy(vocabulary.domain_ids))
        self.register_buffer(
            "item_domain_V",
            torch.full_like(item_ids_V, ANY_DOMAIN) if item_domain_V is None else item_domain_V,
        )

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
        candidate_item: Tensor,
        in_domain: Tensor,
        counted_item: Tensor,
        counted_share: Tensor,
        counted_domain: Tensor,
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
            exclude_item: [B, X] ids that must not be returned, PADDING elsewhere.
            candidate_item: [B, X] where any id is given, nothing else is returned.
            in_domain: [B, 1] where a domain is given, only its items are returned.
            counted_item: [B, S, K] what live sources name, best first, PADDING behind. Ids outside
                the vocabulary are new items.
            counted_share: [B, S, K] its share of all that the source has counted.
            counted_domain: [B, S] the domain that a list is of; ANY_DOMAIN for all.
            available: [V] by place in the vocabulary; a withdrawn item is False.

        Returns:
            Item ids [B, K] (PADDING where fewer were found), log-probabilities [B, K] and the share
            of each stream and source in the answer [B, 3 + S].
        """
        recent = self._stream(
            recent_item, recent_age_ms, recent_domain, recent_action, recent_dwell_ms
        )
        mid = self._stream(mid_item, mid_age_ms, mid_domain, mid_action, mid_dwell_ms)
        reading = self.model.read(History(recent, mid, lifelong, lifelong_count))
        allowed_BI = self._allowed(available, exclude_item, candidate_item, in_domain)
        item, log_BK = generate(self.model, reading, allowed_BI, beam_width=self.beam_width)
        share_BK = probabilities(log_BK)
        facts_BF = facts(
            recent.mask.sum(dim=1) + mid.mask.sum(dim=1),
            share_BK[:, 0],
            reading.copy_weight_B,
            counted_share,
        )
        barred_BC = self._barred(
            counted_item, counted_domain, allowed_BI, (exclude_item, candidate_item), in_domain
        )
        met_BC = is_in(counted_item.flatten(1), torch.cat((mid_item, recent_item), dim=1))
        found = mixed(
            functional.pad(self.item_ids_V, (1, 0), value=PADDING)[item],
            share_BK,
            counted_item.masked_fill(barred_BC.view_as(counted_item), PADDING),
            self.gate.lowered(counted_share, met_BC.view_as(counted_item)),
            self.gate(facts_BF, (counted_share > 0).any(dim=2)),
        )
        shares = contributions(reading.contribution_B3, found.mass_BW)
        return found.item_BK, found.share_BK.log(), shares

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

    def _allowed(
        self, available_V: Tensor, exclude_BX: Tensor, candidate_BX: Tensor, in_domain_B1: Tensor
    ) -> Tensor:
        """Dense items that may be returned [B, I]."""
        allowed_BI = functional.pad(available_V, (1, 0)).unsqueeze(0)
        allowed_BI = allowed_BI.repeat(exclude_BX.shape[0], 1)
        excluded_BX = index_of(self.item_ids_V, exclude_BX)
        allowed_BI = allowed_BI.scatter(1, excluded_BX, value=False)
        named_BI = torch.zeros_like(allowed_BI)
        named_BI = named_BI.scatter(1, index_of(self.item_ids_V, candidate_BX), value=True)
        domain_I = functional.pad(self.item_domain_V, (1, 0), value=ANY_DOMAIN)
        return (
            allowed_BI
            & (named_BI | _names_none(candidate_BX))
            & ((in_domain_B1 == ANY_DOMAIN) | (domain_I == in_domain_B1))
        )

    def _barred(
        self,
        counted_BSK: Tensor,
        domain_BS: Tensor,
        allowed_BI: Tensor,
        named: tuple[Tensor, Tensor],
        in_domain_B1: Tensor,
    ) -> Tensor:
        """Places of the sources' lists whose item must not be returned [B, C].

        The model's rules are those of `allowed_BI`; an item that it does not know is held against
        the request itself, and its domain is that of the list.
        """
        counted_BC = counted_BSK.flatten(1)
        index_BC = index_of(self.item_ids_V, counted_BC)
        exclude_BX, candidate_BX = named
        domain_BC = domain_BS.repeat_interleave(counted_BSK.shape[2], dim=1)
        new_is_allowed_BC = (
            ~is_in(counted_BC, exclude_BX)
            & (is_in(counted_BC, candidate_BX) | _names_none(candidate_BX))
            & ((in_domain_B1 == ANY_DOMAIN) | (domain_BC == in_domain_B1))
        )
        return ~torch.where(index_BC > 0, allowed_BI.gather(1, index_BC), new_is_allowed_BC)


def _names_none(item_BX: Tensor) -> Tensor:
    """Whether a request names no item there [B, 1]."""
    return (item_BX == PADDING).all(dim=1, keepdim=True)
