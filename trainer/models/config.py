"""Sizes and switches of GEMs."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from trainer.batches import NUM_MID, NUM_RECENT
from trainer.models.decoder import Fusion
from trainer.models.indexer import IndexerConfig

StreamName = Literal["recent", "mid", "lifelong"]
ALL_STREAMS: tuple[StreamName, ...] = ("recent", "mid", "lifelong")
# Items up to which the dense head is used: an answer scores all of them.
DENSE_ITEMS_MAX = 100_000
# Events before the mid-term stream that a label sees at most while training; a longer past is
# thinned. Twice the mid-term stream of a small machine.
MAX_OLDER_EVENTS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class GemsConfig:
    """Sizes and switches of the model; stored with every export.

    Attributes:
        num_seeds: Summary tokens read out of a lifelong memory.
        num_older: Old events of a label while training; see `MAX_OLDER_EVENTS`.
        streams: Those that are read; the others are left out for an ablation.
        mid_attention: "indexer" trains an indexer and serves top-K attention, "full" does neither;
            "measured" trains one and lets the exporter serve what is faster on its machine.
        index_weight: Weight of the indexer's divergence, 1 in the paper.
        reconstruction_weight: Weight of the lifelong reconstruction; inferred.
        memory_dropout: Share of the users whose memory is hidden while training.
        fusion: "sum" is the paper's; "gate" is an ablation and not to be served.
        dense: "by_log" leaves it to the log that is learned from, see `settled`; a model's own
            configuration says "on" or "off".
    """

    width: int = 64
    num_heads: int = 4
    num_blocks: int = 2
    num_recent_layers: int = 2
    num_mid_layers: int = 0
    num_lifelong_layers: int = 1
    num_recent: int = NUM_RECENT
    num_mid: int = NUM_MID
    num_seeds: int = 16
    num_older: int = MAX_OLDER_EVENTS
    streams: tuple[StreamName, ...] = ALL_STREAMS
    fusion: Fusion = "delta_sum"
    mid_attention: Literal["full", "indexer", "measured"] = "full"
    indexer: IndexerConfig = field(default_factory=IndexerConfig)
    index_weight: float = 1.0
    reconstruction_weight: float = 0.1
    memory_dropout: float = 0.1
    copy: Literal["off", "streams"] = "streams"
    prior: Literal["off", "log_count"] = "log_count"
    leaf: Literal["codes", "items"] = "items"
    dense: Literal["off", "on", "by_log"] = "by_log"
    item_vectors: Literal["frozen", "trained"] = "frozen"
    dropout: float = 0.1

    @property
    def used_indexer(self) -> IndexerConfig | None:
        """The indexer's configuration, None where attention is always full.

        It never keeps more keys than the mid-term stream surely has, so that an exported graph
        keeps a fixed number.
        """
        if self.mid_attention == "full":
            return None
        return replace(self.indexer, top_k=min(self.indexer.top_k, self.num_mid))

    @property
    def copies(self) -> bool:
        """Whether the model may point at its streams; a memory cannot list its items."""
        return self.copy == "streams" and bool({"recent", "mid"} & set(self.streams))

    def settled(self, *, repeats: bool, num_items: int) -> Self:
        """The same with `dense` decided: used where nobody meets an item twice.

        Where people repeat themselves the copy head names what comes, and the seconds that the
        dense head takes from a training are missed.

        Args:
            repeats: Whether people do.
            num_items: More than `DENSE_ITEMS_MAX` are too many to score all.
        """
        if self.dense != "by_log":
            return self
        fits = not repeats and num_items <= DENSE_ITEMS_MAX and "recent" in self.streams
        return replace(self, dense="on" if fits else "off")

    @property
    def num_older_read(self) -> int:
        """Old events that a batch must bring, 0 without the lifelong stream."""
        return self.num_older if "lifelong" in self.streams else 0
