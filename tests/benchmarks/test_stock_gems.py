"""Goal: what GEMs is measured against computes the same, with another attention layer."""

import numpy as np
import pytest
import torch

from benchmarks.stock_gems import StockAttention, stock_gems
from tests.trainer.conftest import made_up_columns, small_training
from trainer.batches import BatchSource, LabelExamples, length_batches
from trainer.dataset import EventLog, Int64s, label_groups
from trainer.models.gems import Gems
from trainer.models.layers import Attention
from trainer.train import GemsLearner, new_model
from trainer.vocabulary import Vocabulary

NO_SPLIT_MS = 10**15


@pytest.fixture(scope="module")
def examples() -> LabelExamples:
    log = EventLog.from_columns(made_up_columns(seed=3))
    vocabulary = Vocabulary.of(log, split_ms=NO_SPLIT_MS)
    source = BatchSource.of(log, vocabulary, num_recent=8, num_mid=24)
    return LabelExamples(source, label_groups(log), num_targets=4)


@pytest.fixture(scope="module")
def model(examples: LabelExamples) -> Gems:
    torch.manual_seed(1)
    log = examples.source.log
    vocabulary = Vocabulary.of(log, split_ms=NO_SPLIT_MS)
    return new_model(log, vocabulary, small_training(), tables_ms=NO_SPLIT_MS)


def some_batches(examples: LabelExamples) -> list[Int64s]:
    """A batch of users without any event, of one user, and of many."""
    rng = np.random.default_rng(0)
    batches = length_batches(examples.lengths(), size=16, rng=rng)
    batches.sort(key=lambda chosen: int(examples.lengths()[chosen].max()))
    return [batches[0], batches[0][:1], batches[-1][:1], batches[-1]]


def test_loss_and_gradients_are_those_of_the_model(examples: LabelExamples, model: Gems) -> None:
    ours, stock = GemsLearner(model), GemsLearner(stock_gems(model))
    assert not any(isinstance(module, Attention) for module in stock.modules())
    assert any(isinstance(module, StockAttention) for module in stock.modules())
    for chosen in some_batches(examples):
        batch = examples.batch(chosen, np.random.default_rng(2))
        losses = [learner.loss(batch) for learner in (ours, stock)]
        assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-5)
        norms = []
        for learner, loss in zip((ours, stock), losses, strict=True):
            learner.zero_grad()
            torch.autograd.backward(loss)
            gradients = [p.grad for p in learner.parameters() if p.grad is not None]
            norms.append(torch.stack([one.square().sum() for one in gradients]).sum().item())
        assert norms[0] == pytest.approx(norms[1], rel=1e-3)
