"""GEMs: retrieval by generating semantic ids from three streams of a user's history.

Source: GEMs, arXiv 2602.13631: sections on the streams, the multi-stream decoder, the indexer
(indexer.py), the lifecycle stream (lifelong.py) and the training stages. Named extensions, each
switchable: `copy` (copying.py), `dense` (dense.py), `prior` (the logits start at the log frequency
of each node of the id tree) and `leaf` (the last level also matches item vectors).

Legend: B users, N events of a stream, R recent, M mid-term, S summary tokens, X rows and V columns
of a lifelong state, T candidates per user (targets or beams), L tokens, D width, G places for
distinct items of the streams, I = V + 1 dense items (0 unknown), K1, K2, K3 codes of the levels,
P = K1 * K2 pairs of codes.
"""

import copy
from collections.abc import Iterable, Iterator
from typing import NamedTuple, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import Batch, OldEvents, Stream
from trainer.models.config import GemsConfig
from trainer.models.copying import CopyHead, CopyShares, item_facts
from trainer.models.decoder import DecoderBlock
from trainer.models.dense import DenseHead
from trainer.models.events import EventEncoder
from trainer.models.indexer import FULL, TOP_K, IndexedBranch, Stage
from trainer.models.layers import EncoderLayer, Memory, StreamTokens, causal
from trainer.models.lifelong import Compressor, MemoryReader, Reconstruction, newest_vectors
from trainer.models.reading import (
    SMALLEST_SHARE,
    History,
    Reading,
    copied_from,
    mixed_log,
    without_lifelong,
)
from trainer.models.trie import ItemTrie
from trainer.semantic_ids import SemanticIds

__all__ = ["Gems", "GemsConfig"]

# Spread of freshly drawn code vectors and tokens.
INITIAL_SPREAD = 0.05


class Decoded(NamedTuple):
    """States after new tokens [B, T, L, D], the past per block, changes [B, T, 3], a loss."""

    state_BTLD: Tensor
    past: tuple[Tensor, ...]
    change_BT3: Tensor
    index_loss: Tensor


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
        item_users_V: Tensor,
        compressor: Compressor | None = None,
    ) -> None:
        """Draw fresh weights.

        Args:
            config: Sizes and switches.
            semantic_ids: Of the items.
            num_domains: Domains the vocabulary knows.
            item_vectors_VE: Read off the log.
            item_counts_V: Events of each item.
            item_users_V: Users who had any.
            compressor: Folds old events while training; a served model gets states ready-made.
        """
        super().__init__()
        assert config.dense != "by_log", "see GemsConfig.settled"
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
        self.memory = MemoryReader(
            width=width,
            num_heads=config.num_heads,
            num_seeds=config.num_seeds,
            num_layers=config.num_lifelong_layers,
        )
        self.compressor = compressor if "lifelong" in config.streams else None
        if self.compressor is not None:
            self.reconstruction = Reconstruction(
                width=width, item_width=self.compressor.item_vector_IE.shape[1]
            )
        self.begin_D = nn.Parameter(INITIAL_SPREAD * torch.randn(width))
        self.tokens = nn.ModuleList(_codes(size, width) for size in semantic_ids.sizes[:2])
        self.blocks = nn.ModuleList(
            DecoderBlock(width, config.num_heads, fusion=config.fusion, indexer=config.used_indexer)
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
        if config.copies:
            self.copy = CopyHead(width, item_width, item_facts(item_counts_V, item_users_V))
            self.gate = nn.Linear(width, 1)
        if config.dense == "on":
            self.dense = DenseHead(width, item_vectors_VE, item_counts_V, dropout=config.dropout)

    def set_stage(self, stage: Stage) -> None:
        """Enter a stage of training: 1 full attention, 2 the indexer learns, 3 top-K on.

        Source: section on training stages. Without an indexer every stage is the first.
        """
        for block in self._decoder_blocks():
            if isinstance(block.mid, IndexedBranch):
                block.mid.stage = stage

    def for_serving(self) -> Self:
        """A copy in evaluation mode that has only what an answer needs."""
        served = copy.deepcopy(self).eval()
        served.compressor = None
        if hasattr(served, "reconstruction"):
            del served.reconstruction
        served.set_stage(TOP_K if self.config.mid_attention == "indexer" else FULL)
        return served

    def history(self, recent: Stream, mid: Stream, older: OldEvents | None) -> History:
        """What is known of users whose old events are at hand; None stands for no old events."""
        if older is None or self.compressor is None:
            return without_lifelong(recent, mid)
        state_BXV, count_B1 = self.compressor.fold(older)
        return History(recent, mid, state_BXV, count_B1)

    def read(self, history: History) -> Reading:
        """Encode the streams and decode the first token."""
        recent, mid, state_BXV, count_B1 = history
        summary_BSD, summary_mask_BS = self.memory(state_BXV, count_B1)
        streams = self._present(
            self._recent(recent), self._mid(mid), StreamTokens(summary_BSD, summary_mask_BS)
        )
        memories = tuple(block.remember(streams) for block in self._decoder_blocks())
        begin = self.begin_D.expand(state_BXV.shape[0], 1, 1, -1)
        state_BTLD, past, change_BT3, index_loss = self.decode(begin, None, memories)
        state_BD = state_BTLD[:, 0, 0]
        change_B3 = change_BT3[:, 0]
        contribution = change_B3 / change_B3.sum(dim=1, keepdim=True).clamp(min=SMALLEST_SHARE)
        dense = None
        if self.config.dense == "on":
            dense = self.dense(recent.item, streams[0].tokens_BND, state_BD)
        shares, weight_B = self._copies(recent, mid, state_BD)
        if dense is not None:
            weight_B = weight_B * (1 - dense.weight_B)
        return Reading(
            memories, past, state_BD, contribution, shares, weight_B, dense, summary_BSD, index_loss
        )

    def _recent(self, recent: Stream) -> StreamTokens:
        x_BRD = self.events(recent, self.item(recent.item), self.trie)
        # The newest event is always last, so that positions count from the end.
        x_BRD = x_BRD + self.position_RD[-recent.item.shape[1] :]
        x_BRD = self.dropout(x_BRD)
        # With a dense head every event is taught what came next, and must not see it.
        is_causal = self.config.dense == "on"
        mask_BQR = causal(recent.mask) if is_causal else recent.mask.unsqueeze(1)
        for layer in self.recent_layers:
            x_BRD = layer(x_BRD, mask_BQR)
        return StreamTokens(x_BRD, recent.mask)

    def _mid(self, mid: Stream) -> StreamTokens:
        x_BMD = self.dropout(self.events(mid, self.item(mid.item), self.trie))
        for layer in self.mid_layers:
            x_BMD = layer(x_BMD, mid.mask.unsqueeze(1))
        return StreamTokens(x_BMD, mid.mask)

    def _present(self, *streams: StreamTokens) -> tuple[StreamTokens, ...]:
        """The streams, those that the configuration leaves out as if nobody had any event."""
        return tuple(
            stream._replace(mask_BN=stream.mask_BN & (name in self.config.streams))
            for name, stream in zip(("recent", "mid", "lifelong"), streams, strict=True)
        )

    def decode(
        self,
        x_BTLD: Tensor,
        past: tuple[Tensor, ...] | None,
        memories: tuple[tuple[Memory, ...], ...],
    ) -> Decoded:
        """Run new tokens through all blocks; the states returned are normalised."""
        kept, changes, losses = [], [], []
        for number, block in enumerate(self._decoder_blocks()):
            before = None if past is None else past[number]
            x_BTLD, change, keep, loss = block(x_BTLD, before, memories[number])
            kept.append(keep)
            changes.append(change)
            losses.append(loss)
        return Decoded(
            self.dropout(self.norm(x_BTLD)),
            tuple(kept),
            torch.stack(changes).sum(dim=0),
            torch.stack(losses).sum(),
        )

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

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-likelihood of the known targets, plus the weighted side losses.

        Source: section on losses: L_NTP + lambda * L_idx + L_rec. The weight of L_rec is inferred.
        """
        generated_BT, reading = self._likelihood(batch)
        known_BT = batch.targets_BT > 0
        loss: Tensor = -(generated_BT * known_BT).sum() / known_BT.sum().clamp(min=1)
        loss = loss + self.config.index_weight * reading.index_loss
        if reading.dense is not None:
            loss = loss + self.dense.loss(reading.dense.query_BRE, batch.recent, batch.targets_BT)
        if self.compressor is None or batch.older is None:
            return loss
        vectors, mask = newest_vectors(self.compressor, batch.older)
        told: Tensor = self.reconstruction(reading.summary_BSD, vectors, mask)
        return loss + self.config.reconstruction_weight * told

    def dense_loss(self, batch: Batch) -> Tensor:
        """What the dense head alone learns from: its own loss, through the recent encoder."""
        x_BRD = self._recent(batch.recent).tokens_BND
        query_BRE = self.dense.queries(batch.recent.item, x_BRD)
        loss: Tensor = self.dense.loss(query_BRE, batch.recent, batch.targets_BT)
        return loss

    def log_likelihood(self, batch: Batch) -> Tensor:
        """Log-probability of each target [B, T]; what is returned for target 0 means nothing."""
        return self._likelihood(batch)[0]

    def _likelihood(self, batch: Batch) -> tuple[Tensor, Reading]:
        """Log-probabilities [B, T], and the reading with the index loss of every token."""
        history = self.history(batch.recent, batch.mid, batch.older)
        reading = self.read(self._with_some_memories_lost(history))
        codes_BT3 = self.trie.codes_I3[batch.targets_BT]
        first, second, third = codes_BT3.unbind(dim=2)
        x_BTLD = torch.stack((self.tokens[0](first), self.tokens[1](second)), dim=2)
        past = tuple(p.expand(-1, x_BTLD.shape[1], -1, -1) for p in reading.past)
        state_BTLD, _, _, index_loss = self.decode(x_BTLD, past, reading.memories)
        reading = reading._replace(index_loss=reading.index_loss + index_loss)
        prefix = first * self.trie.sizes[1] + second
        first_BTK = self.log_first(reading.state_BD).unsqueeze(1).expand(-1, first.shape[1], -1)
        generated = (
            _pick(first_BTK, first)
            + _pick(self.log_second(state_BTLD[:, :, 0], first), second)
            + _pick(self.log_third(state_BTLD[:, :, 1], prefix), third)
        )
        pointed_BT = reading.pointed(batch.targets_BT)
        return mixed_log(generated, pointed_BT, reading.generated_weight().unsqueeze(1)), reading

    def _with_some_memories_lost(self, history: History) -> History:
        """While training, some users are read without their memory: it may be missing in service.

        A memory of a new version is complete for everybody only after a while.
        """
        if not self.training or self.compressor is None or self.config.memory_dropout == 0:
            return history
        kept_B1 = torch.rand_like(history.lifelong_BXV[:, 0, :1]) >= self.config.memory_dropout
        return history._replace(
            lifelong_BXV=history.lifelong_BXV * kept_B1.unsqueeze(2),
            lifelong_count_B1=history.lifelong_count_B1 * kept_B1,
        )

    def _copies(
        self, recent: Stream, mid: Stream, state_BD: Tensor
    ) -> tuple[CopyShares | None, Tensor]:
        if not self.config.copies:
            return None, torch.zeros_like(state_BD[:, 0])
        seen = self.copy.occurrences(*copied_from(self.config, recent, mid))
        shares: CopyShares = self.copy(seen, self.item(seen.item_BG), state_BD)
        weight: Tensor = self.gate(state_BD).squeeze(1).sigmoid()
        return shares, weight * (shares.share_BG > 0).any(dim=1)


def _layers(count: int, config: GemsConfig) -> nn.ModuleList:
    return nn.ModuleList(EncoderLayer(config.width, config.num_heads) for _ in range(count))


def _codes(size: int, width: int) -> nn.Embedding:
    return nn.Embedding(size, width, _weight=INITIAL_SPREAD * torch.randn(size, width))


def _pick(log_BTK: Tensor, code_BT: Tensor) -> Tensor:
    return log_BTK.gather(2, code_BT.unsqueeze(2)).squeeze(2)


def _log_softmax_where(logits: Tensor, valid: Tensor) -> Tensor:
    """Normalise over the valid entries; a finite number elsewhere keeps gradients finite."""
    return logits.masked_fill(~valid, torch.finfo(logits.dtype).min).log_softmax(dim=-1)
