"""Quality of a ranking on the judged labels, every label ranked before its events are shown.

Full ranking over the catalogue of the moment: an item may be named from its first event on, and an
item that a model cannot name is a miss. The events of one label are ranked together, from what was
known before them. `hr` and `ndcg` are means over events (an event at place r of its list is worth
1 / log2(r + 1)); `recall` is the mean over labels of the share of a label's distinct items that are
in the list. Differences are judged by drawing users anew, because the events of one user are alike.

Legend: G labels, E events of the labels, K places of a list, U users.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track

from trainer.batches import BatchSource, in_order
from trainer.dataset import Bools, Int64s, LabelGroups
from trainer.evaluate import BATCH_GROUPS, Ranker
from trainer.protocols import Task

Float64s = NDArray[np.float64]

# Length of the lists that rankers return, and the lengths that are judged.
LIST_LENGTH = 100
CUTS = (10, 100)
# A user's history and the age of an interest in events: within the recent stream, within the
# mid-term stream, older. Ages count back from the newest event known, 1 being that event.
RECENT, STREAMS = 64, 512
HISTORY_BANDS = {
    "up to 16": (0, 16),
    "17 to 64": (17, RECENT),
    "65 to 512": (RECENT + 1, STREAMS),
    "over 512": (STREAMS + 1, None),
}
AGE_BANDS = {
    "recent (64)": (1, RECENT),
    "mid-term (65 to 512)": (RECENT + 1, STREAMS),
    "older": (STREAMS + 1, None),
    "never met": (0, 0),
}
# Times that users are drawn anew for an interval.
NUM_RESAMPLES = 2_000

Figures = dict[str, float]


@dataclass(frozen=True, slots=True)
class Targets:
    """The events of the judged labels.

    Attributes:
        met_ago_E: How many events ago the user last met the item; 0 for never.
        known_G: Events known at each label.
    """

    group_E: Int64s
    item_E: Int64s
    user_E: Int64s
    met_ago_E: Int64s
    known_G: Int64s

    @classmethod
    def of(cls, source: BatchSource, groups: LabelGroups) -> "Targets":
        """Look up the events of some labels; items are dense indices of the source."""
        group_E = np.repeat(np.arange(len(groups)), groups.num_rows_G)
        first_E = np.cumsum(groups.num_rows_G) - groups.num_rows_G
        row_E = groups.first_row_G[group_E] + np.arange(len(group_E)) - first_E[group_E]
        return cls(
            group_E=group_E,
            item_E=source.item_N[row_E],
            user_E=groups.user_G[group_E],
            met_ago_E=_met_ago(source, row_E, groups.first_row_G[group_E]),
            known_G=groups.first_row_G - source.log.offsets[groups.user_G] - groups.num_late_G,
        )


def _met_ago(source: BatchSource, row_E: Int64s, first_row_E: Int64s) -> Int64s:
    """Rows between each event's label and the row before it with the same user and item, or 0."""
    num_rows = source.log.num_events
    _, pair_N = np.unique(
        source.log.user_N * (int(source.item_N.max()) + 1) + source.item_N, return_inverse=True
    )
    met = np.sort(pair_N * num_rows + np.arange(num_rows))
    place = np.searchsorted(met, pair_N[row_E] * num_rows + first_row_E) - 1
    pair, row = np.divmod(met[np.maximum(place, 0)], num_rows)
    found = (place >= 0) & (pair == pair_N[row_E])
    ago: Int64s = np.where(found, first_row_E - row, 0)
    return ago


def rank_all(source: BatchSource, groups: LabelGroups, rank: Ranker, *, name: str) -> Int64s:
    """Rank every label [G, K], a batch at a time, labels with histories of similar length."""
    order = np.argsort(source.history_lengths(groups), kind="stable")
    num_batches = -(-len(groups) // BATCH_GROUPS)
    parts = in_order(groups.select(order), size=BATCH_GROUPS)
    console = Console(stderr=True)
    shown = track(
        parts,
        f"judge {name}",
        total=num_batches,
        transient=True,
        console=console,
        disable=not console.is_terminal,
    )
    ranked = np.concatenate([rank(part) for part in shown])
    back = np.empty_like(order)
    back[order] = np.arange(len(order))
    return ranked[back]


def rank_frozen(source: BatchSource, frozen: LabelGroups, rank: Ranker, *, name: str) -> Int64s:
    """Rank every label from the state of the split [G, K]: one list per user serves them all."""
    _, first, inverse = np.unique(frozen.user_G, return_index=True, return_inverse=True)
    return rank_all(source, frozen.select(first), rank, name=name)[inverse]


def places(targets: Targets, ranked_GK: Int64s) -> Int64s:
    """Place of each event's item in its list, from 1; 0 where it is not in it [E]."""
    hit_EK = ranked_GK[targets.group_E] == targets.item_E[:, None]
    return np.where(hit_EK.any(axis=1), hit_EK.argmax(axis=1) + 1, 0)


def gains(place_E: Int64s, *, cut: int) -> Float64s:
    """What each event is worth in a list cut there [E]."""
    inside = (place_E > 0) & (place_E <= cut)
    return np.where(inside, 1.0 / np.log2(np.maximum(place_E, 1) + 1.0), 0.0)


def figures(targets: Targets, place_E: Int64s, chosen_E: Bools | None = None) -> Figures:
    """The means over the chosen events: hr, ndcg and recall at each cut, and how many events."""
    chosen = np.ones(len(place_E), np.bool_) if chosen_E is None else chosen_E
    found: Figures = {
        "events": int(chosen.sum()),
        "users": len(np.unique(targets.user_E[chosen])),
    }
    for cut in CUTS:
        gain_E = gains(place_E, cut=cut)
        found[f"hr{cut}"] = _mean((gain_E > 0)[chosen])
        found[f"ndcg{cut}"] = _mean(gain_E[chosen])
        found[f"recall{cut}"] = _recall(targets, (gain_E > 0) & chosen, chosen)
    return found


def _recall(targets: Targets, hit_E: Bools, chosen_E: Bools) -> float:
    """Mean over labels of the share of their distinct chosen items that were hit."""
    pair_E = targets.group_E * (int(targets.item_E.max(initial=0)) + 1) + targets.item_E
    _, once = np.unique(np.where(chosen_E, pair_E, -1), return_index=True)
    once = once[chosen_E[once]]
    total_G = np.bincount(targets.group_E[once], minlength=len(targets.known_G))
    hit_G = np.bincount(targets.group_E[once], hit_E[once], minlength=len(targets.known_G))
    return _mean(hit_G[total_G > 0] / total_G[total_G > 0])


def by_history(targets: Targets, place_E: Int64s) -> dict[str, Figures]:
    """Figures by the number of events known at the label."""
    known_E = targets.known_G[targets.group_E]
    return _banded(targets, place_E, known_E, HISTORY_BANDS)


def by_age(targets: Targets, place_E: Int64s) -> dict[str, Figures]:
    """Figures by how many events ago the user last met the item."""
    return _banded(targets, place_E, targets.met_ago_E, AGE_BANDS)


def longer_than_recent(targets: Targets) -> Bools:
    """Events of labels that know more than the recent stream holds [E]."""
    longer: Bools = targets.known_G[targets.group_E] > RECENT
    return longer


def _banded(
    targets: Targets,
    place_E: Int64s,
    value_E: Int64s,
    bands: dict[str, tuple[int, int | None]],
) -> dict[str, Figures]:
    found = {}
    for name, (low, high) in bands.items():
        inside = value_E >= low if high is None else (value_E >= low) & (value_E <= high)
        if inside.any():
            found[name] = figures(targets, place_E, inside)
    return found


def _mean(values: Float64s | Bools) -> float:
    return round(float(np.mean(values)), 6) if len(values) else 0.0


@dataclass(frozen=True, slots=True)
class PerUser:
    """What a bootstrap needs of one result: sums per user, users in ascending order.

    Attributes:
        events: Judged events of each user.
        ndcg10: Sum of their gains.
    """

    events: list[int]
    ndcg10: list[float]

    @classmethod
    def of(cls, targets: Targets, place_E: Int64s) -> "PerUser":
        """Sum up the gains of each user."""
        _, user_E = np.unique(targets.user_E, return_inverse=True)
        sums = np.bincount(user_E, gains(place_E, cut=CUTS[0]))
        return cls(np.bincount(user_E).tolist(), [round(float(one), 4) for one in sums])


@dataclass(frozen=True, slots=True)
class Difference:
    """How much one result's NDCG@10 exceeds another's, with its 95% interval."""

    mean: float
    low: float
    high: float

    @property
    def is_certain(self) -> bool:
        """The interval leaves out zero."""
        return self.low > 0 or self.high < 0


def paired_bootstrap(one: PerUser, other: PerUser, *, seed: int) -> Difference:
    """The difference over the same users, users drawn anew with replacement."""
    assert one.events == other.events, "both results judge the same events of the same users"
    events = np.array(one.events, np.float64)
    difference = np.array(one.ndcg10) - np.array(other.ndcg10)
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(events), (NUM_RESAMPLES, len(events)))
    means = difference[drawn].sum(axis=1) / events[drawn].sum(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return Difference(float(difference.sum() / events.sum()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Judgement:
    """Everything one ranking was worth under one protocol; all plain values."""

    live: Figures
    frozen: Figures | None
    long_history: Figures
    by_history: dict[str, Figures]
    by_age: dict[str, Figures]
    per_user: PerUser


def judge_task(source: BatchSource, task: Task, rank: Ranker, *, name: str) -> Judgement:
    """Rank the judged labels with live and with frozen state, and count."""
    targets = Targets.of(source, task.live)
    place_E = places(targets, rank_all(source, task.live, rank, name=f"{name}, live"))
    frozen = None
    if task.frozen is not None:
        ranked = rank_frozen(source, task.frozen, rank, name=f"{name}, frozen")
        frozen = figures(targets, places(targets, ranked))
    return Judgement(
        live=figures(targets, place_E),
        frozen=frozen,
        long_history=figures(targets, place_E, longer_than_recent(targets)),
        by_history=by_history(targets, place_E),
        by_age=by_age(targets, place_E),
        per_user=PerUser.of(targets, place_E),
    )
