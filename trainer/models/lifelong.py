"""The lifelong stream: a sum over events, and what is read out of it.

Source: GEMs, arXiv 2602.13631, section on the lifecycle stream (learned query tokens read the old
history by quasi-linear attention, with a reconstruction loss). Inferred: the cross-only form, in
which the keys and values of an event depend on that event alone. It makes the state a sum, so
folding is free of order, mergeable and exact under replay. Also inferred: the self-term stands on
the seeds, and the read divides by the number of events, because a raw sum grows with it.

Legend: B users, N events, L layers, K key width, V value width, X = L * K rows of a state, S seeds,
D width, E width of an item vector, I = items + 1 (0 unknown).
"""

import hashlib
from collections.abc import Mapping
from typing import Self

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.batches import PADDING, OldEvents
from trainer.models.events import NUM_ACTIONS, NUM_TIME_BUCKETS, log_bucket
from trainer.models.layers import EncoderLayer, FeedForward

# The state every part of Moveline agrees on: float32 [64, 64] a user, 16 KiB.
NUM_LAYERS = 2
KEY_WIDTH = 32
VALUE_WIDTH = 64
NUM_ROWS = NUM_LAYERS * KEY_WIDTH
# Raised when folding computes something else from the same weights: memories of old and new code
# must not be added up.
FOLD_VERSION = 1
MEMORY_VERSION_DIGITS = 16
# An hour of the week is known of an event for ever; its age is not.
HOURS_PER_WEEK = 168
MS_PER_HOUR = 3_600_000
# Spread of freshly drawn tables and seeds.
INITIAL_SPREAD = 0.1
# Old events, the newest ones, that the seeds must let be told again.
MAX_RECONSTRUCTED = 64


class Compressor(nn.Module):
    """Folds old events into the state. It carries the tables it needs and takes raw ids.

    Tables and weights are frozen together once memories exist: a model that reads them may be
    trained on and its vocabulary may grow, the memories stay what they are.
    """

    item_ids_V: Tensor
    domain_ids: Tensor
    item_vector_IE: Tensor

    def __init__(
        self, *, width: int, item_ids_V: Tensor, domain_ids: Tensor, item_vectors_VE: Tensor
    ) -> None:
        super().__init__()
        self.register_buffer("item_ids_V", item_ids_V)
        self.register_buffer("domain_ids", domain_ids)
        self.register_buffer("item_vector_IE", functional.pad(item_vectors_VE, (0, 0, 1, 0)))
        self.item = nn.Linear(item_vectors_VE.shape[1], width)
        self.domain = _table(len(domain_ids) + 1, width)
        self.action = _table(NUM_ACTIONS, width)
        self.dwell = _table(NUM_TIME_BUCKETS, width)
        self.hour = _table(HOURS_PER_WEEK, width)
        self.mix = nn.Linear(width, width)
        self.key = nn.Linear(width, NUM_ROWS, bias=False)
        self.value = nn.Linear(width, NUM_LAYERS * VALUE_WIDTH, bias=False)

    @classmethod
    def restored(cls, weights: Mapping[str, Tensor]) -> Self:
        """The compressor whose `state_dict` was given, for instance that of a package."""
        compressor = cls(
            width=weights["mix.weight"].shape[0],
            item_ids_V=weights["item_ids_V"],
            domain_ids=weights["domain_ids"],
            item_vectors_VE=weights["item_vector_IE"][1:],
        )
        compressor.load_state_dict(dict(weights))
        return compressor

    def forward(
        self, item: Tensor, action: Tensor, domain: Tensor, dwell_ms: Tensor, event_time_ms: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Fold events of B users, each tensor int64 [B, N]; item PADDING is no event.

        Returns:
            The state float32 [B, X, V] and the number of events folded int64 [B, 1]. Both of two
            sets of events together are the sums of those of each set.
        """
        is_event = item != PADDING
        x_BND = self._vectors(item, action, domain, dwell_ms, event_time_ms)
        key_BNLK = functional.silu(self.key(x_BND)).view(*item.shape, NUM_LAYERS, KEY_WIDTH)
        key_BNLK = key_BNLK * is_event[:, :, None, None]
        value_BNLV = self.value(x_BND).view(*item.shape, NUM_LAYERS, VALUE_WIDTH)
        state_BLKV = key_BNLK.permute(0, 2, 3, 1) @ value_BNLV.transpose(1, 2)
        return state_BLKV.flatten(1, 2), is_event.sum(dim=1, keepdim=True)

    def fold(self, events: OldEvents) -> tuple[Tensor, Tensor]:
        """The same of events in one piece."""
        state, count = self(*events)
        return state, count

    def item_vectors(self, item: Tensor) -> Tensor:
        """The frozen vectors of raw item ids, 0 for unknown ones and padding."""
        return self.item_vector_IE[index_of(self.item_ids_V, item)]

    def _vectors(
        self, item: Tensor, action: Tensor, domain: Tensor, dwell_ms: Tensor, event_time_ms: Tensor
    ) -> Tensor:
        hour = torch.div(event_time_ms, MS_PER_HOUR, rounding_mode="floor") % HOURS_PER_WEEK
        total: Tensor = self.item(self.item_vectors(item))
        total = total + self.domain(index_of(self.domain_ids, domain))
        total = total + self.action(action.clamp(min=0, max=NUM_ACTIONS - 1))
        total = total + self.dwell(log_bucket(dwell_ms)) + self.hour(hour)
        mixed: Tensor = self.mix(functional.silu(total))
        return functional.rms_norm(mixed, mixed.shape[-1:])


def memory_version(compressor: Compressor) -> str:
    """16 hex digits that change with any weight, item table or the way of folding."""
    digest = hashlib.sha256(f"fold {FOLD_VERSION}\n".encode())
    for name, tensor in sorted(compressor.state_dict().items()):
        array = np.ascontiguousarray(tensor.detach().cpu().numpy())
        little = array.astype(array.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{name} {array.dtype.name} {array.shape}\n".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()[:MEMORY_VERSION_DIGITS]


class ReaderLayer(nn.Module):
    """One layer of quasi-linear attention from the seeds into its part of the state."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.query = nn.Linear(width, KEY_WIDTH, bias=False)
        self.key = nn.Linear(width, KEY_WIDTH, bias=False)
        self.value = nn.Linear(width, VALUE_WIDTH, bias=False)
        self.norm_read = nn.RMSNorm(VALUE_WIDTH)
        self.out = nn.Linear(VALUE_WIDTH, width, bias=False)
        self.feed_forward = FeedForward(width)

    def forward(self, seeds_BSD: Tensor, mean_BKV: Tensor) -> Tensor:
        """The seeds after they read phi(q) phi(mean) + phi(q) phi(k) v of themselves."""
        normed = self.norm(seeds_BSD)
        query_BSK = functional.silu(self.query(normed))
        own_BS1 = (query_BSK * functional.silu(self.key(normed))).sum(dim=2, keepdim=True)
        read_BSV = query_BSK @ functional.silu(mean_BKV) + own_BS1 * self.value(normed)
        seeds_BSD = seeds_BSD + self.out(self.norm_read(read_BSV))
        changed: Tensor = seeds_BSD + self.feed_forward(seeds_BSD)
        return changed


class MemoryReader(nn.Module):
    """Turns a state into summary tokens: learned seeds read it, a light encoder mixes them."""

    def __init__(self, *, width: int, num_heads: int, num_seeds: int, num_layers: int) -> None:
        super().__init__()
        self.seeds_SD = nn.Parameter(INITIAL_SPREAD * torch.randn(num_seeds, width))
        self.layers = nn.ModuleList(ReaderLayer(width) for _ in range(NUM_LAYERS))
        self.encoders = nn.ModuleList(EncoderLayer(width, num_heads) for _ in range(num_layers))

    def forward(self, state_BXV: Tensor, count_B1: Tensor) -> tuple[Tensor, Tensor]:
        """Summary tokens [B, S, D] and their mask [B, S], all False where nothing was folded."""
        mean_BXV = state_BXV / count_B1.clamp(min=1).unsqueeze(2)
        seeds_BSD = self.seeds_SD.expand(state_BXV.shape[0], -1, -1)
        for layer, mean_BKV in zip(self.layers, mean_BXV.chunk(NUM_LAYERS, dim=1), strict=True):
            seeds_BSD = layer(seeds_BSD, mean_BKV)
        mask_BS = (count_B1 > 0).expand(-1, self.seeds_SD.shape[0])
        for encoder in self.encoders:
            seeds_BSD = encoder(seeds_BSD, mask_BS.unsqueeze(1))
        return seeds_BSD, mask_BS


class Reconstruction(nn.Module):
    """Tells the next old event from the summary tokens and the old events before it.

    A causal decoder whose attention has no softmax, as in the source; it only exists to train what
    the seeds keep. Attention is divided by the number of its keys (inferred).
    """

    def __init__(self, *, width: int, item_width: int) -> None:
        super().__init__()
        self.event = nn.Linear(item_width, width)
        self.query = nn.Linear(width, KEY_WIDTH, bias=False)
        self.key = nn.Linear(width, KEY_WIDTH, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.norm = nn.RMSNorm(width)
        self.out = nn.Linear(width, item_width)

    def forward(self, summary_BSD: Tensor, vector_BNE: Tensor, mask_BN: Tensor) -> Tensor:
        """Mean squared distance, a scalar; 0 when no user has two events.

        Args:
            summary_BSD: What the seeds read of the whole old history.
            vector_BNE: Item vectors of its newest events, newest last.
            mask_BN: False on padding.
        """
        x_BND = functional.silu(self.event(vector_BNE))
        query_BNK = functional.silu(self.query(x_BND))
        to_seeds = query_BNK @ functional.silu(self.key(summary_BSD)).transpose(1, 2)
        told_BND = to_seeds @ self.value(summary_BSD) / summary_BSD.shape[1]
        to_past = (query_BNK @ functional.silu(self.key(x_BND)).transpose(1, 2)).tril()
        to_past = to_past * mask_BN.unsqueeze(1)
        num_past = mask_BN.cumsum(dim=1).clamp(min=1).unsqueeze(2)
        told_BND = told_BND + to_past @ self.value(x_BND) / num_past
        guess_BNE = self.out(self.norm(told_BND))
        error_BN = (guess_BNE[:, :-1] - vector_BNE[:, 1:]).square().sum(dim=2)
        both_BN = mask_BN[:, :-1] & mask_BN[:, 1:]
        distance: Tensor = (error_BN * both_BN).sum() / both_BN.sum().clamp(min=1)
        return distance


def newest_vectors(compressor: Compressor, events: OldEvents) -> tuple[Tensor, Tensor]:
    """Item vectors of the newest old events, and which of them are events of known items."""
    item = events.item[:, -MAX_RECONSTRUCTED:]
    vectors = compressor.item_vectors(item)
    return vectors, index_of(compressor.item_ids_V, item) > 0


def index_of(sorted_ids: Tensor, ids: Tensor) -> Tensor:
    """Place of each id plus one, or 0; the torch twin of vocabulary.index_of."""
    place = torch.searchsorted(sorted_ids, ids.contiguous()).clamp(max=sorted_ids.shape[0] - 1)
    return torch.where(sorted_ids[place] == ids, place + 1, 0)


def _table(size: int, width: int) -> nn.Embedding:
    return nn.Embedding(size, width, _weight=INITIAL_SPREAD * torch.randn(size, width))
