"""Dense indices for the item and domain ids of the training window. Legend: V items."""

from dataclasses import dataclass

import numpy as np

from trainer.dataset import EventLog, Int64s
from trainer.errors import EmptyWindowError

# Index 0 stands for padding and for every id that training never saw.
UNKNOWN = 0


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """Ids seen in the training window, ascending; the id at place i has dense index i + 1."""

    item_ids_V: Int64s
    domain_ids: Int64s

    @property
    def num_items(self) -> int:
        """Number of items, the unknown one not counted."""
        return len(self.item_ids_V)

    @classmethod
    def of(cls, log: EventLog, *, split_ms: int) -> "Vocabulary":
        """Collect the ids of all events up to the split.

        Raises:
            EmptyWindowError: No event is that old.
        """
        seen = log.event_time_ms_N <= split_ms
        if not seen.any():
            msg = f"no event is dated up to {split_ms} ms, so there is no item to learn"
            raise EmptyWindowError(msg)
        return cls(np.unique(log.item_id_N[seen]), np.unique(log.domain_N[seen]))

    def index_items(self, item_ids: Int64s) -> Int64s:
        """Dense index of each id, UNKNOWN for ids of no training event."""
        return index_of(self.item_ids_V, item_ids)

    def index_domains(self, domain_ids: Int64s) -> Int64s:
        """Dense index of each domain hash, UNKNOWN for new ones."""
        return index_of(self.domain_ids, domain_ids)


def index_of(sorted_ids: Int64s, ids: Int64s) -> Int64s:
    """Place of each id in `sorted_ids` plus one, or 0.

    >>> index_of(np.array([3, 7]), np.array([7, 5, 3])).tolist()
    [2, 0, 1]
    """
    place = np.searchsorted(sorted_ids, ids).clip(max=len(sorted_ids) - 1)
    return np.where(sorted_ids[place] == ids, place + 1, UNKNOWN).astype(np.int64)


def item_counts(log: EventLog, vocabulary: Vocabulary, *, until_ms: int) -> Int64s:
    """Events of each item up to a time [V]."""
    item = vocabulary.index_items(log.item_id_N[log.event_time_ms_N <= until_ms])
    return np.bincount(item, minlength=vocabulary.num_items + 1)[1:].astype(np.int64)


def item_users(
    log: EventLog, vocabulary: Vocabulary, *, until_ms: int, from_ms: int | None = None
) -> Int64s:
    """Users who met each item up to a time, or between two [V]."""
    known = log.event_time_ms_N <= until_ms
    if from_ms is not None:
        known &= log.event_time_ms_N >= from_ms
    item = vocabulary.index_items(log.item_id_N[known])
    width = vocabulary.num_items + 1
    once = np.unique(log.user_N[known] * width + item)
    return np.bincount(once % width, minlength=width)[1:].astype(np.int64)
