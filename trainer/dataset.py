"""What training takes of a log: the labels inside its window. features/history.py cuts them."""

from collections.abc import Mapping
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from features.history import Bools, History, Int64s, LabelGroups, label_groups
from trainer.errors import BadColumnsError, EmptyWindowError

__all__ = [
    "Bools",
    "EventLog",
    "Int64s",
    "LabelGroups",
    "label_groups",
    "newest",
    "split_time_ms",
    "training_groups",
]

# The share of event times that training may see; the rest is the held-out window.
TRAIN_QUANTILE = 0.85


class EventLog(History):
    """All events, grouped by user and inside a user ordered by (event_time_ms, ordinal)."""

    __slots__ = ()

    @classmethod
    def from_columns(cls, columns: Mapping[str, NDArray[Any]]) -> Self:
        """Order plain columns into a log.

        Args:
            columns: see `History.from_columns`.

        Raises:
            BadColumnsError: A column is missing or its length differs.
            EmptyWindowError: There are no rows.
        """
        _refuse_bad_columns(columns)
        return super().from_columns(columns)


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
