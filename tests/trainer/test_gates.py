"""Goal: a good package passes every gate, and each gate refuses what is its own to refuse."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.trainer.conftest import PROVENANCE
from trainer.baselines import own_frequency, popularity
from trainer.errors import (
    BadNumbersError,
    GateError,
    IllegalItemError,
    OtherFeaturesError,
    TooSlowError,
    WorseThanRivalError,
    WorseThanServedError,
)
from trainer.evaluate import held_out_groups, judge
from trainer.gates import (
    OWN_FREQUENCY,
    POPULARITY,
    TIMED_BATCHES,
    Judged,
    Passage,
    Quality,
    Rival,
    judge_ranking,
    passages,
)
from trainer.package import Package
from trainer.streaming_evaluation import PerUser
from trainer.train import Trained

SCHEMA = PROVENANCE.feature_schema_hash
NUM_USERS = 50


def quality(ndcg10: float, *, spread: float = 0.0) -> Quality:
    """Users with an event each, whose worth lies around a mean."""
    rng = np.random.default_rng(1)
    worth = ndcg10 + spread * rng.normal(size=NUM_USERS)
    return Quality(0.5, ndcg10, PerUser([1] * NUM_USERS, worth.tolist()))


@pytest.fixture(scope="module")
def package(exported: Path) -> Package:
    """Loaded once: it takes seconds."""
    return Package.load(exported)


@pytest.fixture
def good(package: Package) -> Judged:
    """A package that nothing speaks against."""
    return Judged(
        package=package,
        losses=[3.0, 2.0],
        live_schema=SCHEMA,
        withdrawn=(),
        quality={
            "model": quality(0.3),
            POPULARITY: quality(0.1),
            OWN_FREQUENCY: quality(0.2),
        },
        served=Rival(4, quality(0.3)),
    )


def pass_through(judged: Judged, **limits: float) -> list[Passage]:
    return list(passages(judged, **{"quality_margin": 0.01, "latency_ms": 1e6, **limits}))


def refusal(judged: Judged, **limits: float) -> GateError:
    """The refusal of the last gate; those before it let the package pass."""
    *before, last = pass_through(judged, **limits)
    assert all(one.refusal is None for one in before)
    assert last.refusal is not None
    assert "moveline " in str(last.refusal)
    return last.refusal


def test_a_good_package_passes_every_gate(good: Judged) -> None:
    found = pass_through(good)
    assert [one.name for one in found] == [
        "feature_schema",
        "not_finite",
        "illegal_share",
        *(f"latency_ms_{batch}" for batch in TIMED_BATCHES),
        "ndcg10_over_popularity",
        "ndcg10_over_own_frequency",
        "ndcg10_low_against_served",
    ]
    assert [one.refusal for one in found] == [None] * len(found)


def test_the_first_version_has_no_served_rival(good: Judged) -> None:
    found = pass_through(replace(good, served=None))
    assert found[-1].name == "ndcg10_over_own_frequency"


def test_a_served_version_that_cannot_be_read_is_said_and_keeps_nobody_away(good: Judged) -> None:
    found = pass_through(replace(good, served=Rival(4, None, "not compared: gone")))
    assert (found[-1].value, found[-1].refusal) == ("not compared: gone", None)


def test_other_features_are_refused(good: Judged) -> None:
    error = refusal(replace(good, live_schema="0" * 16))
    assert isinstance(error, OtherFeaturesError)


def test_a_loss_that_is_not_a_number_is_refused(good: Judged) -> None:
    error = refusal(replace(good, losses=[1.0, float("nan")]))
    assert isinstance(error, BadNumbersError)
    assert "1 losses" in str(error)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_a_number_is_refused(good: Judged, value: float) -> None:
    weight = next(iter(good.package.portable.parameters()))
    before = weight.detach().clone()
    with torch.no_grad():
        weight.view(-1)[0] = value
        assert isinstance(refusal(good), BadNumbersError)
        weight.copy_(before)


class Wrapped(torch.nn.Module):
    """A graph whose inputs or answers are changed on the way."""

    def __init__(self, graph: torch.nn.Module, change: Callable[..., Any]) -> None:
        super().__init__()
        self.graph = graph
        self.change = change

    def forward(self, *inputs: torch.Tensor) -> Any:  # noqa: ANN401 - as the graph's
        return self.change(self.graph, inputs)


def wrapped(good: Judged, change: Callable[..., Any]) -> Judged:
    return replace(good, package=replace(good.package, graph=Wrapped(good.package.graph, change)))


def test_an_answer_with_unavailable_items_is_refused(good: Judged) -> None:
    def blind(graph: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:  # noqa: ANN401
        return graph(*(torch.ones_like(i) if i.dtype == torch.bool else i for i in inputs))

    assert isinstance(refusal(wrapped(good, blind)), IllegalItemError)


def test_an_answer_that_names_an_item_twice_is_refused(good: Judged) -> None:
    def twice(graph: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> Any:  # noqa: ANN401
        items, *rest = graph(*inputs)
        items[:, 1] = items[:, 0]
        return items, *rest

    assert isinstance(refusal(wrapped(good, twice)), IllegalItemError)


def test_a_withdrawn_item_is_made_unavailable(good: Judged) -> None:
    found = pass_through(replace(good, withdrawn=set(good.package.item_ids_V[:-1].tolist())))
    assert [one.value for one in found if one.name == "illegal_share"] == [0.0]


def test_a_slow_graph_is_refused(good: Judged) -> None:
    error = refusal(good, latency_ms=1e-6)
    assert isinstance(error, TooSlowError)
    assert "training.latency_ms" in str(error)


@pytest.mark.parametrize("rival", [POPULARITY, OWN_FREQUENCY])
@pytest.mark.parametrize("ndcg10", [0.3, 0.31])
def test_a_model_that_beats_no_ranking_without_one_is_refused(
    good: Judged, rival: str, ndcg10: float
) -> None:
    error = refusal(replace(good, quality={**good.quality, rival: quality(ndcg10)}))
    assert isinstance(error, WorseThanRivalError)
    assert rival in str(error)


def test_where_nobody_repeats_there_is_nothing_to_beat(good: Judged) -> None:
    worth = {**good.quality, OWN_FREQUENCY: quality(0.0)}
    assert pass_through(replace(good, quality=worth))[-1].refusal is None


@pytest.mark.parametrize(
    ("served", "spread", "passes"),
    [
        (0.2, 0.0, True),
        (0.309, 0.0, True),
        (0.311, 0.0, False),
        # As good on average, but it may be much worse: fifty users cannot tell.
        (0.3, 0.5, False),
        (0.3, 0.01, True),
    ],
)
def test_what_may_be_worse_than_the_served_version_is_refused(
    good: Judged, served: float, spread: float, *, passes: bool
) -> None:
    last = pass_through(replace(good, served=Rival(4, quality(served, spread=spread))))[-1]
    assert (last.refusal is None) is passes
    if not passes:
        assert isinstance(last.refusal, WorseThanServedError)
        assert "version 4 stays live" in str(last.refusal)


def test_rankings_are_judged_as_evaluation_does(trained: Trained, package: Package) -> None:
    source = trained.source
    groups = held_out_groups(source.log, trained.groups, split_ms=trained.split_ms, seed=1)
    rankers = (
        popularity(source),
        own_frequency(source),
        package.ranker(package.source(source.log)),
    )
    for rank in rankers:
        mine = judge_ranking(source, groups, rank, name="x")
        theirs = judge(source, groups, rank, name="x")
        assert (mine.hr10, mine.ndcg10) == pytest.approx((theirs.hr10, theirs.ndcg10), abs=1e-6)
        assert sum(mine.per_user.events) == theirs.num_events
        assert sum(mine.per_user.ndcg10) / theirs.num_events == pytest.approx(theirs.ndcg10)
