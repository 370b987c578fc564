"""The event log in columns, and the label groups cut out of it.

Legend: N events, U users, G label groups.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import BadColumnsError, EmptyWindowError

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Written where an event carries no dwell time; real dwell times are >= 0.
NO_DWELL_MS = -1
# The share of event times that training may see; the rest is the held-out window.
TRAIN_QUANTILE = 0.85


@dataclass(frozen=True, slots=True)
class EventLog:
    """All events, grouped by user and inside a user ordered by (event_time_ms, ordinal).

    Attributes:
        user_ids_U: The users, ascending.
        offsets: U + 1 row numbers; user u owns rows offsets[u]..offsets[u + 1].
        user_N: Index of the user of each row.
        domain_N: The 64-bit domain hash, its bits reinterpreted as int64.
    """

    user_ids_U: Int64s
    offsets: Int64s
    user_N: Int64s
    item_id_N: Int64s
    event_time_ms_N: Int64s
    ordinal_N: Int64s
    action_N: Int64s
    domain_N: Int64s
    dwell_ms_N: Int64s

    @property
    def num_events(self) -> int:
        """Number of rows."""
        return len(self.item_id_N)

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[Any]]) -> "EventLog":
        """Order plain columns into a log.

        Args:
            columns: user_id, item_id, event_time_ms and ordinal (per user, by arrival);
                optionally action, domain (uint64 hash), dwell_ms (null or NaN for none).

        Raises:
            BadColumnsError: A column is missing or its length differs.
            EmptyWindowError: There are no rows.
        """
        _refuse_bad_columns(columns)
        num_events = len(columns["item_id"])
        user_id = columns["user_id"].astype(np.int64)
        time_ms = columns["event_time_ms"].astype(np.int64)
        ordinal = columns["ordinal"].astype(np.int64)
        order = np.lexsort((ordinal, time_ms, user_id))
        user_ids, user, counts = np.unique(user_id[order], return_inverse=True, return_counts=True)
        zeros = np.zeros(num_events, np.int64)
        domain = columns["domain"].astype(np.uint64) if "domain" in columns else zeros
        return cls(
            user_ids_U=user_ids,
            offsets=np.concatenate(([0], np.cumsum(counts))).astype(np.int64),
            user_N=user.astype(np.int64),
            item_id_N=columns["item_id"].astype(np.int64)[order],
            event_time_ms_N=time_ms[order],
            ordinal_N=ordinal[order],
            action_N=columns.get("action", zeros).astype(np.int64)[order],
            domain_N=domain.view(np.int64)[order],
            dwell_ms_N=_dwell_or_none(columns.get("dwell_ms"), num_events)[order],
        )


def _refuse_bad_columns(columns: Mapping[str, NDArray[Any]]) -> None:
    needed = ("user_id", "item_id", "event_time_ms", "ordinal")
    missing = [name for name in needed if name not in columns]
    if missing:
        msg = f"the event log lacks {', '.join(missing)}; it has {', '.join(columns) or 'nothing'}"
        raise BadColumnsError(msg)
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) != 1:
        msg = f"the columns of the event log differ in length: {lengths}"
        raise BadColumnsError(msg)
    if lengths["item_id"] == 0:
        msg = "the event log has no rows; publish events first: moveline produce --help"
        raise EmptyWindowError(msg)


def _dwell_or_none(column: NDArray[Any] | None, num_events: int) -> Int64s:
    if column is None:
        return np.full(num_events, NO_DWELL_MS, np.int64)
    if column.dtype.kind == "f":
        return np.where(np.isnan(column), NO_DWELL_MS, np.nan_to_num(column)).astype(np.int64)
    return column.astype(np.int64)


@dataclass(frozen=True, slots=True)
class LabelGroups:
    """All events of one user at one time, to be predicted together.

    What may be known at a group are the rows before `first_row_G` of the same user whose
    ordinal is smaller than `first_ordinal_G`; `num_late_G` rows arrived after it and are left out.
    """

    first_row_G: Int64s
    num_rows_G: Int64s
    user_G: Int64s
    time_ms_G: Int64s
    first_ordinal_G: Int64s
    num_late_G: Int64s

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.first_row_G)

    def select(self, index: Int64s | Bools) -> "LabelGroups":
        """Keep the groups of an index or a mask."""
        return LabelGroups(
            first_row_G=self.first_row_G[index],
            num_rows_G=self.num_rows_G[index],
            user_G=self.user_G[index],
            time_ms_G=self.time_ms_G[index],
            first_ordinal_G=self.first_ordinal_G[index],
            num_late_G=self.num_late_G[index],
        )


def label_groups(log: EventLog) -> LabelGroups:
    """Every (user, time) of the log, in row order."""
    new_user = np.diff(log.user_N, prepend=-1) != 0
    new_time = np.diff(log.event_time_ms_N, prepend=log.event_time_ms_N[0] - 1) != 0
    first_row = np.flatnonzero(new_user | new_time).astype(np.int64)
    first_ordinal = np.minimum.reduceat(log.ordinal_N, first_row)
    user = log.user_N[first_row]
    return LabelGroups(
        first_row_G=first_row,
        num_rows_G=np.diff(first_row, append=log.num_events),
        user_G=user,
        time_ms_G=log.event_time_ms_N[first_row],
        first_ordinal_G=first_ordinal,
        num_late_G=_count_late(log, first_row, user, first_ordinal),
    )


def _count_late(log: EventLog, first_row: Int64s, user: Int64s, first_ordinal: Int64s) -> Int64s:
    """Rows before each group, of its user, that arrived after the group's first arrival."""
    # A running maximum per user: users are shifted apart so that one pass serves all of them.
    span = int(log.ordinal_N.max()) + 1
    highest = np.maximum.accumulate(log.ordinal_N + log.user_N * span) - log.user_N * span
    begin = log.offsets[user]
    before = np.where(first_row > begin, highest[np.maximum(first_row - 1, 0)], -1)
    late = np.zeros(len(first_row), np.int64)
    # Late arrivals are rare, so this loop runs over the few groups that have any.
    for group in np.flatnonzero(before >= first_ordinal):
        rows = log.ordinal_N[begin[group] : first_row[group]]
        late[group] = np.count_nonzero(rows >= first_ordinal[group])
    return late


def split_time_ms(log: EventLog, *, quantile: float = TRAIN_QUANTILE) -> int:
    """The last millisecond of training; labels after it are held out."""
    return int(np.quantile(log.event_time_ms_N, quantile))


def training_groups(log: EventLog, groups: LabelGroups, *, split_ms: int) -> LabelGroups:
    """The groups training may learn from: inside its window and with something before them.

    Raises:
        EmptyWindowError: There are none.
    """
    has_history = groups.first_row_G - groups.num_late_G > log.offsets[groups.user_G]
    chosen = groups.select((groups.time_ms_G <= split_ms) & has_history)
    if len(chosen) == 0:
        msg = (
            f"no user has two event times up to {split_ms} ms, so there is nothing to learn from; "
            "check the log: moveline lake"
        )
        raise EmptyWindowError(msg)
    return chosen


def newest(groups: LabelGroups, *, share: float) -> LabelGroups:
    """The newest share of the groups, in their old order; at least one."""
    oldest = np.quantile(groups.time_ms_G, 1.0 - share, method="lower")
    return groups.select(groups.time_ms_G >= oldest)
