"""Model-free rankings count what they say, and nothing of the future."""

import numpy as np
import pytest

from trainer.baselines import (
    co_occurrence,
    lists_of,
    own_frequency,
    own_recency,
    popularity,
    recent_popularity,
)
from trainer.batches import BatchSource
from trainer.counted import LiveSources
from trainer.dataset import EventLog, label_groups
from trainer.evaluate import Ranker
from trainer.vocabulary import Vocabulary

DAY_MS = 86_400_000
Rows = list[tuple[int, int, int]]


def source_of(rows: Rows) -> tuple[BatchSource, Vocabulary]:
    """Rows of (user, day, item)."""
    user_id, day, item_id = (np.array(column) for column in zip(*rows, strict=True))
    ordinal = [sum(u == row[0] for u in user_id[:i]) for i, row in enumerate(rows)]
    log = EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": item_id,
            "event_time_ms": day * DAY_MS,
            "ordinal": np.array(ordinal),
        }
    )
    catalogue = Vocabulary.of(log, split_ms=10**15)
    return BatchSource.of(log, catalogue), catalogue


def live_of(source: BatchSource) -> LiveSources:
    """The live sources with the longest half-life that a week of hours can tell."""
    return LiveSources.of(source.log, half_life_h=7 * 24)


def ranked(rank: Ranker, source: BatchSource, catalogue: Vocabulary, *, place: int) -> list[int]:
    """Item ids for the label at a place of the log's labels."""
    row = rank(label_groups(source.log).select(np.array([place])))[0]
    return catalogue.item_ids_V[row[row > 0] - 1].tolist()


def test_own_recency_is_the_newest_distinct_first() -> None:
    source, catalogue = source_of([(1, 1, 5), (1, 2, 6), (1, 3, 5), (1, 4, 7), (1, 5, 9)])
    assert ranked(own_recency(source), source, catalogue, place=4) == [7, 5, 6]


def test_recent_popularity_forgets() -> None:
    rows = [(1, 1, 5), (1, 2, 5), (1, 3, 5), (1, 40, 6), (2, 41, 7), (2, 45, 9)]
    source, catalogue = source_of(rows)
    last = len(label_groups(source.log)) - 1
    often = popularity(source)
    assert ranked(often, source, catalogue, place=last)[0] == 5
    newly = lists_of(recent_popularity(source, live_of(source)))
    assert ranked(newly, source, catalogue, place=last) == [7, 6], "and the old ones not at all"


def test_what_was_met_is_left_out_where_nothing_repeats() -> None:
    rows = [(1, 1, 5), (1, 2, 6), (2, 1, 5), (2, 2, 6), (2, 3, 8), (1, 9, 7)]
    source, catalogue = source_of(rows)
    # Labels in row order: three of user 1, then user 2's.
    assert ranked(popularity(source, repeats=False), source, catalogue, place=2) == [8]
    assert ranked(
        lists_of(co_occurrence(source, live_of(source), repeats=False)), source, catalogue, place=2
    ) == [8]
    assert (
        ranked(lists_of(co_occurrence(source, live_of(source))), source, catalogue, place=5) == []
    )
    assert set(ranked(popularity(source), source, catalogue, place=2)) == {5, 6, 8}


def test_co_occurrence_prefers_what_came_sooner() -> None:
    rows = [(2, 1, 5), (2, 2, 6), (2, 3, 7), (3, 1, 5), (3, 2, 6), (1, 9, 5), (1, 10, 4)]
    source, catalogue = source_of(rows)
    assert ranked(lists_of(co_occurrence(source, live_of(source))), source, catalogue, place=1) == [
        6,
        7,
    ]
    # Before anyone went on from item 5 nothing is known to follow it.
    assert (
        ranked(lists_of(co_occurrence(source, live_of(source))), source, catalogue, place=3) == []
    )


@pytest.mark.parametrize(
    "make",
    [
        popularity,
        lambda source: lists_of(recent_popularity(source, live_of(source))),
        own_frequency,
        own_recency,
        lambda source: lists_of(co_occurrence(source, live_of(source))),
    ],
)
def test_no_ranking_knows_the_future(make: type, log: EventLog) -> None:
    """Cutting off all that comes at or after a label changes nothing at it."""
    catalogue = Vocabulary.of(log, split_ms=10**15)
    groups = label_groups(log)
    moment = int(np.quantile(groups.time_ms_G, 0.6))
    at = np.flatnonzero(groups.time_ms_G == groups.time_ms_G[groups.time_ms_G >= moment].min())
    whole = make(BatchSource.of(log, catalogue))(groups.select(at))
    future = log.event_time_ms_N >= groups.time_ms_G[at[0]]
    scrambled = np.where(future, np.roll(log.item_id_N, 7), log.item_id_N)
    columns = {
        "user_id": log.user_ids_U[log.user_N],
        "item_id": scrambled,
        "event_time_ms": log.event_time_ms_N,
        "ordinal": log.ordinal_N,
    }
    other = EventLog.from_columns(columns)
    assert (other.item_id_N != log.item_id_N).any()
    assert make(BatchSource.of(other, catalogue))(groups.select(at)).tolist() == whole.tolist()
