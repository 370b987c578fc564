"""GEMs: retrieval by generating semantic ids from three streams of a user's history.

Source: GEMs, arXiv 2602.13631. This is stage 1 of its training: the mid-term stream is read with
full attention. Named extensions, each switchable: `copy` (copying.py), `prior` (the logits start at
the log frequency of each node of the id tree) and `leaf` (the last level also matches item
vectors).

Legend: B users, N events of a stream, R recent, M mid-term, S lifelong slots, T candidates per user
(targets or beams), L tokens, D width, I = V + 1 dense items (0 unknown), K1, K2, K3 codes of the
levels, P = K1 * K2 pairs of codes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import NUM_MID, NUM_RECENT, Batch, Stream
from trainer.models.copying import CopyHead, CopyShares
from trainer.models.decoder import DecoderBlock, Fusion, StreamTokens
from trainer.models.events import EventEncoder
from trainer.models.layers import EncoderLayer, Memory
from trainer.models.trie import ItemTrie
from trainer.semantic_ids import SemanticIds

# Probabilities below this are treated as this, so that logarithms and their gradients stay finite.
SMALLEST_SHARE = 1e-12
# Spread of freshly drawn code vectors and tokens.
INITIAL_SPREAD = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class GemsConfig:
    """Sizes and switches of the model; stored with every export."""

    width: int = 64
    num_heads: int = 4
    num_blocks: int = 2
    num_recent_layers: int = 2
    num_mid_layers: int = 0
    num_recent: int = NUM_RECENT
    num_mid: int = NUM_MID
    num_lifelong: int = 16
    lifelong_width: int = 64
    fusion: Fusion = "delta_sum"
    copy: Literal["off", "streams"] = "streams"
    prior: Literal["off", "log_count"] = "log_count"
    leaf: Literal["codes", "items"] = "items"
    item_vectors: Literal["frozen", "trained"] = "frozen"
    dropout: float = 0.1


class History(NamedTuple):
    """What is known of B users: two streams of events and the lifelong memory.

    Attributes:
        lifelong_BSD: Summary tokens; `lifelong_mask_BS` is all False until memories exist.
    """

    recent: Stream
    mid: Stream
    lifelong_BSD: Tensor
    lifelong_mask_BS: Tensor


class Reading(NamedTuple):
    """Everything the decoder keeps of B users after the first token.

    Attributes:
        memories: Per block and stream, keys and values.
        past: Per block, the first token as later tokens need it [B, 1, 1, D].
        state_BD: The state that predicts the first code.
        contribution_B3: Share of each stream in what the decoder changed; 0 for an absent one.
        shares: The copy distribution, None with copy off.
        copy_weight_B: Probability that the next item is a copy; 0 with copy off.
    """

    memories: tuple[tuple[Memory, ...], ...]
    past: tuple[Tensor, ...]
    state_BD: Tensor
    contribution_B3: Tensor
    shares: CopyShares | None
    copy_weight_B: Tensor


class Gems(nn.Module):
    """The multi-stream generative retrieval model over a fixed tree of items."""

    def __init__(
        self,
        config: GemsConfig,
        semantic_ids: SemanticIds,
        *,
        num_domains: int,
        item_vectors_VE: Tensor,
        item_counts_V: Tensor,
    ) -> None:
        super().__init__()
        width, item_width = config.width, item_vectors_VE.shape[1]
        self.config = config
        self.trie = ItemTrie(semantic_ids)
        self.item = nn.Embedding(
            len(item_vectors_VE) + 1,
            item_width,
            padding_idx=0,
            _weight=functional.pad(item_vectors_VE, (0, 0, 1, 0)),
            _freeze=config.item_vectors == "frozen",
        )
        self.events = EventEncoder(
            width=width, item_width=item_width, num_domains=num_domains, sizes=semantic_ids.sizes
        )
        self.position_RD = nn.Parameter(INITIAL_SPREAD * torch.randn(config.num_recent, width))
        self.recent_layers = _layers(config.num_recent_layers, config)
        self.mid_layers = _layers(config.num_mid_layers, config)
        self.lifelong = nn.Linear(config.lifelong_width, width)
        self.begin_D = nn.Parameter(INITIAL_SPREAD * torch.randn(width))
        self.tokens = nn.ModuleList(_codes(size, width) for size in semantic_ids.sizes[:2])
        self.blocks = nn.ModuleList(
            DecoderBlock(width, config.num_heads, fusion=config.fusion)
            for _ in range(config.num_blocks)
        )
        self.dropout = nn.Dropout(config.dropout)
        self.norm = nn.RMSNorm(width)
        self.outputs = nn.ParameterList(
            INITIAL_SPREAD * torch.randn(size, width) for size in semantic_ids.sizes
        )
        biases = self.trie.log_counts(item_counts_V)
        scale = 1.0 if config.prior == "log_count" else 0.0
        self.biases = nn.ParameterList(nn.Parameter(scale * bias) for bias in biases)
        if config.leaf == "items":
            self.leaf = nn.Linear(width, item_width, bias=False)
        if config.copy == "streams":
            self.copy = CopyHead(width, item_width)
            self.gate = nn.Linear(width, 1)

    def read(self, history: History) -> Reading:
        """Encode the streams and decode the first token."""
        recent, mid, lifelong, lifelong_mask = history
        recent_BRD = self.events(recent, self.item(recent.item), self.trie)
        # The newest event is always last, so that positions count from the end.
        recent_BRD = recent_BRD + self.position_RD[-recent.item.shape[1] :]
        recent_BRD = self.dropout(recent_BRD)
        for layer in self.recent_layers:
            recent_BRD = layer(recent_BRD, recent.mask)
        mid_BMD = self.dropout(self.events(mid, self.item(mid.item), self.trie))
        for layer in self.mid_layers:
            mid_BMD = layer(mid_BMD, mid.mask)
        streams = (
            StreamTokens(recent_BRD, recent.mask),
            StreamTokens(mid_BMD, mid.mask),
            StreamTokens(self.lifelong(lifelong), lifelong_mask),
        )
        memories = tuple(block.remember(streams) for block in self._decoder_blocks())
        begin = self.begin_D.expand(recent_BRD.shape[0], 1, 1, -1)
        state_BTLD, past, change_BT3 = self.decode(begin, None, memories)
        state_BD = state_BTLD[:, 0, 0]
        change_B3 = change_BT3[:, 0]
        contribution = change_B3 / change_B3.sum(dim=1, keepdim=True).clamp(min=SMALLEST_SHARE)
        shares, weight = self._copies(recent, mid, state_BD)
        return Reading(memories, past, state_BD, contribution, shares, weight)

    def decode(
        self,
        x_BTLD: Tensor,
        past: tuple[Tensor, ...] | None,
        memories: tuple[tuple[Memory, ...], ...],
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor]:
        """Run new tokens through all blocks.

        Returns:
            Normalised states [B, T, L, D], what later tokens need per block, and the change that
            each stream made [B, T, 3].
        """
        kept, changes = [], []
        for number, block in enumerate(self._decoder_blocks()):
            before = None if past is None else past[number]
            x_BTLD, change, keep = block(x_BTLD, before, memories[number])
            kept.append(keep)
            changes.append(change)
        state: Tensor = self.dropout(self.norm(x_BTLD))
        return state, tuple(kept), torch.stack(changes).sum(dim=0)

    def _decoder_blocks(self) -> Iterator[DecoderBlock]:
        return iter(cast("Iterable[DecoderBlock]", self.blocks))

    def log_first(self, state_BD: Tensor) -> Tensor:
        """Log-probability of each first code [B, K1]."""
        logits = state_BD @ self.outputs[0].T + self.biases[0]
        return _log_softmax_where(logits, self.trie.valid_K)

    def log_second(self, state_BTD: Tensor, first_BT: Tensor) -> Tensor:
        """Log-probability of each second code, given the first [B, T, K2]."""
        logits = state_BTD @ self.outputs[1].T + self.biases[1][first_BT]
        return _log_softmax_where(logits, self.trie.valid_KK[first_BT])

    def log_third(self, state_BTD: Tensor, prefix_BT: Tensor) -> Tensor:
        """Log-probability of each last code, given the numbered pair before it [B, T, K3]."""
        logits = state_BTD @ self.outputs[2].T + self.biases[2][prefix_BT]
        children_BTK = self.trie.item_PK[prefix_BT]
        if self.config.leaf == "items":
            vectors_BTKE = self.item(children_BTK)
            logits = logits + (vectors_BTKE @ self.leaf(state_BTD).unsqueeze(3)).squeeze(3)
        return _log_softmax_where(logits, children_BTK > 0)

    def log_likelihood(self, batch: Batch) -> Tensor:
        """Log-probability of each target [B, T]; what is returned for target 0 means nothing."""
        reading = self.read(without_lifelong(batch.recent, batch.mid, self.config))
        codes_BT3 = self.trie.codes_I3[batch.targets_BT]
        first, second, third = codes_BT3.unbind(dim=2)
        x_BTLD = torch.stack((self.tokens[0](first), self.tokens[1](second)), dim=2)
        past = tuple(p.expand(-1, x_BTLD.shape[1], -1, -1) for p in reading.past)
        state_BTLD, _, _ = self.decode(x_BTLD, past, reading.memories)
        prefix = first * self.trie.sizes[1] + second
        generated = (
            _pick(
                self.log_first(reading.state_BD).unsqueeze(1).expand(-1, first.shape[1], -1), first
            )
            + _pick(self.log_second(state_BTLD[:, :, 0], first), second)
            + _pick(self.log_third(state_BTLD[:, :, 1], prefix), third)
        )
        if reading.shares is None:
            return generated
        share_BG, item_BG = reading.shares
        same_BTG = batch.targets_BT.unsqueeze(2) == item_BG.unsqueeze(1)
        copied_BT = (same_BTG * share_BG.unsqueeze(1)).sum(dim=2)
        return mixed_log(generated, copied_BT, reading.copy_weight_B.unsqueeze(1))

    def _copies(
        self, recent: Stream, mid: Stream, state_BD: Tensor
    ) -> tuple[CopyShares | None, Tensor]:
        if self.config.copy == "off":
            return None, torch.zeros_like(state_BD[:, 0])
        seen = self.copy.occurrences(
            torch.cat((mid.item, recent.item), dim=1),
            torch.cat((mid.age_ms, recent.age_ms), dim=1),
        )
        shares: CopyShares = self.copy(seen, self.item(seen.item_BG), state_BD)
        weight: Tensor = self.gate(state_BD).squeeze(1).sigmoid()
        return shares, weight * (shares.share_BG > 0).any(dim=1)


def mixed_log(log_generated: Tensor, copied: Tensor, copy_weight: Tensor) -> Tensor:
    """Log of the mixture of a generated (as logarithm) and a copied probability.

    Mixing whole items mixes every prefix alike, because the mass of a prefix is the sum of its
    items; beam search and training therefore follow one distribution.
    """
    from_model = log_generated + (1 - copy_weight).clamp(min=SMALLEST_SHARE).log()
    from_copy = (copied * copy_weight).clamp(min=SMALLEST_SHARE).log()
    return torch.logaddexp(from_model, from_copy)


def without_lifelong(recent: Stream, mid: Stream, config: GemsConfig) -> History:
    """Streams of users whose lifelong memory is empty."""
    batch, device = recent.item.shape[0], recent.item.device
    return History(
        recent,
        mid,
        torch.zeros(batch, config.num_lifelong, config.lifelong_width, device=device),
        torch.zeros(batch, config.num_lifelong, dtype=torch.bool, device=device),
    )


def _layers(count: int, config: GemsConfig) -> nn.ModuleList:
    return nn.ModuleList(EncoderLayer(config.width, config.num_heads) for _ in range(count))


def _codes(size: int, width: int) -> nn.Embedding:
    return nn.Embedding(size, width, _weight=INITIAL_SPREAD * torch.randn(size, width))


def _pick(log_BTK: Tensor, code_BT: Tensor) -> Tensor:
    return log_BTK.gather(2, code_BT.unsqueeze(2)).squeeze(2)


def _log_softmax_where(logits: Tensor, valid: Tensor) -> Tensor:
    """Normalise over the valid entries; a finite number elsewhere keeps gradients finite."""
    return logits.masked_fill(~valid, torch.finfo(logits.dtype).min).log_softmax(dim=-1)
