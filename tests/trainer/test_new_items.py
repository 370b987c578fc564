"""New items join without retraining: no old id moves, and what can be answered is legal."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import DAY_MS
from tests.trainer.newer import END_MS, NEWER_FROM_MS, newer_log
from trainer.dataset import EventLog
from trainer.errors import VocabularyError
from trainer.models.lifelong import memory_version
from trainer.new_items import extended, new_item_vectors
from trainer.semantic_ids import extend_semantic_ids, learn_semantic_ids
from trainer.train import Trained, fit_time_ms
from trainer.training_state import WarmState
from trainer.vocabulary import Vocabulary


@given(
    st.integers(1, 60), st.integers(0, 64), st.integers(0, 3), st.sampled_from(["random", "same"])
)
@settings(max_examples=60, deadline=None)
def test_no_old_id_moves_and_all_are_unique(
    num_old: int, num_new: int, seed: int, kind: str
) -> None:
    num_new = min(num_new, 64 - num_old)
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(num_old + num_new, 6, generator=generator)
    if kind == "same":
        vectors = torch.ones_like(vectors)
    old = learn_semantic_ids(vectors[:num_old], sizes=(4, 4, 4), seed=seed)
    both = extend_semantic_ids(old, vectors[:num_old], vectors[num_old:])
    assert torch.equal(both.codes_V3[:num_old], old.codes_V3)
    assert len(torch.unique(both.codes_V3, dim=0)) == num_old + num_new
    assert int(both.codes_V3.min()) >= 0
    assert int(both.codes_V3.max()) < 4
    again = extend_semantic_ids(old, vectors[:num_old], vectors[num_old:])
    assert torch.equal(again.codes_V3, both.codes_V3)


def test_a_new_item_stands_beside_its_like() -> None:
    centres = 10 * torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    old_vectors = centres.repeat_interleave(3, dim=0) + 0.01 * torch.randn(12, 8)
    old = learn_semantic_ids(old_vectors, sizes=(4, 4, 4), seed=0)
    both = extend_semantic_ids(old, old_vectors, centres)
    first = both.codes_V3[:, 0]
    assert first[12:].tolist() == first[:12:3].tolist()


def test_more_items_than_places_are_refused() -> None:
    vectors = torch.randn(60, 3)
    old = learn_semantic_ids(vectors, sizes=(4, 4, 4), seed=0)
    with pytest.raises(VocabularyError, match="5 new items beside 60 do not fit the 64"):
        extend_semantic_ids(old, vectors, torch.randn(5, 3))


def _columns(events: list[tuple[int, int, int]]) -> dict[str, np.ndarray]:
    user, item, time = (np.array(column) for column in zip(*events, strict=True))
    first = {one: int(np.flatnonzero(user == one)[0]) for one in set(user.tolist())}
    ordinal = np.arange(len(user)) - np.array([first[one] for one in user.tolist()])
    return {
        "user_id": user,
        "item_id": item,
        "event_time_ms": time * DAY_MS,
        "ordinal": ordinal,
        "domain": (item // 100).astype(np.uint64),
    }


def test_vectors_come_from_first_readers_else_from_the_domain() -> None:
    """Items 100 and 101 are of one domain, 200 of another; 109 and 209 are new."""
    read = [(user, 200, 1) for user in range(3)] + [(user, 109, 2) for user in range(3)]
    alone = [(9, 100, 1), (9, 209, 3)]
    events = sorted([*read, *alone, (8, 101, 1), (8, 200, 2)])
    log = EventLog.from_columns(_columns(events))
    vocabulary = Vocabulary(np.array([100, 101, 200]), np.array([1, 2]))
    vectors = torch.eye(3)
    by_reader, by_domain = new_item_vectors(
        log, vocabulary, vectors, np.array([109, 209]), until_ms=10**15
    )
    assert by_reader.tolist() == [0, 0, 1]
    assert by_domain.tolist() == [0, 0, 1]
    # Nobody has read anything by then, and nothing of the domain is known: all items alike.
    early = new_item_vectors(log, vocabulary, vectors, np.array([209]), until_ms=3 * DAY_MS)
    assert early[0].tolist() == [0, 0, 1]


def test_an_extended_model_knows_both_and_keeps_old_ids(trained: Trained) -> None:
    larger = extended(WarmState.of(trained), newer_log(), until_ms=END_MS)
    new_ids = np.setdiff1d(larger.vocabulary.item_ids_V, trained.vocabulary.item_ids_V)
    assert len(new_ids) > 10
    place = torch.from_numpy(larger.vocabulary.index_items(trained.vocabulary.item_ids_V))
    old = trained.model
    assert torch.equal(larger.model.trie.codes_I3[place], old.trie.codes_I3[1:])
    assert torch.equal(larger.model.item.weight[place], old.item.weight[1:])
    assert (larger.domain_V[place.numpy() - 1] == trained.domain_V).all()
    assert larger.model.compressor is not None
    assert old.compressor is not None
    assert memory_version(larger.model.compressor) == memory_version(old.compressor)


def test_priors_start_from_the_counts_of_the_window_and_keep_what_was_learned(
    trained: Trained,
) -> None:
    log, old = newer_log(), trained.model
    larger = extended(WarmState.of(trained), log, until_ms=END_MS, from_ms=NEWER_FROM_MS)
    counted = log.item_id_N[log.event_time_ms_N >= NEWER_FROM_MS]
    new_item = np.setdiff1d(counted, trained.vocabulary.item_ids_V)[:1]
    for item in (trained.vocabulary.item_ids_V[:1], new_item):
        place = int(larger.vocabulary.index_items(item)[0])
        first, second, third = larger.model.trie.codes_I3[place].tolist()
        leaf = first * 4 + second, third
        old_place = int(trained.vocabulary.index_items(item)[0])
        old_count = int(trained.count_V[old_place - 1]) if old_place else 0
        learned = old.biases[2].detach()[leaf].item() - np.log(old_count + 0.5)
        wanted = np.log((counted == item).sum() + 0.5) + learned
        assert larger.model.biases[2].detach()[leaf].item() == pytest.approx(wanted, abs=1e-5)


def test_the_dense_head_keeps_its_rows_and_finds_new_ones_by_their_readers(
    trained_dense: Trained,
) -> None:
    log, table = newer_log(), trained_dense.model.dense.items
    state = extended(WarmState.of(trained_dense), log, until_ms=END_MS, from_ms=NEWER_FROM_MS)
    larger, old = state.model.dense.items, trained_dense.vocabulary
    place = torch.from_numpy(state.vocabulary.index_items(old.item_ids_V))
    assert torch.equal(larger.vector.weight[place], table.vector.weight[1:])
    assert larger.vector.weight[0].count_nonzero() == 0
    new_ids = np.setdiff1d(state.vocabulary.item_ids_V, old.item_ids_V)
    new_place = torch.from_numpy(state.vocabulary.index_items(new_ids))
    trained_VE = table.vector.weight.detach()[1:]
    wanted = new_item_vectors(log, old, trained_VE, new_ids, until_ms=END_MS)
    torch.testing.assert_close(
        larger.vector.weight.detach()[new_place], wanted * trained_VE.norm(dim=1).mean()
    )
    # An old item keeps what it learned beside its count; a new one has nothing but its count.
    rows_N = log.event_time_ms_N >= NEWER_FROM_MS
    learned_V = table.bias_I.detach()[1:].numpy() - np.log(trained_dense.count_V + 0.5)
    for ids, places, learned in (
        (old.item_ids_V, place, learned_V),
        (new_ids, new_place, np.zeros(len(new_ids))),
    ):
        count = (log.item_id_N[rows_N, None] == ids).sum(axis=0)
        wanted_V = learned + np.log(count + 0.5)
        assert larger.bias_I.detach()[places].numpy() == pytest.approx(wanted_V, abs=1e-5)


@pytest.mark.parametrize("model", ["trained", "trained_dense"])
def test_without_anything_new_the_model_stays_what_it_is(
    model: str, log: EventLog, request: pytest.FixtureRequest
) -> None:
    trained: Trained = request.getfixturevalue(model)
    state = WarmState.of(trained)
    until_ms = fit_time_ms(log, trained.groups, trained.config)
    same = extended(state, log, until_ms=until_ms)
    assert same.vocabulary.item_ids_V.tolist() == state.vocabulary.item_ids_V.tolist()
    for (name, before), after in zip(
        trained.model.state_dict().items(), same.model.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(after, before, msg=name)
