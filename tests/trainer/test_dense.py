"""Goal: the dense head learns which unmet item comes next, and is there where nobody repeats.

Method: a log in which people walk along a chain of items, one after the other and never back, so
that the newest item says which comes next; the query against a slow loop, and against changed
futures.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

from tests.trainer.conftest import DAY_MS, small_training
from trainer.batches import LabelExamples, Stream
from trainer.dataset import EventLog, label_groups
from trainer.heads_first import DenseLearner, learn_heads
from trainer.models.config import DENSE_ITEMS_MAX, GemsConfig
from trainer.models.dense import FADING, INITIAL_GAIN, NUM_NEWEST, DenseHead
from trainer.train import TrainConfig, Trained, gems_source, new_model, train
from trainer.training_state import read_state, save_state
from trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.models.gems import Gems

NUM_USERS, NUM_ITEMS, NUM_STEPS = 30, 60, 20


@pytest.fixture(scope="module")
def walks() -> EventLog:
    """One item a day, from a place in the chain on; nobody meets an item twice."""
    rng = np.random.default_rng(7)
    first = rng.integers(0, NUM_ITEMS, NUM_USERS)
    day = np.tile(np.arange(NUM_STEPS), NUM_USERS)
    return EventLog.from_columns(
        {
            "user_id": np.repeat(np.arange(NUM_USERS), NUM_STEPS),
            "item_id": (np.repeat(first, NUM_STEPS) + day) % NUM_ITEMS + 1,
            "event_time_ms": day * DAY_MS,
            "ordinal": day,
            "action": np.full(len(day), 5, np.uint8),
            "domain": np.zeros(len(day), np.uint64),
        }
    )


@pytest.fixture(scope="module")
def config() -> TrainConfig:
    return small_training(epochs=2.0)


@pytest.fixture(scope="module")
def dense(walks: EventLog, config: TrainConfig) -> Trained:
    return train(walks, config)


def fresh(log: EventLog, config: TrainConfig) -> Gems:
    torch.manual_seed(1)
    end_ms = int(log.event_time_ms_N.max())
    return new_model(log, Vocabulary.of(log, split_ms=end_ms), config, tables_ms=end_ms)


@pytest.mark.parametrize(
    ("changes", "repeats", "num_items", "wanted"),
    [
        ({}, False, DENSE_ITEMS_MAX, "on"),
        ({}, True, 10, "off"),
        ({}, False, DENSE_ITEMS_MAX + 1, "off"),
        ({"streams": ("mid", "lifelong")}, False, 10, "off"),
        ({"dense": "on"}, True, 10, "on"),
        ({"dense": "off"}, False, 10, "off"),
    ],
)
def test_the_log_decides_unless_the_configuration_does(
    changes: dict[str, object], num_items: int, wanted: str, *, repeats: bool
) -> None:
    config = GemsConfig(**changes)  # type: ignore[arg-type]
    assert config.settled(repeats=repeats, num_items=num_items).dense == wanted


def test_a_model_says_what_its_log_decided(dense: Trained, trained: Trained) -> None:
    assert dense.config.model == dense.model.config
    assert dense.model.config.dense == "on"
    assert trained.model.config.dense == "off"


def test_a_query_is_the_fading_mean_at_first() -> None:
    torch.manual_seed(3)
    head = DenseHead(6, torch.randn(20, 4), torch.arange(20), dropout=0.0)
    item_BR = torch.randint(1, 21, (2, NUM_NEWEST + 3))
    item_BR[1, :5] = 0
    query_BRE = head.queries(item_BR, torch.randn(2, NUM_NEWEST + 3, 6)).detach()
    weight = np.exp(-FADING * np.arange(NUM_NEWEST))
    weight /= weight.sum()
    for user, items in enumerate(item_BR.tolist()):
        for place in range(len(items)):
            wanted_E = torch.zeros(4)
            for age, item in enumerate(items[: place + 1][::-1][:NUM_NEWEST]):
                if item > 0:
                    wanted_E += float(weight[age]) * head.items.vector.weight[item].detach()
            torch.testing.assert_close(query_BRE[user, place], INITIAL_GAIN * wanted_E)


def test_no_event_sees_what_came_after_it(dense: Trained) -> None:
    groups = dense.groups.select(slice(-6, None))
    recent, _ = dense.source.streams(groups)
    changed = recent.item.clone()
    changed[:, -1] = 1 + changed[:, -1] % dense.vocabulary.num_items

    def queries(stream: Stream) -> torch.Tensor:
        x_BRD = dense.model._recent(stream).tokens_BND
        return dense.model.dense.queries(stream.item, x_BRD).detach()

    before, after = queries(recent), queries(recent._replace(item=changed))
    torch.testing.assert_close(after[:, :-1], before[:, :-1])
    assert not torch.allclose(after[:, -1], before[:, -1])


def test_it_learns_the_chain_before_the_rest_does(walks: EventLog, config: TrainConfig) -> None:
    """From some users' walks it knows the next step of others; nothing but it has learned."""
    model, groups = fresh(walks, config), label_groups(walks)
    held_out = groups.user_G % 5 == 0
    source = gems_source(walks, Vocabulary.of(walks, split_ms=10**15), model.config)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    learner = DenseLearner(model).eval()
    asked = LabelExamples(source, groups.select(held_out), config.num_targets)
    batch = asked.batch(np.arange(held_out.sum()), np.random.default_rng(0))

    def loss() -> float:
        torch.manual_seed(0)
        with torch.no_grad():
            return float(learner.loss(batch))

    untaught = loss()
    some = LabelExamples(source, groups.select(~held_out), config.num_targets)
    learn_heads(model, some, config.loop)
    assert loss() < untaught - 0.2
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert {"dense.items.vector.weight", "recent_layers.0.attention.query.weight"} <= changed
    parts = ("dense.", "events.", "recent_layers.", "position_RD")
    assert all(name.startswith(parts) for name in changed), changed
    # The decoder's state opens the gate, and there was none.
    assert not any(name.startswith("dense.gate") for name in changed)


def test_a_batch_without_targets_does_no_harm(dense: Trained) -> None:
    recent, _ = dense.source.streams(dense.groups.select(slice(4)))
    nobody = recent._replace(item=torch.zeros_like(recent.item), mask=recent.mask & False)
    head = dense.model.dense
    query_BRE = head.queries(nobody.item, dense.model._recent(nobody).tokens_BND)
    loss = head.loss(query_BRE, nobody, torch.zeros(4, 2, dtype=torch.int64))
    assert loss.detach().item() == 0.0


def test_the_state_of_a_training_keeps_the_head(dense: Trained, tmp_path: Path) -> None:
    state = read_state(save_state(dense, tmp_path))
    assert state.config == dense.config
    for name, value in dense.model.state_dict().items():
        assert torch.equal(state.model.state_dict()[name], value), name
