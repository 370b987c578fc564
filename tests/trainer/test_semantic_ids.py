"""Every item has a code triple of its own, found again from the tree, the same at every run."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import made_up_columns
from trainer.dataset import EventLog
from trainer.errors import VocabularyError
from trainer.item_vectors import co_occurrence_vectors
from trainer.models.trie import ItemTrie
from trainer.semantic_ids import assign_bounded, learn_semantic_ids
from trainer.vocabulary import Vocabulary


@given(st.integers(1, 60), st.integers(0, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_ids_are_unique_and_round_trip(num_items: int, seed: int, identical: bool) -> None:  # noqa: FBT001 - drawn
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_items, 6, generator=generator)
    if identical:
        vectors = torch.ones_like(vectors)
    ids = learn_semantic_ids(vectors, sizes=(4, 4, 4), seed=seed)
    assert len(torch.unique(ids.codes_V3, dim=0)) == num_items
    trie = ItemTrie(ids)
    first, second, third = trie.codes_I3[1:].unbind(1)
    assert trie.item_PK[first * 4 + second, third].tolist() == list(range(1, num_items + 1))
    assert int((trie.item_PK > 0).sum()) == num_items
    again = learn_semantic_ids(vectors, sizes=(4, 4, 4), seed=seed)
    assert torch.equal(again.codes_V3, ids.codes_V3)


def test_a_full_house_has_every_code() -> None:
    ids = learn_semantic_ids(torch.randn(64, 3), sizes=(4, 4, 4), seed=0)
    assert len(torch.unique(ids.codes_V3, dim=0)) == 64


@pytest.mark.parametrize("num_items", [0, 65])
def test_what_does_not_fit_is_refused(num_items: int) -> None:
    with pytest.raises(VocabularyError, match="64 semantic ids"):
        learn_semantic_ids(torch.randn(num_items, 3), sizes=(4, 4, 4), seed=0)


def test_the_nearest_items_stay_and_ties_go_to_the_smaller_index() -> None:
    distance = torch.tensor([[1.0, 5.0], [1.0, 5.0], [0.5, 5.0], [9.0, 2.0]])
    parent = torch.zeros(4, dtype=torch.int64)
    assert assign_bounded(distance, parent, capacity=2).tolist() == [0, 1, 0, 1]


def test_near_items_share_codes() -> None:
    centres = 10 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    vectors = centres.repeat_interleave(5, dim=0) + 0.01 * torch.randn(20, 8)
    first = learn_semantic_ids(vectors, sizes=(4, 4, 4), seed=0).codes_V3[:, 0].view(4, 5)
    assert (first == first[:, :1]).all()


def test_vectors_are_seeded_finite_and_blind_after_the_split() -> None:
    split_ms = 60 * 86_400_000
    columns = made_up_columns(seed=3)
    log = EventLog.from_columns(columns)
    later = columns["event_time_ms"] > split_ms
    columns["item_id"] = np.where(later, columns["item_id"].max(), columns["item_id"])
    changed = EventLog.from_columns(columns)
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    vectors = co_occurrence_vectors(log, vocabulary, split_ms=split_ms, seed=5)
    again = co_occurrence_vectors(changed, vocabulary, split_ms=split_ms, seed=5)
    assert vectors.shape == (vocabulary.num_items, 64)
    assert torch.isfinite(vectors).all()
    assert torch.equal(vectors, again)


def test_drawing_vectors_leaves_the_global_generator_alone(log: EventLog) -> None:
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    co_occurrence_vectors(log, vocabulary, split_ms=10**15, seed=5)
    assert torch.equal(torch.rand(1), expected)
