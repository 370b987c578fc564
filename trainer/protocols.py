"""Which labels are learned from, tuned on and judged, and what may be known at each.

Two protocols. The global split cuts time once: weights, item tables and vocabulary know the events
up to the tuning window, early stopping and calibration look at the tuning window, and the window
after the split is judged; every judged label exists twice, with the state of its own moment (live)
and with the state of the split (frozen), as a nightly batch would have it. Leave-one-out holds back
each user's last event for judging and the one before for tuning, whatever their times: the
protocol of the literature, in which weights know other users' later events.

Legend: N events, G labels, U users.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from features.history import labels_at
from trainer.dataset import (
    TRAIN_QUANTILE,
    Bools,
    EventLog,
    LabelGroups,
    label_groups,
    split_time_ms,
    training_groups,
)
from trainer.errors import EmptyWindowError
from trainer.evaluate import held_out_groups, tuning_groups

if TYPE_CHECKING:
    from numpy.typing import NDArray

ProtocolName = Literal["global", "leave_one_out"]
# The share of event times that weights and tables may know; up to TRAIN_QUANTILE it is tuned on.
FIT_QUANTILE = 0.83
# Labels of the tuning window that weigh the model and the live sources, at most; drawn by seed.
CALIBRATION_USERS = 800
CALIBRATION_TIMES_PER_USER = 2
# A user needs that many events: one to know, one to tune on, one to judge.
SHORTEST_HISTORY = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """How many labels are tuned on and judged; drawn by seed, the same for every model."""

    test_users: int = 600
    test_times_per_user: int = 12
    tune_users: int = 200
    tune_times_per_user: int = 2
    seed: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A log and its labels under one protocol.

    Attributes:
        log: All events; every label points into it.
        fitted: The events that weights, item tables and vocabulary may know.
        live: The judged labels, each with what was known at its moment.
        frozen: The same labels with what was known at the split; None where time is not split.
        calibrate: More labels of the tuning window, for the weights of the live sources.
        split_ms: The split; None where time is not split.
    """

    log: EventLog
    fitted: EventLog
    learn: LabelGroups
    tune: LabelGroups
    calibrate: LabelGroups
    live: LabelGroups
    frozen: LabelGroups | None
    split_ms: int | None


def global_split(
    log: EventLog,
    sample: Sample,
    *,
    judged_N: Bools | None = None,
    fitted_events: int | None = None,
) -> Task:
    """Cut time into what is learned, tuned on and judged.

    Args:
        log: All events.
        sample: Bounds of what is tuned on and judged.
        judged_N: Where given, only labels whose first event is marked are judged.
        fitted_events: Item tables and vocabulary know the newest so many events; None is all.

    Raises:
        EmptyWindowError: One of the windows has no labels.
    """
    groups = label_groups(log)
    fit_ms = split_time_ms(log, quantile=FIT_QUANTILE)
    split_ms = split_time_ms(log, quantile=TRAIN_QUANTILE)
    candidates = groups if judged_N is None else groups.select(judged_N[groups.first_row_G])
    live = held_out_groups(
        log,
        candidates,
        split_ms=split_ms,
        seed=sample.seed,
        max_users=sample.test_users,
        max_groups_per_user=sample.test_times_per_user,
    )
    window = candidates.select(candidates.time_ms_G <= split_ms)
    tune, calibrate = (
        tuning_groups(
            log,
            window,
            split_ms=fit_ms,
            seed=sample.seed,
            max_users=max_users,
            max_groups_per_user=max_times,
        )
        for max_users, max_times in (
            (sample.tune_users, sample.tune_times_per_user),
            (CALIBRATION_USERS, CALIBRATION_TIMES_PER_USER),
        )
    )
    at_split = np.full(len(live), split_ms + 1)
    return Task(
        log=log,
        fitted=rows_of(log, _fitted(log, fit_ms, fitted_events)),
        learn=training_groups(log, groups, split_ms=fit_ms),
        tune=tune,
        calibrate=calibrate,
        live=live,
        frozen=labels_at(log, log.user_ids_U[live.user_G], at_split),
        split_ms=split_ms,
    )


def _fitted(log: EventLog, fit_ms: int, num_events: int | None) -> Bools:
    """Which events item tables and vocabulary may know."""
    time_ms = log.event_time_ms_N
    known_N: Bools = time_ms <= fit_ms
    if num_events is not None and known_N.sum() > num_events:
        oldest_ms = np.partition(time_ms[known_N], -num_events)[-num_events]
        known_N &= time_ms >= oldest_ms
    return known_N


def leave_one_out(log: EventLog, sample: Sample) -> Task:
    """Hold back the last event of each user for judging and the one before for tuning.

    Raises:
        EmptyWindowError: No user has enough events.
    """
    labels = each_event(log)
    length_U = np.diff(log.offsets)
    to_come_N = log.offsets[log.user_N + 1] - np.arange(log.num_events)
    enough_N = length_U[log.user_N] >= SHORTEST_HISTORY
    if not enough_N.any():
        raise EmptyWindowError(
            f"no user has {SHORTEST_HISTORY} events, but one is needed to learn from, one to tune "
            "on and one to judge; use the global protocol"
        )
    has_past_N = np.arange(log.num_events) > log.offsets[log.user_N]
    last_N = enough_N & (to_come_N == 1)
    second_last_N = enough_N & (to_come_N == 2)  # noqa: PLR2004 - the last but one
    held_back_N = last_N | second_last_N
    rng = np.random.default_rng(sample.seed)
    drawn = rng.permutation(np.flatnonzero(second_last_N))
    tune, calibrate = drawn[: sample.tune_users], drawn[:CALIBRATION_USERS]
    return Task(
        log=log,
        fitted=rows_of(log, ~held_back_N),
        learn=labels.select(has_past_N & ~held_back_N),
        tune=labels.select(np.sort(tune)),
        calibrate=labels.select(np.sort(calibrate)),
        live=labels.select(last_N),
        frozen=None,
        split_ms=None,
    )


def each_event(log: EventLog) -> LabelGroups:
    """Every event as a label of its own, with the rows before it known, of its own time too."""
    rows = np.arange(log.num_events)
    return LabelGroups(
        first_row_G=rows,
        num_rows_G=np.ones_like(rows),
        user_G=log.user_N,
        time_ms_G=log.event_time_ms_N,
        first_ordinal_G=log.ordinal_N,
        num_late_G=np.zeros_like(rows),
    )


def rows_of(log: EventLog, chosen_N: Bools) -> EventLog:
    """The chosen events as a log of their own.

    Raises:
        EmptyWindowError: None are chosen.
    """
    columns: dict[str, NDArray[Any]] = {
        "user_id": log.user_ids_U[log.user_N],
        "item_id": log.item_id_N,
        "event_time_ms": log.event_time_ms_N,
        "ordinal": log.ordinal_N,
        "action": log.action_N,
        "domain": log.domain_N.view(np.uint64),
        "dwell_ms": log.dwell_ms_N,
        "value": log.value_N,
    }
    return EventLog.from_columns({name: column[chosen_N] for name, column in columns.items()})
