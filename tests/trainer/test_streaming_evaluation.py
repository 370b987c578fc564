"""The judgement counts events, labels, bands and differences as documented."""

import math

import numpy as np
import pytest

from trainer.baselines import own_recency
from trainer.batches import BatchSource
from trainer.dataset import EventLog, Int64s, LabelGroups, label_groups
from trainer.protocols import Sample, global_split
from trainer.streaming_evaluation import (
    LIST_LENGTH,
    PerUser,
    Targets,
    by_age,
    by_history,
    figures,
    judge_task,
    longer_than_recent,
    paired_bootstrap,
    places,
    rank_all,
    rank_frozen,
)
from trainer.vocabulary import Vocabulary

DAY_MS = 86_400_000


def source_of(items: list[int], days: list[int]) -> BatchSource:
    """One user's events; dense item n + 1 is item n."""
    log = EventLog.from_columns(
        {
            "user_id": np.full(len(items), 1),
            "item_id": np.array(items),
            "event_time_ms": np.array(days) * DAY_MS,
            "ordinal": np.arange(len(items)),
        }
    )
    return BatchSource.of(log, Vocabulary(np.arange(20), np.zeros(1, np.int64)))


def lists(*rows: list[int]) -> Int64s:
    return np.array([row + [0] * (LIST_LENGTH - len(row)) for row in rows])


def test_figures_by_hand() -> None:
    # Day 2 has items 4, 4 and 5; day 3 has item 6.
    source = source_of([3, 4, 4, 5, 6], [1, 2, 2, 2, 3])
    groups = label_groups(source.log).select(np.array([1, 2]))
    targets = Targets.of(source, groups)
    filler = [15] * 10
    place = places(targets, lists([9, 5], [*filler, 7]))
    assert place.tolist() == [2, 2, 0, 11]
    found = figures(targets, place)
    assert found["hr10"] == pytest.approx(2 / 4)
    assert found["ndcg10"] == pytest.approx(2 / math.log2(3) / 4, abs=1e-6)
    # Of day 2 one of two distinct items, of day 3 none within ten and one within a hundred.
    assert found["recall10"] == pytest.approx((1 / 2 + 0) / 2)
    assert found["recall100"] == pytest.approx((1 / 2 + 1) / 2)
    assert found["hr100"] == pytest.approx(3 / 4)
    assert (found["events"], found["users"]) == (4, 1)


def test_an_item_is_met_only_before_its_own_time() -> None:
    source = source_of([3, 4, 3, 3, 4, 7], [1, 2, 3, 3, 4, 5])
    groups = label_groups(source.log)
    targets = Targets.of(source, groups)
    # The two of day 3 were last met on day 1, two events ago: not in each other.
    assert targets.met_ago_E.tolist() == [0, 0, 2, 2, 3, 0]
    assert targets.known_G.tolist() == [0, 1, 2, 4, 5]


def test_bands_split_the_events() -> None:
    items = [1] * 5 + [2] * 100 + [1, 2]
    source = source_of(items, list(range(len(items))))
    last = label_groups(source.log).select(slice(len(items) - 2, None))
    targets = Targets.of(source, last)
    place = places(targets, lists([2], [3]))
    ages = by_age(targets, place)
    assert ages["mid-term (65 to 512)"]["hr10"] == 1.0
    assert ages["recent (64)"]["hr10"] == 1.0
    assert set(ages) == {"recent (64)", "mid-term (65 to 512)"}
    assert set(by_history(targets, place)) == {"65 to 512"}
    assert longer_than_recent(targets).all()


def test_labels_come_back_in_their_order(log: EventLog) -> None:
    source = BatchSource.of(log, Vocabulary.of(log, split_ms=10**15))
    groups = label_groups(log)

    def rank(part: LabelGroups) -> Int64s:
        return np.repeat(part.first_row_G[:, None], LIST_LENGTH, axis=1)

    assert rank_all(source, groups, rank, name="test")[:, 0].tolist() == groups.first_row_G.tolist()


def test_one_frozen_list_serves_all_labels_of_a_user(log: EventLog) -> None:
    source = BatchSource.of(log, Vocabulary.of(log, split_ms=10**15))
    task = global_split(log, Sample(test_users=5))
    assert task.frozen is not None
    rank = own_recency(source, k=LIST_LENGTH)
    one_by_one = rank_all(source, task.frozen, rank, name="test")
    assert rank_frozen(source, task.frozen, rank, name="test").tolist() == one_by_one.tolist()


def test_live_state_is_worth_something_to_users_who_repeat(log: EventLog) -> None:
    source = BatchSource.of(log, Vocabulary.of(log, split_ms=10**15))
    task = global_split(log, Sample())
    judged = judge_task(source, task, own_recency(source, k=LIST_LENGTH), name="test")
    assert judged.frozen is not None
    assert judged.live["ndcg10"] != judged.frozen["ndcg10"]
    assert sum(judged.per_user.events) == judged.live["events"]
    total = sum(judged.per_user.ndcg10) / judged.live["events"]
    assert total == pytest.approx(judged.live["ndcg10"], abs=1e-4)


def test_the_bootstrap_tells_a_difference_from_noise() -> None:
    rng = np.random.default_rng(1)
    events = [10] * 200
    base = rng.uniform(0, 5, 200)
    better = PerUser(events, (base + rng.normal(0.5, 0.5, 200)).tolist())
    same = PerUser(events, (base + rng.normal(0.0, 0.5, 200)).tolist())
    other = PerUser(events, base.tolist())
    gap = paired_bootstrap(better, other, seed=3)
    assert gap.is_certain
    assert gap.low < 0.05 < gap.high
    assert gap == paired_bootstrap(better, other, seed=3)
    assert paired_bootstrap(other, other, seed=3).mean == 0.0
    assert abs(paired_bootstrap(same, other, seed=3).mean) < gap.mean / 3
