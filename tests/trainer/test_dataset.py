"""What a label may know is exactly what had happened, and had arrived, before it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.conftest import made_up_columns
from trainer.batches import BatchSource, in_order
from trainer.dataset import (
    EventLog,
    label_groups,
    newest,
    split_time_ms,
    training_groups,
)
from trainer.errors import BadColumnsError, EmptyWindowError
from trainer.vocabulary import UNKNOWN, Vocabulary

NUM_RECENT, NUM_MID = 3, 5

events = st.lists(
    st.tuples(st.integers(1, 3), st.integers(0, 6), st.integers(0, 5)), min_size=1, max_size=40
)


def _log(rows: list[tuple[int, int, int]]) -> EventLog:
    """Rows (user, time, item) in order of arrival: times go back, so some events are late."""
    ordinal: dict[int, int] = {}
    ordinals = []
    for user, _, _ in rows:
        ordinals.append(ordinal.get(user, 0))
        ordinal[user] = ordinals[-1] + 1
    user_id, time_ms, item_id = (np.array(column) for column in zip(*rows, strict=True))
    return EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": item_id,
            "event_time_ms": time_ms,
            "ordinal": np.array(ordinals),
        }
    )


def _known_by_loop(rows: list[tuple[int, int, int]], user: int, time_ms: int) -> list[int]:
    """Items of a user before a time, as they stood at the first arrival of that time's group."""
    own = [
        (when, ordinal, item)
        for ordinal, (when, item) in enumerate(
            (when, item) for owner, when, item in rows if owner == user
        )
    ]
    first_arrival = min(ordinal for when, ordinal, _ in own if when == time_ms)
    known = sorted(e for e in own if e[0] < time_ms and e[1] < first_arrival)
    return [item for _, _, item in known]


@given(events)
@settings(max_examples=150, deadline=None)
def test_streams_equal_a_slow_reference(rows: list[tuple[int, int, int]]) -> None:
    log = _log(rows)
    groups = label_groups(log)
    vocabulary = Vocabulary.of(log, split_ms=10)
    source = BatchSource.of(log, vocabulary, num_recent=NUM_RECENT, num_mid=NUM_MID)
    recent, mid = source.streams(groups)
    for place in range(len(groups)):
        user = int(log.user_ids_U[groups.user_G[place]])
        known = _known_by_loop(rows, user, int(groups.time_ms_G[place]))[-(NUM_RECENT + NUM_MID) :]
        row = np.concatenate((mid.item[place].numpy(), recent.item[place].numpy()))
        mask = np.concatenate((mid.mask[place].numpy(), recent.mask[place].numpy()))
        assert row[mask].tolist() == vocabulary.index_items(np.array(known, np.int64)).tolist()
        assert mask.tolist() == sorted(mask.tolist()), "padding stands in front"
        assert (row[~mask] == UNKNOWN).all()


@given(events)
@settings(max_examples=50, deadline=None)
def test_every_event_is_in_one_group(rows: list[tuple[int, int, int]]) -> None:
    log = _log(rows)
    groups = label_groups(log)
    assert groups.num_rows_G.sum() == log.num_events
    keys = set(zip(groups.user_G.tolist(), groups.time_ms_G.tolist(), strict=True))
    assert len(keys) == len(groups)
    assert keys == set(zip(log.user_N.tolist(), log.event_time_ms_N.tolist(), strict=True))


def test_planted_future_changes_nothing() -> None:
    columns = made_up_columns(seed=1)
    log = EventLog.from_columns(columns)
    label_ms = int(np.quantile(log.event_time_ms_N, 0.5))
    planted = {name: column.copy() for name, column in columns.items()}
    planted["item_id"][columns["event_time_ms"] >= label_ms] = 999
    changed = EventLog.from_columns(planted)
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    groups = label_groups(log)
    chosen = groups.select(groups.time_ms_G <= label_ms)
    before = BatchSource.of(log, vocabulary, num_recent=8, num_mid=8).streams(chosen)
    after = BatchSource.of(changed, vocabulary, num_recent=8, num_mid=8).streams(chosen)
    for stream_before, stream_after in zip(before, after, strict=True):
        assert all(bool((a == b).all()) for a, b in zip(stream_before, stream_after, strict=True))


def test_targets_are_distinct_rows_of_their_group(log: EventLog) -> None:
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    source = BatchSource.of(log, vocabulary, num_recent=8, num_mid=8)
    groups = label_groups(log)
    targets = source.targets(groups, num_targets=2, rng=np.random.default_rng(0)).numpy()
    for place in range(len(groups)):
        begin = groups.first_row_G[place]
        rows = source.item_N[begin : begin + groups.num_rows_G[place]].tolist()
        drawn = [item for item in targets[place].tolist() if item != UNKNOWN]
        assert len(drawn) == min(2, len(rows))
        for item in set(drawn):
            assert drawn.count(item) <= rows.count(item)


def test_batches_cover_every_group_once(log: EventLog) -> None:
    groups = label_groups(log)
    rows = np.concatenate([part.first_row_G for part in in_order(groups, size=7)])
    assert rows.tolist() == groups.first_row_G.tolist()


def test_vocabulary_holds_training_items_only() -> None:
    log = _log([(1, 0, 4), (1, 1, 2), (1, 2, 9)])
    vocabulary = Vocabulary.of(log, split_ms=1)
    assert vocabulary.item_ids_V.tolist() == [2, 4]
    assert vocabulary.index_items(np.array([4, 9, 2])).tolist() == [2, UNKNOWN, 1]


def test_newest_keeps_the_newest_share(log: EventLog) -> None:
    groups = label_groups(log)
    kept = newest(groups, share=0.25)
    assert len(kept) >= len(groups) // 4
    left_out = np.setdiff1d(groups.first_row_G, kept.first_row_G)
    assert groups.time_ms_G[np.isin(groups.first_row_G, left_out)].max() < kept.time_ms_G.min()
    assert len(newest(groups, share=1.0)) == len(groups)


def test_empty_log_is_refused_with_the_next_command() -> None:
    columns = {name: column[:0] for name, column in made_up_columns(seed=1).items()}
    with pytest.raises(EmptyWindowError, match="moveline produce"):
        EventLog.from_columns(columns)


def test_missing_and_uneven_columns_are_named() -> None:
    columns = made_up_columns(seed=1)
    with pytest.raises(BadColumnsError, match="lacks ordinal"):
        EventLog.from_columns({k: v for k, v in columns.items() if k != "ordinal"})
    with pytest.raises(BadColumnsError, match="differ in length"):
        EventLog.from_columns({**columns, "item_id": columns["item_id"][:-1]})


def test_no_history_means_no_training() -> None:
    log = _log([(1, 0, 4), (2, 0, 2)])
    with pytest.raises(EmptyWindowError, match="two event times"):
        training_groups(log, label_groups(log), split_ms=split_time_ms(log))
