"""Beam search returns what ranking every item by its likelihood would, and nothing forbidden."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.batches import Batch
from trainer.dataset import LabelGroups
from trainer.models.beam import generate
from trainer.models.reading import without_lifelong
from trainer.train import Trained

# Wide enough to keep every prefix of a 4 x 4 x 4 tree.
EVERY_PREFIX = 16


def _search(
    trained: Trained, groups: LabelGroups, allowed: Tensor, k_max: int
) -> tuple[Tensor, Tensor]:
    recent, mid = trained.source.streams(groups)
    with torch.no_grad():
        reading = trained.model.read(without_lifelong(recent, mid))
        return generate(trained.model, reading, allowed, k_max=k_max, beam_width=EVERY_PREFIX)


def _likelihoods(trained: Trained, groups: LabelGroups) -> Tensor:
    """Log-probability of every item [B, V], one target each."""
    recent, mid = trained.source.streams(groups)
    every = torch.arange(1, trained.vocabulary.num_items + 1).expand(len(groups), -1)
    with torch.no_grad():
        return trained.model.log_likelihood(Batch(recent, mid, every))


def _all_allowed(trained: Trained, batch: int) -> Tensor:
    return torch.ones(batch, trained.vocabulary.num_items + 1, dtype=torch.bool)


@pytest.mark.parametrize("copy", ["streams", "off"])
@pytest.mark.parametrize("leaf", ["items", "codes"])
@pytest.mark.parametrize("dense", ["on", "off"])
def test_beam_equals_brute_force(
    trained_with: Callable[..., Trained], copy: str, leaf: str, dense: str
) -> None:
    trained = trained_with(copy=copy, leaf=leaf, dense=dense)
    groups = trained.groups.select(np.arange(0, len(trained.groups), 9))
    num_items = trained.vocabulary.num_items
    item, score = _search(trained, groups, _all_allowed(trained, len(groups)), num_items)
    likelihood = _likelihoods(trained, groups)
    torch.testing.assert_close(likelihood.exp().sum(dim=1), torch.ones(len(groups)))
    expected = likelihood.sort(dim=1, descending=True)[0]
    torch.testing.assert_close(score, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(likelihood.gather(1, item - 1), score, atol=1e-4, rtol=0)
    assert all(len(set(row)) == num_items for row in item.tolist())


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_a_forbidden_item_never_returns(trained: Trained, data: st.DataObject) -> None:
    num_items = trained.vocabulary.num_items
    allowed_items = data.draw(st.sets(st.integers(1, num_items)))
    groups = trained.groups.select(np.array([0, len(trained.groups) - 1]))
    allowed = torch.zeros(2, num_items + 1, dtype=torch.bool)
    allowed[:, list(allowed_items)] = True
    item, score = _search(trained, groups, allowed, 10)
    for row, scores in zip(item.tolist(), score.tolist(), strict=True):
        found = [i for i in row if i]
        assert len(found) == min(10, len(allowed_items))
        assert set(found) <= allowed_items
        assert scores == sorted(scores, reverse=True)
        assert all(np.isneginf(scores[len(found) :]))


def test_equal_scores_rank_by_item(trained_with: Callable[..., Trained]) -> None:
    trained = trained_with(copy="off", prior="off", leaf="codes")
    for parameter in (*trained.model.outputs, *trained.model.biases):
        torch.nn.init.zeros_(parameter)
    groups = trained.groups.select(np.array([5]))
    item, score = _search(trained, groups, _all_allowed(trained, 1), trained.vocabulary.num_items)
    pairs = list(zip((-score[0]).tolist(), item[0].tolist(), strict=True))
    assert pairs == sorted(pairs)
    assert len(set(score[0].tolist())) < len(pairs), "the test needs ties"
