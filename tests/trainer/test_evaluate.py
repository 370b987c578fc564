"""The judgement counts events as documented, and the baselines rank as documented."""

import math

import numpy as np
import pytest

from trainer.baselines import own_frequency, popularity
from trainer.batches import BatchSource
from trainer.dataset import EventLog, LabelGroups, label_groups
from trainer.errors import EmptyWindowError
from trainer.evaluate import TOP_K, held_out_groups, judge, model_ranker, tuning_groups
from trainer.train import Trained
from trainer.vocabulary import Vocabulary

DAY_MS = 86_400_000


def _log(rows: list[tuple[int, int, int]]) -> EventLog:
    user_id, day, item_id = (np.array(column) for column in zip(*rows, strict=True))
    ordinal = np.array([sum(u == row[0] for u in user_id[:i]) for i, row in enumerate(rows)])
    return EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": item_id,
            "event_time_ms": day * DAY_MS,
            "ordinal": ordinal,
        }
    )


def _ranked(log: EventLog, *, decay: float = 1.0, window: int = 256) -> list[int]:
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    source = BatchSource.of(log, vocabulary)
    groups = label_groups(log)
    rank = own_frequency(source, window=window, decay=decay)
    row = rank(groups.select(np.array([len(groups) - 1])))[0]
    return vocabulary.item_ids_V[row[row > 0] - 1].tolist()


def test_own_items_rank_by_count_then_by_newness() -> None:
    log = _log([(1, 1, 5), (1, 2, 6), (1, 3, 5), (1, 4, 7), (1, 5, 9)])
    assert _ranked(log) == [5, 7, 6]
    assert _ranked(log, window=2) == [7, 5]
    assert _ranked(log, decay=0.4) == [7, 5, 6]


def test_popularity_counts_all_users_up_to_the_day_before() -> None:
    log = _log([(1, 1, 5), (1, 2, 5), (2, 1, 6), (2, 3, 6), (2, 4, 6), (2, 4, 6)])
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    source = BatchSource.of(log, vocabulary)
    groups = label_groups(log)
    at_day_4 = groups.select(groups.time_ms_G == 4 * DAY_MS)
    assert popularity(source)(at_day_4)[0].tolist()[:2] == [1, 2]


def test_a_hit_gains_by_its_rank_and_every_event_counts() -> None:
    log = _log([(1, 1, 5), (1, 2, 5), (1, 2, 6), (1, 2, 7)])
    vocabulary = Vocabulary.of(log, split_ms=2 * DAY_MS)
    source = BatchSource.of(log, vocabulary)
    groups = label_groups(log).select(np.array([1]))

    def third_is_5(part: LabelGroups) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        row = np.zeros((len(part), TOP_K), np.int64)
        row[:, 2] = vocabulary.index_items(np.array([5]))
        return row

    quality = judge(source, groups, third_is_5, name="test")
    assert quality.num_events == 3
    assert quality.hr10 == pytest.approx(1 / 3)
    assert quality.ndcg10 == pytest.approx(1 / math.log2(4) / 3)


def test_items_of_no_training_event_are_misses() -> None:
    log = _log([(1, 1, 5), (1, 2, 8), (1, 3, 8)])
    vocabulary = Vocabulary.of(log, split_ms=DAY_MS)
    source = BatchSource.of(log, vocabulary)
    groups = held_out_groups(log, label_groups(log), split_ms=DAY_MS, seed=0)
    assert judge(source, groups, own_frequency(source), name="test").hr10 == 0


def test_held_out_groups_are_seeded_bounded_and_after_the_split(log: EventLog) -> None:
    groups = label_groups(log)
    split_ms = 50 * DAY_MS
    one, other = (
        held_out_groups(log, groups, split_ms=split_ms, seed=1, max_users=3, max_groups_per_user=4)
        for _ in range(2)
    )
    assert one.first_row_G.tolist() == other.first_row_G.tolist()
    assert (one.time_ms_G > split_ms).all()
    users, counts = np.unique(one.user_G, return_counts=True)
    assert len(users) == 3
    assert counts.max() == 4


def test_where_users_are_few_their_sample_is_filled(log: EventLog) -> None:
    groups = label_groups(log)
    plain, filled = (
        sample(log, groups, split_ms=50 * DAY_MS, seed=1, max_users=24, max_groups_per_user=2)
        for sample in (held_out_groups, tuning_groups)
    )
    num_users = len(np.unique(plain.user_G))
    assert num_users == 8
    assert len(plain) == 2 * num_users
    assert 4 * num_users <= len(filled) <= 2 * 24
    assert np.unique(filled.user_G, return_counts=True)[1].max() <= 2 * 24 // num_users
    assert np.isin(plain.first_row_G, filled.first_row_G).all()


def test_an_empty_window_is_refused(log: EventLog) -> None:
    with pytest.raises(EmptyWindowError, match="newer than the split"):
        held_out_groups(log, label_groups(log), split_ms=10**15, seed=0)


def test_the_model_beats_popularity_on_repeating_users(trained: Trained) -> None:
    source = trained.source
    groups = held_out_groups(source.log, trained.groups, split_ms=trained.split_ms, seed=0)
    model = judge(source, groups, model_ranker(trained.model, source), name="model")
    popular = judge(source, groups, popularity(source), name="popularity")
    assert model.ndcg10 > popular.ndcg10
