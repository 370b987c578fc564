"""New items join without retraining: no old id moves, and what can be answered is legal."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import made_up_columns
from trainer.dataset import EventLog
from trainer.errors import VocabularyError
from trainer.export import Provenance, export
from trainer.models.beam import generate
from trainer.models.lifelong import memory_version
from trainer.new_items import extended, new_item_vectors, restored
from trainer.semantic_ids import extend_semantic_ids, learn_semantic_ids
from trainer.train import Trained
from trainer.vocabulary import Vocabulary

DAY_MS = 86_400_000
PROVENANCE = Provenance(
    name="gems",
    created_ms=1,
    window_from={},
    window_to={},
    feature_schema_hash="0" * 16,
    metrics={},
)


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


@pytest.fixture(scope="module")
def newer_log() -> EventLog:
    """The log of the trained model, and then two months in which half of all events are new."""
    columns = made_up_columns(seed=3)
    later = made_up_columns(seed=4, num_baskets=10)
    later["event_time_ms"] = later["event_time_ms"] + 120 * DAY_MS
    later["ordinal"] = later["ordinal"] + 1000
    is_new = np.random.default_rng(1).random(len(later["item_id"])) < 0.5
    later["item_id"] = np.where(is_new, 10_001 + later["item_id"] % 20 * 3, later["item_id"])
    return EventLog.from_columns(
        {name: np.concatenate((columns[name], later[name])) for name in columns}
    )


def test_an_extended_model_knows_both_and_keeps_old_ids(
    trained: Trained, newer_log: EventLog
) -> None:
    larger = extended(trained, newer_log, until_ms=10**15)
    new_ids = np.setdiff1d(larger.vocabulary.item_ids_V, trained.vocabulary.item_ids_V)
    assert len(new_ids) > 10
    place = larger.vocabulary.index_items(trained.vocabulary.item_ids_V)
    assert torch.equal(
        larger.model.trie.codes_I3[torch.from_numpy(place)], trained.model.trie.codes_I3[1:]
    )
    assert torch.equal(
        larger.model.item.weight[torch.from_numpy(place)], trained.model.item.weight[1:]
    )
    assert larger.model.compressor is not None
    assert trained.model.compressor is not None
    assert memory_version(larger.model.compressor) == memory_version(trained.model.compressor)
    groups = larger.groups.select(np.arange(len(larger.groups) - 32, len(larger.groups)))
    recent, mid = larger.source.streams(groups)
    allowed = torch.ones(len(groups), larger.vocabulary.num_items + 1, dtype=torch.bool)
    with torch.no_grad():
        reading = larger.model.read(larger.model.history(recent, mid, larger.source.older(groups)))
        item, _ = generate(larger.model, reading, allowed, k_max=10)
    answered = larger.vocabulary.item_ids_V[item[item > 0].numpy() - 1]
    assert np.isin(answered, new_ids).any()


def test_nothing_new_changes_nothing(trained: Trained, log: EventLog) -> None:
    assert extended(trained, log, until_ms=trained.split_ms) is trained


def test_a_package_can_be_read_back_and_extended(
    trained: Trained, newer_log: EventLog, tmp_path: Path
) -> None:
    manifest = export(trained, tmp_path / "1", PROVENANCE)
    back = restored(tmp_path / "1")
    assert back.vocabulary_item_ids_V.tolist() == trained.vocabulary.item_ids_V.tolist()
    groups = trained.groups.select(np.arange(100, 108))
    batch = trained.source.batch(groups, num_targets=3, rng=np.random.default_rng(1))
    with torch.no_grad():
        wanted = trained.model.log_likelihood(batch)
        torch.testing.assert_close(back.model.log_likelihood(batch), wanted)
    larger = extended(dataclasses.replace(trained, model=back.model), newer_log, until_ms=10**15)
    again = export(larger, tmp_path / "2", PROVENANCE)
    assert again["memory_version"] == manifest["memory_version"]
    assert again["num_items"] > manifest["num_items"]
