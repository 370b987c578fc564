"""What a package has to pass before it may be published.

A gate looks at one thing and says what it found, what it allows, and, where that is too much, why
the package is refused. None of them touches what is live. Parity with Triton, known tensors and
coverage of memories are looked at by publishing itself.

Legend: G labels, E events of the labels, K places of a list.
"""

import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batches import BatchSource
from trainer.dataset import Int64s, LabelGroups
from trainer.errors import (
    BadNumbersError,
    GateError,
    IllegalItemError,
    OtherFeaturesError,
    TooSlowError,
    WorseThanRivalError,
    WorseThanServedError,
)
from trainer.evaluate import TOP_K, Ranker, event_gains
from trainer.golden import golden_inputs
from trainer.package import Package
from trainer.streaming_evaluation import Float64s, PerUser, paired_bootstrap, rank_all

POPULARITY, OWN_FREQUENCY = "popularity", "own_frequency"
# Rankings without a model that a model has to beat.
RIVALS = (POPULARITY, OWN_FREQUENCY)
# Users that the exported graph is timed with, in one thread.
TIMED_BATCHES = (1, 16)
# Calls whose median is compared with the limit, after some that warm up.
NUM_TIMED_CALLS = 9
NUM_WARM_UP_CALLS = 3
# Of the items, every so many-th is unavailable while legality is looked at.
UNAVAILABLE_EVERY = 3
# Seed of the users drawn anew for the interval.
_SEED = 5


@dataclass(frozen=True, slots=True)
class Passage:
    """What a gate found; `refusal` is None where the package may pass."""

    name: str
    value: float | str
    limit: float | str
    refusal: GateError | None = None


@dataclass(frozen=True, slots=True)
class Quality:
    """What a ranking was worth on the held-out window.

    Attributes:
        per_user: Sums by user, for intervals.
    """

    hr10: float
    ndcg10: float
    per_user: PerUser


@dataclass(frozen=True, slots=True)
class Rival:
    """The served version on the same labels; `says` is why there is no quality."""

    version: int
    quality: Quality | None
    says: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """A package, and everything that its gates look at.

    Attributes:
        losses: Of the steps of its training.
        live_schema: Feature schema hash of the live generation.
        withdrawn: Items that must not be answered at this moment.
        quality: Of the package ("model") and of its rivals, on the same labels.
        served: None where nothing is served yet.
    """

    package: Package
    losses: Sequence[float]
    live_schema: str
    withdrawn: Collection[int]
    quality: Mapping[str, Quality]
    served: Rival | None


def judge_ranking(source: BatchSource, groups: LabelGroups, rank: Ranker, *, name: str) -> Quality:
    """Rank every label from what was known before it, and count.

    Rankings of sources with other vocabularies can be compared: both judge the same events, and an
    item that a model cannot name is a miss.
    """
    ranked_GK = rank_all(source, groups, rank, name=name)[:, :TOP_K]
    gain_E = event_gains(source, groups, ranked_GK)
    return Quality(
        hr10=round(float((gain_E > 0).mean()), 6),
        ndcg10=round(float(gain_E.mean()), 6),
        per_user=_per_user(groups, gain_E),
    )


def _per_user(groups: LabelGroups, gain_E: Float64s) -> PerUser:
    user_E = np.repeat(groups.user_G, groups.num_rows_G)
    _, place_E = np.unique(user_E, return_inverse=True)
    sums = np.bincount(place_E, gain_E)
    return PerUser(np.bincount(place_E).tolist(), sums.tolist())


def passages(judged: Judged, *, quality_margin: float, latency_ms: float) -> Iterator[Passage]:
    """Yield what each gate found, cheap ones first; the last one may have refused.

    Args:
        judged: The package and its surroundings.
        quality_margin: NDCG@10 by which it may be worse than the served version.
        latency_ms: What a call of the graph may take, see `TIMED_BATCHES`.
    """
    gates: tuple[Callable[[], list[Passage]], ...] = (
        lambda: [features_gate(judged)],
        lambda: [finite_gate(judged)],
        lambda: [legal_gate(judged)],
        lambda: latency_gates(judged, latency_ms),
        lambda: [rival_gate(judged, rival) for rival in RIVALS],
        lambda: [served_gate(judged, judged.served, quality_margin)] if judged.served else [],
    )
    for gate in gates:
        for passage in gate():
            yield passage
            if passage.refusal is not None:
                return


def features_gate(judged: Judged) -> Passage:
    """Compare the features that the package reads with those that the live generation holds."""
    wanted = str(judged.package.manifest["feature_schema_hash"])
    refusal = None
    if wanted != judged.live_schema:
        refusal = OtherFeaturesError(
            f"the package was trained on features {wanted}, the live generation has "
            f"{judged.live_schema}: set MOVELINE_GENERATION to the live one (`moveline "
            "generations`) and train again with `moveline trainer once`."
        )
    return Passage("feature_schema", wanted, judged.live_schema, refusal)


def finite_gate(judged: Judged) -> Passage:
    """Count what is infinite or not a number among weights, losses and scores."""
    graph = judged.package.portable
    num_weights = sum(int((~torch.isfinite(one)).sum()) for one in graph.parameters())
    # Tables may hold an infinity on purpose, as what masks a score.
    num_weights += sum(int(torch.isnan(one).sum()) for one in graph.buffers())
    num_losses = int((~np.isfinite(np.array(judged.losses, np.float64))).sum())
    answer = _answer(judged, batch=TIMED_BATCHES[0])
    num_scores = int((~torch.isfinite(answer["score"][answer["item_id"] >= 0])).sum())
    found = num_weights + num_losses + num_scores
    refusal = None
    if found:
        refusal = BadNumbersError(
            f"{num_weights} weights, {num_losses} losses and {num_scores} scores are infinite or "
            "not a number, at most 0: look at the run's loss in TensorBoard, then train anew with "
            "`moveline trainer once --full`."
        )
    return Passage("not_finite", float(found), 0.0, refusal)


def legal_gate(judged: Judged) -> Passage:
    """Ask while a third of the items is unavailable; say which share of the answers was illegal."""
    item_ids_V = judged.package.item_ids_V
    available_V = np.arange(len(item_ids_V)) % UNAVAILABLE_EVERY > 0
    available_V &= ~np.isin(item_ids_V, list(judged.withdrawn))
    excluded = item_ids_V[available_V][:TOP_K]
    answered = _answer(judged, batch=TIMED_BATCHES[-1], available_V=available_V, excluded=excluded)[
        "item_id"
    ].numpy()
    # What only live sources name is new: no package knows it, and it may be given.
    counted = _inputs(judged, TIMED_BATCHES[-1])["counted_item"].numpy()
    new = np.setdiff1d(counted, item_ids_V)
    allowed = np.union1d(np.setdiff1d(item_ids_V[available_V], excluded), new)
    given = answered[answered >= 0]
    num_illegal = int((~np.isin(given, allowed)).sum())
    num_illegal += sum(len(row) - len(np.unique(row)) for row in _given_rows(answered))
    share = num_illegal / max(1, given.size)
    refusal = None
    if num_illegal:
        refusal = IllegalItemError(
            f"{share:.2%} of the items answered are unknown, unavailable, excluded or named twice, "
            "at most 0%: this is a fault of the exported graph; keep what is live and train anew "
            "with `moveline trainer once --full`."
        )
    return Passage("illegal_share", share, 0.0, refusal)


def latency_gates(judged: Judged, latency_ms: float) -> list[Passage]:
    """Time the exported graph in one thread, with few and with many users."""
    found = []
    for batch in TIMED_BATCHES:
        inputs = list(_inputs(judged, batch).values())
        median_ms = _median_ms(judged.package.graph, inputs)
        refusal = None
        if median_ms > latency_ms:
            refusal = TooSlowError(
                f"the graph takes {median_ms:.1f} ms for {batch} users in one thread, at most "
                f"{latency_ms:g} ms (training.latency_ms): raise the limit, or train a smaller "
                "model; `moveline trainer show` has the figures of this run."
            )
        found.append(Passage(f"latency_ms_{batch}", round(median_ms, 3), latency_ms, refusal))
    return found


def rival_gate(judged: Judged, rival: str) -> Passage:
    """Compare NDCG@10 with that of a ranking without a model."""
    own, other = judged.quality["model"].ndcg10, judged.quality[rival].ndcg10
    refusal = None
    # Nobody meets an item again: there is nothing to beat.
    is_moot = rival == OWN_FREQUENCY and other == 0.0
    if not (own > other or is_moot):
        refusal = WorseThanRivalError(
            f"NDCG@10 is {own:.4f} on the held-out window, {rival} has {other:.4f}: give it more "
            "events or time (training.window_days, training.budget_s) and train again with "
            "`moveline trainer once`."
        )
    return Passage(f"ndcg10_over_{rival}", own, other, refusal)


def served_gate(judged: Judged, rival: Rival, quality_margin: float) -> Passage:
    """Ask whether the package is certainly not worse than the served version by the margin.

    Users are drawn anew; the lower end of the 95% interval of the difference is compared.
    """
    name = "ndcg10_low_against_served"
    if rival.quality is None:
        return Passage(name, rival.says, -quality_margin)
    difference = paired_bootstrap(
        judged.quality["model"].per_user, rival.quality.per_user, seed=_SEED
    )
    refusal = None
    if not difference.low >= -quality_margin:
        refusal = WorseThanServedError(
            f"NDCG@10 on the held-out window is {difference.mean:+.4f} against version "
            f"{rival.version}, {difference.low:+.4f} at the lower end of its 95% interval, and may "
            f"be {-quality_margin:+.4f} at least (training.quality_margin): version "
            f"{rival.version} stays live. Look at the run with `moveline trainer show`."
        )
    return Passage(name, round(difference.low, 6), -quality_margin, refusal)


def _answer(
    judged: Judged,
    *,
    batch: int,
    available_V: np.ndarray[tuple[int], np.dtype[np.bool_]] | None = None,
    excluded: Int64s | None = None,
) -> dict[str, Tensor]:
    inputs = _inputs(judged, batch)
    if available_V is not None:
        inputs["available"] = torch.from_numpy(available_V)
    if excluded is not None:
        inputs["exclude_item"][:, : len(excluded)] = torch.from_numpy(excluded)
    with torch.inference_mode():
        answered = judged.package.graph(*inputs.values())
    names = [spec["name"] for spec in judged.package.manifest["outputs"]]
    return dict(zip(names, answered, strict=True))


def _inputs(judged: Judged, batch: int) -> dict[str, Tensor]:
    """The golden requests, as often as needed for so many users."""
    manifest: dict[str, Any] = judged.package.manifest
    batched = {spec["name"]: spec["batched"] for spec in manifest["inputs"]}
    golden = golden_inputs(manifest, judged.package.item_ids_V)
    return {
        name: torch.from_numpy(np.resize(array, (batch, *array.shape[1:])))
        if batched[name]
        else torch.from_numpy(array)
        for name, array in golden.items()
    }


def _median_ms(graph: Callable[..., object], inputs: list[Tensor]) -> float:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken = []
    try:
        with torch.inference_mode():
            for _ in range(NUM_WARM_UP_CALLS + NUM_TIMED_CALLS):
                started = time.perf_counter()
                graph(*inputs)
                taken.append((time.perf_counter() - started) * 1000)
    finally:
        torch.set_num_threads(num_threads)
    return statistics.median(taken[NUM_WARM_UP_CALLS:])


def _given_rows(answered_GK: Int64s) -> list[Int64s]:
    return [row[row >= 0] for row in answered_GK]
