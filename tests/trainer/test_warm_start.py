"""A training that goes on: what stays, what joins, and that it does no harm."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.conftest import DAY_MS, PROVENANCE, small_model, small_training
from tests.trainer.newer import END_MS, NEWER_FROM_MS, newer_log
from trainer.baselines import lists_of
from trainer.dataset import EventLog, label_groups
from trainer.errors import EmptyWindowError, ExportError, VocabularyError, WarmStartError
from trainer.evaluate import held_out_groups, judge, model_ranker
from trainer.export import export, verify
from trainer.loop import Outputs
from trainer.models.gems import Gems
from trainer.models.lifelong import memory_version
from trainer.models.sources import SourceGate
from trainer.package import Package
from trainer.train import TrainConfig, Trained, served, train
from trainer.warm_start import STATE_FILE, WarmState, gate_since, load_state, warm_train

# What going on may cost on the same data: one more short run from other draws.
MARGIN = 0.02


@pytest.fixture(scope="module")
def later() -> EventLog:
    return newer_log()


@pytest.fixture(scope="module")
def warm(exported: Path, later: EventLog) -> Trained:
    """One that went on from the package on what came after its training."""
    return warm_train(later, load_state(exported), small_training(), from_ms=NEWER_FROM_MS)


@pytest.fixture(scope="module")
def warm_package(warm: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("warm") / "2"
    export(warm, folder, PROVENANCE)
    return folder


def _memory_version(model: Gems) -> str:
    assert model.compressor is not None
    return memory_version(model.compressor)


def test_a_package_gives_back_what_was_trained(trained: Trained, exported: Path) -> None:
    state = load_state(exported)
    assert state.config == trained.config
    assert state.split_ms == trained.split_ms
    assert state.vocabulary.item_ids_V.tolist() == trained.vocabulary.item_ids_V.tolist()
    assert state.vocabulary.domain_ids.tolist() == trained.vocabulary.domain_ids.tolist()
    assert state.count_V.tolist() == trained.count_V.tolist()
    assert state.domain_V.tolist() == trained.domain_V.tolist()
    weights, wanted = state.model.state_dict(), trained.model.state_dict()
    assert weights.keys() == wanted.keys()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


def test_ids_vectors_and_memories_of_old_items_stay(trained: Trained, warm: Trained) -> None:
    place = torch.from_numpy(warm.vocabulary.index_items(trained.vocabulary.item_ids_V))
    assert torch.equal(warm.model.trie.codes_I3[place], trained.model.trie.codes_I3[1:])
    assert torch.equal(warm.model.item.weight[place], trained.model.item.weight[1:])
    assert _memory_version(warm.model) == _memory_version(trained.model)
    assert (np.diff(warm.vocabulary.item_ids_V) > 0).all()
    codes = warm.model.trie.codes_I3[1:]
    assert len(torch.unique(codes, dim=0)) == len(codes)


def test_the_model_it_goes_on_from_stays_as_it_is(trained: Trained, later: EventLog) -> None:
    before = {name: value.clone() for name, value in trained.model.state_dict().items()}
    warm = warm_train(later, WarmState.of(trained), small_training(), from_ms=NEWER_FROM_MS)
    after = trained.model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not torch.equal(warm.model.begin_D, trained.model.begin_D)


def test_new_items_are_unknown_before_and_answered_after(
    trained: Trained, warm: Trained, exported: Path, warm_package: Path, later: EventLog
) -> None:
    manifest = verify(warm_package)
    assert manifest["memory_version"] == verify(exported)["memory_version"]
    new_ids = np.setdiff1d(warm.vocabulary.item_ids_V, trained.vocabulary.item_ids_V)
    groups = warm.groups.select(warm.groups.time_ms_G > warm.split_ms).select(slice(64))
    answered = {}
    for name, folder in (("base", exported), ("warm", warm_package)):
        loaded = Package.load(folder)
        ranked = loaded.ranker(loaded.source(later))(groups)[:, :10]
        answered[name] = loaded.item_ids_V[ranked[ranked > 0] - 1]
    assert not np.isin(answered["base"], new_ids).any()
    assert np.isin(answered["warm"], new_ids).mean() > 0.2


def test_the_package_of_a_warm_model_answers_as_the_model_does(
    warm: Trained, later: EventLog, warm_package: Path
) -> None:
    loaded = Package.load(warm_package)
    groups = warm.groups.select(slice(0, 400, 10))
    by_model = lists_of(served(warm).ranker(warm.gate, warm.vocabulary))(groups)
    by_package = loaded.ranker(loaded.source(later), warm.vocabulary)(groups)
    assert (by_model == by_package).mean() > 0.99  # equal scores may swap places


def test_going_on_without_new_data_does_not_get_worse(trained: Trained, log: EventLog) -> None:
    again = warm_train(log, WarmState.of(trained), small_training(epochs=2.0))
    groups = held_out_groups(log, trained.groups, split_ms=trained.split_ms, seed=1)

    def quality(one: Trained) -> float:
        return judge(one.source, groups, model_ranker(one.model, one.source), name="x").ndcg10

    assert again.split_ms == trained.split_ms
    assert quality(again) >= quality(trained) - MARGIN


def test_a_warm_run_can_be_gone_on_from_in_turn(warm: Trained, later: EventLog) -> None:
    third = warm_train(later, WarmState.of(warm), small_training(), from_ms=NEWER_FROM_MS)
    place = torch.from_numpy(third.vocabulary.index_items(warm.vocabulary.item_ids_V))
    assert torch.equal(third.model.trie.codes_I3[place], warm.model.trie.codes_I3[1:])
    assert _memory_version(third.model) == _memory_version(warm.model)


def test_priors_may_end_as_the_counts_of_the_end(trained: Trained, later: EventLog) -> None:
    """The weights are those of the same run without; the priors differ by the two counts."""
    state, half_life_ms = WarmState.of(trained), 10 * DAY_MS
    plain = warm_train(later, state, small_training(), from_ms=NEWER_FROM_MS)
    ended = warm_train(
        later, state, small_training(), from_ms=NEWER_FROM_MS, half_life_ms=half_life_ms
    )
    assert torch.equal(ended.model.outputs[2], plain.model.outputs[2])
    place = int(np.argmax(plain.count_V))
    rows = (later.item_id_N == plain.vocabulary.item_ids_V[place]) & (
        later.event_time_ms_N <= plain.split_ms
    )
    age_ms = plain.split_ms - later.event_time_ms_N[rows]
    assert ended.count_V[place] == pytest.approx((0.5 ** (age_ms / half_life_ms)).sum())
    first, second, third = ended.model.trie.codes_I3[place + 1].tolist()
    leaf = first * 4 + second, third
    moved = ended.model.biases[2].detach()[leaf] - plain.model.biases[2].detach()[leaf]
    wanted = np.log((ended.count_V[place] + 0.5) / (plain.count_V[place] + 0.5))
    assert moved.item() == pytest.approx(wanted, abs=1e-4)


@pytest.fixture
def every_label(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weighed by all labels since, however few: the made-up log has few users."""
    monkeypatch.setattr("trainer.train.CALIBRATION_TIMES_PER_USER", 10_000)
    monkeypatch.setattr("trainer.calibration.MIN_EVENTS", 100)


@pytest.mark.usefixtures("every_label")
@pytest.mark.parametrize(("new_share", "grows"), [(0.5, False), (1.0, True)])
def test_the_model_is_weighed_by_what_its_predecessor_did(
    trained: Trained, new_share: float, *, grows: bool
) -> None:
    """Where all that came since is new, the predecessor named nothing of it; the counts did."""
    later = newer_log(new_share=new_share)
    warm = warm_train(later, WarmState.of(trained), small_training(), from_ms=NEWER_FROM_MS)
    told = served(warm).told(warm.groups.select(slice(-50, None)))

    def of_the_counts(gate: SourceGate) -> float:
        return gate(told.facts_GF, told.speaks_GS)[:, 1:].sum(dim=1).mean().item()

    grown = of_the_counts(warm.gate) / of_the_counts(trained.gate)
    assert (grown > 2) == grows
    # What the sources are worth against one another stays as it was learned.
    assert torch.equal(warm.gate.weight_WF, trained.gate.weight_WF)
    of_sources = (one.gate.bias_W[2] - one.gate.bias_W[1] for one in (warm, trained))
    assert next(of_sources).item() == pytest.approx(next(of_sources).item(), abs=1e-5)


@pytest.mark.usefixtures("every_label")
def test_a_few_events_since_weigh_nothing_anew(trained: Trained, later: EventLog) -> None:
    state, config, groups = WarmState.of(trained), small_training(), label_groups(later)
    since = groups.select(groups.time_ms_G > trained.split_ms)
    num_events = np.cumsum(since.num_rows_G[np.argsort(since.time_ms_G, kind="stable")])
    time_ms = np.sort(since.time_ms_G)
    few_ms, enough_ms = (int(time_ms[np.searchsorted(num_events, many)]) for many in (90, 110))
    assert gate_since(later, state, groups, config, until_ms=few_ms) is state.gate
    assert gate_since(later, state, groups, config, until_ms=enough_ms) is not state.gate


def weights_of(one: Trained) -> dict[str, torch.Tensor]:
    gate = {f"gate.{name}": value for name, value in one.gate.state_dict().items()}
    return one.model.state_dict() | gate


def test_nothing_after_the_window_is_learned_from(trained: Trained, later: EventLog) -> None:
    """The log ends in one run where the window ends; what comes after it changes no weight."""
    until_ms = NEWER_FROM_MS + 50 * DAY_MS
    config, state = small_training(train_quantile=1.0), WarmState.of(trained)
    known = later.event_time_ms_N <= until_ms
    columns = {
        "user_id": later.user_ids_U[later.user_N],
        "item_id": later.item_id_N,
        "event_time_ms": later.event_time_ms_N,
        "ordinal": later.ordinal_N,
        "action": later.action_N,
        "domain": later.domain_N.view(np.uint64),
    }
    cut = EventLog.from_columns({name: column[known] for name, column in columns.items()})
    whole = EventLog.from_columns(columns)
    of_cut, of_whole = (
        weights_of(warm_train(one, state, config, until_ms=until_ms, from_ms=NEWER_FROM_MS))
        for one in (cut, whole)
    )
    assert of_cut.keys() == of_whole.keys()
    for name, wanted in of_cut.items():
        # Targets of a basket may be drawn in another order, and sums be rounded otherwise.
        torch.testing.assert_close(of_whole[name], wanted, atol=1e-3, rtol=1e-3, msg=name)
    assert torch.equal(of_whole["trie.codes_I3"], of_cut["trie.codes_I3"])


def test_an_indexer_is_kept_up(log: EventLog) -> None:
    config = small_training(model=small_model(mid_attention="indexer"))
    base = train(log, config)
    warm = warm_train(log, WarmState.of(base), config)
    name = "blocks.0.mid.indexer.query.weight"
    assert not torch.equal(warm.model.state_dict()[name], base.model.state_dict()[name])


def test_a_killed_warm_run_goes_on(trained: Trained, later: EventLog, tmp_path: Path) -> None:
    state = WarmState.of(trained)
    outputs = Outputs(checkpoints=tmp_path, checkpoint_every_steps=1, resume=True)
    whole = warm_train(later, state, small_training(), outputs, from_ms=NEWER_FROM_MS)
    resumed = warm_train(later, state, small_training(), outputs, from_ms=NEWER_FROM_MS)
    weights, wanted = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(weights[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("damage", ["absent", "other bytes", "cut short", "unnamed"])
def test_a_package_without_its_state_is_refused(
    exported: Path, tmp_path: Path, damage: str
) -> None:
    shutil.copytree(exported, tmp_path / "p")
    path, manifest = tmp_path / "p" / STATE_FILE, tmp_path / "p" / "manifest.json"
    content = path.read_bytes()
    if damage == "absent":
        path.unlink()
    elif damage == "other bytes":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif damage == "cut short":
        path.write_bytes(content[:100])
    else:
        text = manifest.read_text(encoding="utf-8").replace("training_files", "other_files")
        manifest.write_text(text, encoding="utf-8")
    with pytest.raises(ExportError, match=r"training\.safetensors"):
        load_state(tmp_path / "p")


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (small_training(code_sizes=(4, 4, 8)), "code_sizes"),
        (small_training(model=small_model(num_recent=16)), "num_recent"),
    ],
)
def test_other_sizes_are_refused(
    trained: Trained, log: EventLog, config: TrainConfig, named: str
) -> None:
    with pytest.raises(WarmStartError, match=named):
        warm_train(log, WarmState.of(trained), config)


def test_the_first_log_decided_about_the_dense_head(trained_dense: Trained, log: EventLog) -> None:
    """A training that leaves it open goes on with what is there; one that does not is refused."""
    state = WarmState.of(trained_dense)
    warm = warm_train(log, state, small_training())
    assert warm.config.model.dense == warm.model.config.dense == "on"
    with pytest.raises(WarmStartError, match="dense on, this training wants off"):
        warm_train(log, state, small_training(model=small_model(dense="off")))


def test_an_empty_window_and_a_full_tree_are_refused(trained: Trained, later: EventLog) -> None:
    state = WarmState.of(trained)
    with pytest.raises(EmptyWindowError, match="nothing to learn from"):
        warm_train(later, state, small_training(), from_ms=END_MS)
    crowded = replace(later, item_id_N=later.item_id_N + later.ordinal_N * 100_000)
    with pytest.raises(VocabularyError, match="train from the start"):
        warm_train(crowded, state, small_training())
