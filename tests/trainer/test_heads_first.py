"""Goal: the copy head learns what counting misses, alone, and touches nothing else.

What the dense head learns first is in test_dense.py.

Method: users whose habits last a dozen days each, so that the newest item comes again, whatever was
counted more often before.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.trainer.conftest import DAY_MS, small_model, small_training
from trainer.batches import LabelExamples
from trainer.dataset import EventLog, LabelGroups, label_groups
from trainer.heads_first import CopyLearner, has_repeats, learn_heads
from trainer.train import TrainConfig, gems_source, new_model
from trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from trainer.models.gems import Gems

NUM_USERS, NUM_ITEMS, HABIT_DAYS, NUM_HABITS = 20, 40, 12, 5


def habits() -> EventLog:
    """One event a day: an item for twelve days, then another, never one of before."""
    rng = np.random.default_rng(5)
    chosen = [rng.choice(NUM_ITEMS, NUM_HABITS, replace=False) for _ in range(NUM_USERS)]
    per_user = HABIT_DAYS * NUM_HABITS
    day = np.tile(np.arange(per_user), NUM_USERS)
    return EventLog.from_columns(
        {
            "user_id": np.repeat(np.arange(NUM_USERS), per_user),
            "item_id": np.concatenate([np.repeat(items, HABIT_DAYS) for items in chosen]) + 1,
            "event_time_ms": day * DAY_MS,
            "ordinal": day,
            "action": np.full(len(day), 5, np.uint8),
            "domain": np.zeros(len(day), np.uint64),
        }
    )


@pytest.fixture
def config() -> TrainConfig:
    return small_training(label_share=1.0)


def fresh(log: EventLog, config: TrainConfig) -> Gems:
    torch.manual_seed(1)
    end_ms = int(log.event_time_ms_N.max())
    return new_model(log, Vocabulary.of(log, split_ms=end_ms), config, tables_ms=end_ms)


def taught(
    model: Gems, log: EventLog, config: TrainConfig, labels: LabelGroups
) -> dict[str, torch.Tensor]:
    """Teach the head; return the weights of before."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    vocabulary = Vocabulary.of(log, split_ms=int(log.event_time_ms_N.max()))
    source = gems_source(log, vocabulary, config.model)
    learn_heads(model, LabelExamples(source, labels, config.num_targets), config.loop)
    return before


def test_it_learns_what_counting_misses_from_other_users(config: TrainConfig) -> None:
    log = habits()
    model, groups = fresh(log, config), label_groups(log)
    old_enough = groups.select(groups.time_ms_G > HABIT_DAYS * DAY_MS)
    others, held_out = (old_enough.select(old_enough.user_G % 5 != 0), old_enough.user_G % 5 == 0)
    vocabulary = Vocabulary.of(log, split_ms=int(log.event_time_ms_N.max()))
    source = gems_source(log, vocabulary, config.model)
    asked = LabelExamples(source, old_enough.select(held_out), config.num_targets)
    batch = asked.batch(np.arange(held_out.sum()), np.random.default_rng(0))
    with torch.no_grad():
        counted = float(CopyLearner(model).loss(batch))
    taught(model, log, config, others)
    with torch.no_grad():
        learned = float(CopyLearner(model).loss(batch))
    assert learned < 0.8 * counted


def test_only_the_head_changes(config: TrainConfig) -> None:
    log = habits()
    model = fresh(log, config)
    before = taught(model, log, config, label_groups(log).select(slice(30, 60)))
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert "copy.score.weight" in changed
    assert all(name.startswith("copy.") for name in changed)
    assert not any(parameter.isnan().any() for parameter in model.parameters())


def test_where_nobody_repeats_nothing_is_learned(config: TrainConfig) -> None:
    log = habits()
    once = dataclasses.replace(log, item_id_N=np.arange(log.num_events))
    assert has_repeats(log)
    assert not has_repeats(once)
    # One repeat in a thousand events may be a mistake.
    item_id_N = np.arange(log.num_events)
    item_id_N[1] = item_id_N[0]
    assert not has_repeats(dataclasses.replace(log, item_id_N=item_id_N))
    item_id_N[2] = item_id_N[0]
    assert has_repeats(dataclasses.replace(log, item_id_N=item_id_N))
    # The same item of two users is no repeat.
    shared = dataclasses.replace(log, item_id_N=np.arange(log.num_events) % 60)
    assert not has_repeats(shared)
    config = dataclasses.replace(config, code_sizes=(16, 16, 16), model=small_model(dense="off"))
    model = fresh(once, config)
    before = taught(model, once, config, label_groups(once))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_labels_that_repeat_nothing_teach_nothing_and_do_no_harm(config: TrainConfig) -> None:
    log = habits()
    groups = label_groups(log)
    day = groups.time_ms_G // DAY_MS
    first_of_habit = groups.select((day > 0) & (day % HABIT_DAYS == 0))
    model = fresh(log, config)
    taught(model, log, config, first_of_habit)
    assert all(parameter.isfinite().all() for parameter in model.parameters())
