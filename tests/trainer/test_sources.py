"""Live sources in the served mixture: rules hold for them, and evaluation is what is served."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from features.sources import NUM_COUNTED, SOURCES
from trainer.baselines import lists_of
from trainer.batches import PADDING
from trainer.calibration import (
    MIN_EVENTS,
    MIN_FACTOR_EVENTS,
    best_factors,
    calibrate,
    fitted_gate,
    ndcg10,
)
from trainer.counted import LiveSources
from trainer.export import MODEL_FILE, example_inputs, serving_of, verify
from trainer.item_vectors import usual_domains
from trainer.models.config import GemsConfig
from trainer.models.serving import GemsServing, input_signature
from trainer.models.sources import (
    FACTS,
    UNTUNED_WEIGHTS,
    SourceGate,
    contributions,
    facts,
    mixed,
)
from trainer.package import raw_sources, raw_streams
from trainer.served import Told
from trainer.train import Trained, served
from trainer.vocabulary import Vocabulary

NAMES = [spec.name for spec in input_signature(GemsConfig(), num_items=1)]
# In no vocabulary of the tests.
NEW = 10**15
Inputs = dict[str, Tensor]


@pytest.fixture(scope="module")
def serving(trained: Trained) -> GemsServing:
    """What is served, its sources weighed alike for all, so that they show in every answer."""
    one = serving_of(trained)
    one.gate = SourceGate.constant([0.4, 0.3, 0.3])
    return one


def inputs_of(serving: GemsServing, *, users: int = 2) -> Inputs:
    """Users with a few events, and sources that name known and new items."""
    inputs = dict(zip(NAMES, example_inputs(serving, batch=users), strict=True))
    ids = serving.item_ids_V
    inputs["recent_item"][:, -3:] = ids[:3]
    named = torch.stack((torch.cat((ids[3:6], torch.tensor([NEW]))), NEW + 1 + torch.arange(4)))
    inputs["counted_item"][:, :, :4] = named
    inputs["counted_share"][:, :, :4] = torch.tensor([0.4, 0.2, 0.1, 0.05])
    return inputs


def answered(serving: GemsServing, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    with torch.no_grad():
        item, score, contribution = serving(*(inputs[name] for name in NAMES))
    return item, score, contribution


def test_a_mixture_adds_up_what_its_parts_say() -> None:
    pad = [PADDING, PADDING]
    found = mixed(
        torch.tensor([[7, 3, 9]]),
        torch.tensor([[0.5, 0.3, 0.2]]),
        torch.tensor([[[3, 8, PADDING], [8, *pad]]]),
        torch.tensor([[[0.6, 0.4, 0.9], [1.0, 0.9, 0.9]]]),
        torch.tensor([[0.5, 0.25, 0.25]]),
    )
    # 8: .25 * .4 + .25 * 1, 3: .5 * .3 + .25 * .6, 7: .5 * .5; a padded place says nothing.
    assert found.item_BK.tolist() == [[8, 3, 7]]
    torch.testing.assert_close(found.share_BK, torch.tensor([[0.35, 0.3, 0.25]]))
    torch.testing.assert_close(found.mass_BW, torch.tensor([[0.4, 0.25, 0.25]]))
    shares = contributions(torch.tensor([[0.5, 0.5, 0.0]]), found.mass_BW)
    torch.testing.assert_close(shares, torch.tensor([[0.2, 0.2, 0.0, 0.25, 0.25]]) / 0.9)


def test_ties_go_to_the_smaller_id_and_nothing_is_nothing() -> None:
    nothing = torch.full((1, 2, 3), PADDING)
    found = mixed(
        torch.tensor([[9, 4, PADDING]]),
        torch.tensor([[0.5, 0.5, 0.0]]),
        nothing,
        torch.zeros(1, 2, 3),
        torch.tensor([[1.0, 0.0, 0.0]]),
    )
    assert found.item_BK.tolist() == [[4, 9, PADDING]]
    none = mixed(nothing[:, 0], torch.zeros(1, 3), nothing, torch.zeros(1, 2, 3), torch.ones(1, 3))
    assert none.item_BK.tolist() == [[PADDING] * 3]
    assert contributions(torch.zeros(1, 3), none.mass_BW).tolist() == [[0.0] * 5]


def test_a_source_that_says_nothing_has_no_weight() -> None:
    gate = SourceGate.constant([0.5, 0.3, 0.2])
    speaks = torch.tensor([[True, True], [True, False], [False, False]])
    weight = gate(torch.zeros(3, len(FACTS)), speaks)
    expected = [[0.5, 0.3, 0.2], [0.625, 0.375, 0.0], [1.0, 0.0, 0.0]]
    torch.testing.assert_close(weight, torch.tensor(expected))


def test_without_sources_the_model_answers_as_ever(serving: GemsServing) -> None:
    inputs = inputs_of(serving)
    silent = {**inputs, "counted_item": torch.full_like(inputs["counted_item"], PADDING)}
    silent["counted_share"] = torch.zeros_like(inputs["counted_share"])
    item, score, contribution = answered(serving, silent)
    assert set(item.flatten().tolist()) <= {*serving.item_ids_V.tolist(), PADDING}
    assert (contribution[:, 3:] == 0).all()
    assert contribution.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])
    assert score[:, 0].exp().max() <= 1.0


def test_sources_bring_new_items_and_are_told_apart(serving: GemsServing) -> None:
    item, score, contribution = answered(serving, inputs_of(serving))
    assert {NEW, NEW + 1, NEW + 4} <= set(item[0].tolist())
    place = item[0].tolist().index(NEW + 1)
    assert score[0, place].exp().item() == pytest.approx(0.3 * 0.4, rel=1e-4)
    assert (contribution > 0).all(dim=1).tolist() == [False, False], "no lifelong memory"
    assert (contribution[:, 3:] > 0).all()
    assert contribution.sum(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_excluded_and_withdrawn_items_come_from_no_source(serving: GemsServing) -> None:
    inputs = inputs_of(serving)
    inputs["exclude_item"][0, :2] = torch.tensor([NEW + 2, int(serving.item_ids_V[3])])
    inputs["available"][4] = False
    item, _, _ = answered(serving, inputs)
    first, second = (set(row.tolist()) for row in item)
    assert not first & {NEW + 2, int(serving.item_ids_V[3])}
    assert {NEW + 2, int(serving.item_ids_V[3])} <= second
    assert int(serving.item_ids_V[4]) not in first | second


def test_only_candidates_are_returned(serving: GemsServing) -> None:
    inputs = inputs_of(serving)
    chosen = torch.tensor([int(serving.item_ids_V[3]), int(serving.item_ids_V[9]), NEW, 77])
    inputs["candidate_item"][0, :4] = chosen
    item, _, _ = answered(serving, inputs)
    assert set(item[0].tolist()) == {*chosen[:3].tolist(), PADDING}, "nobody knows 77"
    assert NEW + 1 in item[1].tolist(), "who names none is not restricted"


def test_only_items_of_a_domain_are_returned(trained: Trained, serving: GemsServing) -> None:
    usual_V = usual_domains(trained.source.log, trained.vocabulary)
    wanted = int(usual_V.max())
    inside = set(trained.vocabulary.item_ids_V[(usual_V == wanted).numpy()].tolist())
    assert 0 < len(inside) < len(usual_V)
    inputs = inputs_of(serving)
    inputs["in_domain"][:, 0] = wanted
    inputs["counted_domain"][1] = torch.tensor([0, wanted])
    item, _, _ = answered(serving, inputs)
    assert set(item[0].tolist()) <= inside | {PADDING}
    assert set(item[1].tolist()) - {PADDING} > {NEW + 1}, "the list is of that domain"
    assert NEW not in item[1].tolist(), "this one is not"
    assert set(item[1].tolist()) <= inside | {PADDING, *range(NEW + 1, NEW + 5)}


def test_a_usual_domain_is_the_most_frequent(trained: Trained) -> None:
    log, vocabulary = trained.source.log, trained.vocabulary
    for item_id, domain in zip(
        vocabulary.item_ids_V, usual_domains(log, vocabulary).tolist(), strict=True
    ):
        domains, counts = np.unique(log.domain_N[log.item_id_N == item_id], return_counts=True)
        assert domain == domains[np.argmax(counts)]


@pytest.mark.parametrize("users", [1, 3])
def test_the_package_is_the_graph_with_all_inputs(
    trained: Trained, exported: Path, users: int
) -> None:
    """Candidates, a domain, exclusions and sources, each of one user."""
    loaded = torch.export.load(exported / MODEL_FILE).module()
    eager = serving_of(trained)
    inputs = inputs_of(eager, users=users)
    inputs["candidate_item"][0, :9] = eager.item_ids_V[:9]
    inputs["in_domain"][-1] = eager.item_domain_V.max()
    inputs["exclude_item"][:, 0] = NEW
    wanted = answered(eager, inputs)
    with torch.no_grad():
        got = loaded(*(inputs[name] for name in NAMES))
    assert torch.equal(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[2], wanted[2], atol=1e-5, rtol=1e-5)
    said = verify(exported)["sources"]
    assert said["names"] == list(SOURCES)
    assert said["half_life_h"] == trained.config.half_life_h
    assert set(said["weights_at_mean"]) == {"model", *SOURCES}


def test_evaluation_is_what_is_served(trained: Trained) -> None:
    """The mixture that is judged against the graph on the same labels, sources included."""
    log = trained.source.log
    groups = trained.groups.select(np.linspace(5, len(trained.groups) - 1, 20).astype(np.int64))
    # Events of this log are days apart: popularity has to look back for some.
    one = replace(served(trained), live=LiveSources.of(log, half_life_h=48))
    gate = SourceGate.constant([0.4, 0.3, 0.3])
    gate.met_factor.fill_(0.1)
    told = one.told(groups)
    assert (told.met_GSK & (told.counted_share_GSK > 0)).any(), "counted, and met"
    assert (~told.met_GSK & (told.counted_share_GSK > 0)).any(), "counted, and not met"
    catalogue = Vocabulary.of(log, split_ms=int(log.event_time_ms_N.max()))
    judged = lists_of(one.ranker(gate, catalogue))(groups)
    serving = GemsServing(trained.model, trained.vocabulary, gate=gate).eval()
    inputs = dict(zip(NAMES, example_inputs(serving, batch=len(groups)), strict=True))
    inputs |= raw_streams(trained.source, groups) | raw_sources(one.live, groups)
    older = trained.source.older(groups)
    if trained.model.compressor is not None and older is not None:
        with torch.no_grad():
            inputs["lifelong"], inputs["lifelong_count"] = trained.model.compressor.fold(older)
    item, _, contribution = answered(serving, inputs)
    assert np.array_equal(catalogue.index_items(item.numpy())[:, :10], judged[:, :10])
    assert (contribution[:, 3:] > 0).any(dim=0).all(), "both sources spoke"


def told_events(seed: int, num_events: int) -> tuple[Tensor, Tensor, Tensor]:
    """Events of which the model names those of long histories, popularity the others."""
    generator = torch.Generator().manual_seed(seed)
    long = torch.rand(num_events, generator=generator) < 0.5
    known = facts(
        torch.where(long, 100, 1),
        torch.rand(num_events, generator=generator),
        torch.rand(num_events, generator=generator),
        torch.rand(num_events, 2, 5, generator=generator) / 5,
    )
    share = torch.rand(num_events, 3, generator=generator) * 0.01
    share[:, 0] += 0.3 * long
    share[:, 1] += 0.3 * ~long
    return known, torch.ones(num_events, 2, dtype=torch.bool), share


def test_a_gate_learns_who_is_right_when() -> None:
    known, speaks, share = told_events(1, 2_000)
    gate = fitted_gate(known, speaks, share)
    fresh, _, _ = told_events(2, 200)
    weight = gate(fresh, speaks[:200]).detach()
    long = fresh[:, 0] > np.log(50)
    assert weight[long, 0].mean() > 0.9
    assert weight[~long, 1].mean() > 0.9
    again = fitted_gate(known, speaks, share)
    for name, value in gate.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_few_events_leave_the_weights_constant() -> None:
    known, speaks, share = told_events(1, MIN_EVENTS - 1)
    assert (fitted_gate(known, speaks, share).weight_WF == 0).all()
    known, speaks, share = told_events(1, MIN_EVENTS)
    assert (fitted_gate(known, speaks, share).weight_WF != 0).any()
    assert (fitted_gate(known, speaks, share, by_facts=False).weight_WF == 0).all()
    none = fitted_gate(known[:0], speaks[:0], share[:0]).bias_W.softmax(dim=0)
    assert none.tolist() == pytest.approx(list(UNTUNED_WEIGHTS), abs=1e-3)


@pytest.mark.parametrize(("num_events", "chosen"), [(MIN_FACTOR_EVENTS - 1, False), (200, True)])
def test_two_factors_need_fewer_events(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, num_events: int, *, chosen: bool
) -> None:
    """Fewer than the linear map; of 200 events here some part names more than half."""
    factored = SourceGate.untuned()
    monkeypatch.setattr("trainer.calibration.best_factors", lambda *_: factored)
    count = np.searchsorted(trained.groups.num_rows_G.cumsum(), num_events, side="right")
    gate = calibrate(served(trained), trained.groups.select(slice(int(count))))
    assert (gate is factored) == chosen
    assert (gate.weight_WF == 0).all()


@pytest.mark.parametrize(("is_popular", "kept"), [(False, False), (True, True)])
def test_sources_that_rank_worse_lose_their_odds(*, is_popular: bool, kept: bool) -> None:
    """The model's first item or popularity's is what came; likelihood weighed both alike."""
    num_labels = 50
    model_item = torch.arange(10).repeat(num_labels, 1)
    counted_item = torch.full((num_labels, 2, 10), PADDING)
    counted_item[:, 0] = 100 + torch.arange(10)
    counted_share = torch.zeros(num_labels, 2, 10)
    counted_share[:, 0] = 0.1
    told = Told(
        model_item,
        torch.linspace(0.07, 0.01, 10).repeat(num_labels, 1),
        counted_item,
        counted_share,
        torch.zeros_like(counted_item, dtype=torch.bool),
        torch.zeros(num_labels, len(FACTS)),
    )
    gate = SourceGate.constant([0.5, 0.4, 0.1])
    came = torch.full((num_labels,), 100 if is_popular else 0)
    best = best_factors(gate, told, torch.arange(num_labels), came)
    assert torch.equal(best.bias_W, gate.bias_W) == kept
    assert (best.bias_W[0] == gate.bias_W[0]).item()
    assert torch.isfinite(best.bias_W).all(), "a new item can still be named"
    assert ndcg10(told, best, torch.arange(num_labels), came) == pytest.approx(1.0)


@pytest.mark.parametrize("comes_back", [False, True])
def test_counts_of_what_was_met_are_lowered_where_nobody_comes_back(*, comes_back: bool) -> None:
    """Popularity names ten items, the model others; the first nine of the ten are met already."""
    num_labels = 50
    counted_item = torch.full((num_labels, 2, 10), PADDING)
    counted_item[:, 0] = 100 + torch.arange(10)
    counted_share = torch.zeros(num_labels, 2, 10)
    counted_share[:, 0] = torch.linspace(0.1, 0.01, 10)
    told = Told(
        torch.arange(10).repeat(num_labels, 1),
        torch.full((num_labels, 10), 1e-4),
        counted_item,
        counted_share,
        (counted_item > PADDING) & (counted_item < 109),
        torch.zeros(num_labels, len(FACTS)),
    )
    gate = SourceGate.constant([0.1, 0.8, 0.1])
    came = torch.full((num_labels,), 100 if comes_back else 109)
    best = best_factors(gate, told, torch.arange(num_labels), came)
    assert (best.met_factor.item() == 1.0) == comes_back
    assert ndcg10(told, best, torch.arange(num_labels), came) == pytest.approx(1.0)
    assert (told.mixed_by(best).item_BK[0] == 100).any(), "what was met can still be named"


def test_training_weighs_the_sources(trained: Trained) -> None:
    weight = trained.gate.bias_W.softmax(dim=0).tolist()
    assert weight != pytest.approx(list(UNTUNED_WEIGHTS), abs=1e-6)
    newest_ms = trained.source.log.event_time_ms_N
    known = set(trained.vocabulary.item_ids_V.tolist())
    assert known <= set(trained.source.log.item_id_N[newest_ms <= trained.split_ms].tolist())


def test_the_lists_are_as_long_as_the_models() -> None:
    by_name = {spec.name: spec.shape for spec in input_signature(GemsConfig(), num_items=1)}
    assert by_name["counted_item"] == (len(SOURCES), NUM_COUNTED)
