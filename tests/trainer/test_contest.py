"""Every rival is trained and asked in one way, and its lists are lists of the catalogue."""

import numpy as np
import pytest

from trainer.baselines import seen_items
from trainer.contest import Budget, Contest
from trainer.dataset import EventLog
from trainer.models.config import GemsConfig
from trainer.protocols import Sample, Task, global_split, leave_one_out
from trainer.rivals import DEFAULT_RIVALS, RIVALS, SINGLE_STREAM
from trainer.streaming_evaluation import LIST_LENGTH, judge_task

BUDGET = Budget(seconds=60.0, epochs=1.0, examples_per_batch=16, judge_every_steps=4, num_threads=1)
SMALL = Sample(test_users=4, test_times_per_user=3, tune_users=4, tune_times_per_user=2)
# One of each way to be trained.
NEURAL = ("gru4rec", "sasrec_long", "hstu", "tiger", "gems", "gems_recent_only")
ALL_PARTS = ["gems_no_sources", "recent_popularity", "co_occurrence"]
COUNTED = ("co_occurrence", "own_frequency", "counts_blend")


def contest_of(task: Task, *, repeats: bool = True) -> Contest:
    return Contest.of(task, repeats=repeats, half_life_ms=10**9, budget=BUDGET, seed=1)


@pytest.fixture(scope="module")
def task(log: EventLog) -> Task:
    return global_split(log, SMALL)


@pytest.mark.parametrize("name", [*NEURAL, *COUNTED])
def test_a_rival_is_trained_and_judged(name: str, task: Task) -> None:
    contest = contest_of(task)
    entry = contest.enter(name)
    ranked = entry.rank(task.live)
    assert ranked.shape == (len(task.live), LIST_LENGTH)
    assert ranked.max() <= contest.catalogue.num_items
    for row in ranked:
        named = row[row > 0]
        assert len(set(named.tolist())) == len(named), "no item twice"
    judged = judge_task(contest.source, task, entry.rank, name=name)
    assert 0.0 <= judged.live["ndcg10"] <= judged.live["hr10"] <= 1.0
    assert judged.frozen is not None
    if name in NEURAL:
        assert entry.fitted is not None
        assert entry.fitted.losses
        assert np.isfinite(entry.fitted.losses).all()


@pytest.mark.parametrize("name", ["hstu", "gems", "popularity"])
def test_nothing_met_is_named_where_nothing_repeats(name: str, log: EventLog) -> None:
    task = leave_one_out(log, SMALL)
    contest = contest_of(task, repeats=False)
    ranked = contest.enter(name).rank(task.live)
    for number, row in enumerate(ranked):
        assert not set(row[row > 0]) & set(seen_items(contest.source, task.live, number))


def test_an_item_of_the_test_window_has_no_weights(task: Task) -> None:
    contest = contest_of(task)
    fitted = set(task.fitted.item_id_N.tolist())
    assert set(contest.vocabulary.item_ids_V.tolist()) == fitted
    assert set(contest.catalogue.item_ids_V.tolist()) == set(task.log.item_id_N.tolist())


def test_the_table_of_rivals_is_whole() -> None:
    assert {*DEFAULT_RIVALS, *SINGLE_STREAM} <= set(RIVALS)
    fields = set(GemsConfig.__dataclass_fields__)
    for name, rival in RIVALS.items():
        assert set(rival.changes) <= fields, name
        assert rival.note
    trained = [name for name in DEFAULT_RIVALS if RIVALS[name].kind != "free"]
    assert len(trained) >= 5
    assert {"gems", "sasrec", "hstu"} <= set(trained)


def test_what_is_served_trains_its_model_once_and_says_its_weights(task: Task) -> None:
    contest = contest_of(task)
    alone = contest.enter("gems_no_sources")
    entries = [contest.enter(name) for name in ("gems", "gems_constant_weights")]
    for entry in entries:
        assert entry.model is alone.model
        assert entry.fitted is alone.fitted
        assert entry.weights is not None
        assert list(entry.weights) == ALL_PARTS
        assert sum(entry.weights.values()) == pytest.approx(1.0, abs=1e-3)
    assert alone.weights is None
