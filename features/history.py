"""Users' events in columns, and what of them may be known at a label.

Legend: N events, U users, G labels, W events of a window.

A label is a user and a time. Known at it are the events before its time that had arrived before
it: those with an ordinal below the label's. Where events of the user stand at exactly that time
(they are what is to be predicted), the label's ordinal is that of the first of them to arrive;
otherwise that of the first arrival dated later. A late event is thus known only to labels that
arrived after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Mapping

Int64s = NDArray[np.int64]
Bools = NDArray[np.bool_]
Float32s = NDArray[np.float32]

# Written where an event carries no dwell time; real dwell times are >= 0.
NO_DWELL_MS = -1


@dataclass(frozen=True, slots=True)
class History:
    """All events of some users, grouped by user and inside a user by (event_time_ms, ordinal).

    Attributes:
        user_ids_U: The users, ascending.
        offsets: U + 1 row numbers; user u owns rows offsets[u]..offsets[u + 1].
        user_N: Index of the user of each row.
        domain_N: The 64-bit domain hash, its bits reinterpreted as int64.
        value_N: NaN for none.
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
    value_N: Float32s

    @property
    def num_events(self) -> int:
        """Number of rows."""
        return len(self.item_id_N)

    @property
    def next_ordinals(self) -> Int64s:
        """What each user's next event would get [U]; after a forget not the number of rows."""
        return np.maximum.reduceat(self.ordinal_N, self.offsets[:-1]) + 1

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[Any]]) -> Self:
        """Order plain columns of equal length, at least one row.

        Args:
            columns: user_id, item_id, event_time_ms and ordinal (per user, by arrival);
                optionally action, domain (uint64 hash), dwell_ms and value (null or NaN for none).
        """
        num_events = len(columns["item_id"])
        user_id = columns["user_id"].astype(np.int64)
        time_ms = columns["event_time_ms"].astype(np.int64)
        ordinal = columns["ordinal"].astype(np.int64)
        order = np.lexsort((ordinal, time_ms, user_id))
        user_ids, user, counts = np.unique(user_id[order], return_inverse=True, return_counts=True)
        zeros = np.zeros(num_events, np.int64)
        domain = columns["domain"].astype(np.uint64) if "domain" in columns else zeros
        value = columns.get("value", np.full(num_events, np.nan, np.float32))
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
            value_N=value.astype(np.float32)[order],
        )


def _dwell_or_none(column: NDArray[Any] | None, num_events: int) -> Int64s:
    if column is None:
        return np.full(num_events, NO_DWELL_MS, np.int64)
    if column.dtype.kind == "f":
        return np.where(np.isnan(column), NO_DWELL_MS, np.nan_to_num(column)).astype(np.int64)
    return column.astype(np.int64)


@dataclass(frozen=True, slots=True)
class LabelGroups:
    """Labels: all events of one user at one time, to be predicted together; none is possible.

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

    def select(self, index: Int64s | Bools | slice) -> LabelGroups:
        """Keep the groups of an index, a mask or a slice."""
        return LabelGroups(
            first_row_G=self.first_row_G[index],
            num_rows_G=self.num_rows_G[index],
            user_G=self.user_G[index],
            time_ms_G=self.time_ms_G[index],
            first_ordinal_G=self.first_ordinal_G[index],
            num_late_G=self.num_late_G[index],
        )


def label_groups(log: History) -> LabelGroups:
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


def labels_at(
    log: History, user_id_G: Int64s, time_ms_G: Int64s, ordinal_G: Int64s | None = None
) -> LabelGroups:
    """The labels of users of the log at any times, in the order given.

    Args:
        log: the events.
        user_id_G: ids that are in `log.user_ids_U`.
        time_ms_G: what happens at or after it is not known.
        ordinal_G: what arrived from it on is not known; found from the time if left out.
    """
    user = np.searchsorted(log.user_ids_U, user_id_G).astype(np.int64)
    first_row = _rows_at(log, user, time_ms_G)
    after = _rows_at(log, user, time_ms_G + 1)
    ordinal = _arrivals_at(log, user, first_row, after) if ordinal_G is None else ordinal_G
    return LabelGroups(
        first_row_G=first_row,
        num_rows_G=after - first_row,
        user_G=user,
        time_ms_G=time_ms_G,
        first_ordinal_G=ordinal,
        num_late_G=_count_late(log, first_row, user, ordinal),
    )


def _rows_at(log: History, user_G: Int64s, time_ms_G: Int64s) -> Int64s:
    """Return each user's first row at or after a time; where the next user begins if none is."""
    # Times as ranks, so that (user, time) fits one integer and one search serves all users.
    times, rank_N = np.unique(log.event_time_ms_N, return_inverse=True)
    rank_G = np.searchsorted(times, time_ms_G)
    width = len(times) + 1
    rows = np.searchsorted(log.user_N * width + rank_N, user_G * width + rank_G)
    return rows.astype(np.int64)


def _arrivals_at(log: History, user_G: Int64s, first_row_G: Int64s, after_G: Int64s) -> Int64s:
    """Return the ordinal of the first arrival at each label's time, or else after it."""
    # Users are shifted apart, so that a running minimum from the end starts anew with each.
    span = int(log.ordinal_N.max()) + 1
    shift = log.user_N * span
    lowest = np.minimum.accumulate((log.ordinal_N + shift)[::-1])[::-1] - shift
    is_inside = first_row_G < log.offsets[user_G + 1]
    later = np.where(is_inside, np.append(lowest, 0)[first_row_G], log.next_ordinals[user_G])
    at = np.flatnonzero(after_G > first_row_G)
    if at.size:
        # Pairs of (first, after); what lies between two labels is computed and not looked at.
        edges = np.stack((first_row_G[at], after_G[at]), axis=1).ravel()
        later[at] = np.minimum.reduceat(np.append(log.ordinal_N, span), edges)[::2]
    return later


def _count_late(log: History, first_row: Int64s, user: Int64s, first_ordinal: Int64s) -> Int64s:
    """Rows before each label, of its user, that arrived after it."""
    # A running maximum per user: users are shifted apart so that one pass serves all of them.
    span = int(log.ordinal_N.max()) + 1
    highest = np.maximum.accumulate(log.ordinal_N + log.user_N * span) - log.user_N * span
    begin = log.offsets[user]
    before = np.where(first_row > begin, highest[np.maximum(first_row - 1, 0)], -1)
    late = np.zeros(len(first_row), np.int64)
    # Late arrivals are rare, so this loop runs over the few labels that have any.
    for group in np.flatnonzero(before >= first_ordinal):
        rows = log.ordinal_N[begin[group] : first_row[group]]
        late[group] = np.count_nonzero(rows >= first_ordinal[group])
    return late


def known_rows(log: History, labels: LabelGroups, width: int) -> tuple[Int64s, Bools]:
    """Return the newest rows known at each label [G, W], newest last, and which of them exist."""
    slack = int(labels.num_late_G.max(initial=0))
    rows = labels.first_row_G[:, None] + np.arange(-width - slack, 0)[None, :]
    known = rows >= log.offsets[labels.user_G][:, None]
    rows = np.maximum(rows, 0)
    if slack:
        known &= log.ordinal_N[rows] < labels.first_ordinal_G[:, None]
        # A stable sort on the mask moves what is left out to the front, order kept.
        order = np.argsort(known, axis=1, kind="stable")[:, -width:]
        rows = np.take_along_axis(rows, order, axis=1)
        known = np.take_along_axis(known, order, axis=1)
    return rows, known
