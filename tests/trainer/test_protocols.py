"""Nothing that is judged is learned from, and the frozen state knows nothing after the split."""

import numpy as np
import pytest

from features.history import known_rows
from trainer.dataset import EventLog, label_groups
from trainer.errors import EmptyWindowError
from trainer.protocols import Sample, Task, each_event, global_split, leave_one_out, rows_of

SAMPLE = Sample(test_users=6, test_times_per_user=5, tune_users=8, tune_times_per_user=5)


@pytest.fixture(scope="module")
def split(log: EventLog) -> Task:
    return global_split(log, SAMPLE)


def test_the_windows_follow_each_other(split: Task) -> None:
    fitted_until = int(split.fitted.event_time_ms_N.max())
    assert split.learn.time_ms_G.max() <= fitted_until < split.tune.time_ms_G.min()
    assert split.split_ms is not None
    assert split.tune.time_ms_G.max() <= split.split_ms < split.live.time_ms_G.min()


def test_the_judged_are_a_bounded_sample(split: Task) -> None:
    users, times = np.unique(split.live.user_G, return_counts=True)
    assert len(users) == SAMPLE.test_users
    assert times.max() <= SAMPLE.test_times_per_user
    again = global_split(split.log, SAMPLE)
    assert again.live.first_row_G.tolist() == split.live.first_row_G.tolist()


def test_frozen_knows_the_split_and_live_the_moment_before(split: Task, log: EventLog) -> None:
    assert split.frozen is not None
    assert split.frozen.user_G.tolist() == split.live.user_G.tolist()
    rows, known = known_rows(log, split.frozen, 64)
    assert known.any()
    assert (log.event_time_ms_N[rows[known]] <= split.split_ms).all()
    newest = log.event_time_ms_N[rows[:, -1]]
    rows, known = known_rows(log, split.live, 64)
    assert (log.event_time_ms_N[rows] < split.live.time_ms_G[:, None])[known].all()
    assert (log.event_time_ms_N[rows[:, -1]] > newest).any()
    # What was known at the split is all there was: the newest event up to it.
    for group, user in enumerate(split.frozen.user_G):
        own = log.event_time_ms_N[log.user_N == user]
        assert newest[group] == own[own <= split.split_ms].max()


def test_only_marked_labels_are_judged(log: EventLog) -> None:
    marked = log.user_N != 2
    task = global_split(log, SAMPLE, judged_N=marked)
    for groups in (task.live, task.tune):
        assert marked[groups.first_row_G].all()
    assert not marked[task.learn.first_row_G].all()


def test_tables_may_be_bound_to_the_newest_events(log: EventLog, split: Task) -> None:
    bound = global_split(log, SAMPLE, fitted_events=40)
    assert 40 <= bound.fitted.num_events < split.fitted.num_events
    assert bound.fitted.event_time_ms_N.max() == split.fitted.event_time_ms_N.max()
    kept = bound.fitted.event_time_ms_N.min()
    assert (split.fitted.event_time_ms_N >= kept).sum() == bound.fitted.num_events


def test_leave_one_out_holds_back_the_last_two(log: EventLog) -> None:
    task = leave_one_out(log, Sample(tune_users=3))
    last = log.offsets[1:] - 1
    assert task.live.first_row_G.tolist() == last.tolist()
    assert set(task.tune.first_row_G.tolist()) <= set((last - 1).tolist())
    assert len(task.tune) == 3
    assert not set(task.learn.first_row_G.tolist()) & {*last.tolist(), *(last - 1).tolist()}
    assert task.fitted.num_events == log.num_events - 2 * len(last)
    assert task.frozen is None
    rows, known = known_rows(log, task.live, 1)
    assert known.all()
    assert rows[:, 0].tolist() == (last - 1).tolist()


def test_short_histories_are_refused(log: EventLog) -> None:
    first_two = np.arange(log.num_events) - log.offsets[log.user_N] < 2
    with pytest.raises(EmptyWindowError, match="no user has 3 events"):
        leave_one_out(rows_of(log, first_two), SAMPLE)


def test_rows_keep_every_column(log: EventLog) -> None:
    part = rows_of(log, log.user_N == 2)
    own = log.user_N == 2
    assert part.user_ids_U.tolist() == [log.user_ids_U[2]]
    for name in ("item_id_N", "event_time_ms_N", "ordinal_N", "action_N", "domain_N"):
        assert getattr(part, name).tolist() == getattr(log, name)[own].tolist(), name
    assert len(each_event(part)) == part.num_events >= len(label_groups(part))
