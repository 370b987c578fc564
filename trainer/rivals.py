"""Every ranking that is compared, by name."""

from dataclasses import dataclass, field
from typing import Literal

from features.sources import SOURCES
from trainer.streaming_evaluation import RECENT, STREAMS

Kind = Literal["free", "sequence", "tiger", "gems", "served", "blend"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rival:
    """One ranking that is compared.

    Attributes:
        base: Which model; for those without one the function of baselines.py.
        window: Newest events that a single-stream model reads.
        changes: What differs from the defaults of GEMs.
        sources: What a blend mixes, or the model that is served and its live sources.
        definition: Raised where what a rival computes has changed, so that older results of it are
            not taken for new ones.
        note: What it is, for the table.
    """

    kind: Kind
    base: str
    note: str
    window: int = RECENT
    changes: dict[str, object] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    definition: int = 1


# Counts that a blend mixes, live up to the moment.
COUNTED = (*SOURCES, "own_frequency")
# What the paper does not have.
PLAIN: dict[str, object] = {"copy": "off", "prior": "off", "leaf": "codes", "dense": "off"}
RIVALS: dict[str, Rival] = {
    "popularity": Rival(kind="free", base="popularity", note="events so far, renewed daily"),
    "recent_popularity": Rival(
        kind="free",
        base="recent_popularity",
        note="events lately, halved each half-life",
        definition=2,
    ),
    "own_frequency": Rival(
        kind="free",
        base="own_frequency",
        note="own items by count, an event of age n weighs .995^n",
    ),
    "own_recency": Rival(kind="free", base="own_recency", note="own items, the newest first"),
    "co_occurrence": Rival(
        kind="free",
        base="co_occurrence",
        note="what came soon after the last item, for anyone",
        definition=2,
    ),
    "gru4rec": Rival(kind="sequence", base="gru4rec", note="recurrent, 64 events"),
    "gru4rec_long": Rival(
        kind="sequence", base="gru4rec", note="recurrent, 512 events", window=STREAMS
    ),
    "sasrec": Rival(kind="sequence", base="sasrec", note="self-attention, 64 events"),
    "sasrec_long": Rival(
        kind="sequence", base="sasrec", note="self-attention, 512 events", window=STREAMS
    ),
    "hstu": Rival(kind="sequence", base="hstu", note="pointwise attention, 64 events"),
    "hstu_long": Rival(
        kind="sequence", base="hstu", note="pointwise attention, 512 events", window=STREAMS
    ),
    "tiger": Rival(kind="tiger", base="tiger", note="semantic ids from one stream of 64 events"),
    "tiger_long": Rival(
        kind="tiger", base="tiger", note="semantic ids from one stream of 512", window=STREAMS
    ),
    "gems": Rival(
        kind="served",
        base="by_facts",
        note="as served: the model and the live sources",
        sources=("gems_no_sources", *SOURCES),
        definition=4,
    ),
    "gems_constant_weights": Rival(
        kind="served",
        base="constant",
        note="as served, the weights of model and sources constant",
        sources=("gems_no_sources", *SOURCES),
        definition=4,
    ),
    "gems_no_sources": Rival(
        kind="gems", base="gems", note="the model alone: no live sources", definition=2
    ),
    "gems_plain": Rival(
        kind="gems", base="gems", note="the paper's method alone: no extension", changes=PLAIN
    ),
    "gems_no_copy": Rival(
        kind="gems", base="gems", note="the model without the copy head", changes={"copy": "off"}
    ),
    "gems_no_dense": Rival(
        kind="gems",
        base="gems",
        note="the model without the dense head, which it has where nobody repeats",
        changes={"dense": "off"},
    ),
    "gems_no_prior": Rival(
        kind="gems",
        base="gems",
        note="the model without the prior",
        changes={"prior": "off"},
        definition=2,
    ),
    "gems_sum": Rival(
        kind="gems", base="gems", note="fusion sum", changes={"fusion": "sum"}, definition=2
    ),
    "gems_mean": Rival(
        kind="gems", base="gems", note="fusion mean", changes={"fusion": "mean"}, definition=2
    ),
    "gems_recent_only": Rival(
        kind="gems",
        base="gems",
        note="the model, recent stream alone",
        changes={"streams": ("recent",)},
        definition=2,
    ),
    "gems_no_mid": Rival(
        kind="gems",
        base="gems",
        note="the model without the mid-term stream",
        changes={"streams": ("recent", "lifelong")},
        definition=2,
    ),
    "gems_no_lifelong": Rival(
        kind="gems",
        base="gems",
        note="the model without the lifelong stream",
        changes={"streams": ("recent", "mid")},
        definition=2,
    ),
    "gems_gate": Rival(
        kind="gems",
        base="gems",
        note="learned gate instead of the sum",
        changes={"fusion": "gate"},
        definition=2,
    ),
    "counts_blend": Rival(
        kind="blend",
        base="blend",
        note="live counts alone, own items among them, constant weights",
        sources=COUNTED,
        definition=3,
    ),
}

# What a run measures where nothing else is asked for: in half an hour on two cores.
DEFAULT_RIVALS = (
    "popularity",
    "recent_popularity",
    "own_frequency",
    "own_recency",
    "co_occurrence",
    "gru4rec",
    "sasrec",
    "hstu",
    "tiger",
    "gems",
    "gems_constant_weights",
    "gems_no_sources",
    "gems_plain",
    "counts_blend",
)
# Models that read one stream of the recent stream's length.
SINGLE_STREAM = ("gru4rec", "sasrec", "hstu", "tiger")
