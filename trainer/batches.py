"""Label groups as training tensors, without a loop over events.

Legend: B groups of a batch, R recent events, M mid-term events, O older events, T targets.
Streams are padded at the front: the newest event is always last.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.history import known_rows
from trainer.dataset import Bools, EventLog, Int64s, LabelGroups
from trainer.vocabulary import UNKNOWN, Vocabulary

# Stream lengths of a small machine: together the 512 newest events.
NUM_RECENT = 64
NUM_MID = 448
# What stands for an item id where there is no event; real ids are >= 0.
PADDING = -1
# Targets drawn from one group; half of all baskets have fewer lines than that.
NUM_TARGETS = 16


class Stream(NamedTuple):
    """One stream of B users, each tensor [B, events]; `mask` is True on real events."""

    item: Tensor
    age_ms: Tensor
    domain: Tensor
    action: Tensor
    dwell_ms: Tensor
    mask: Tensor


class OldEvents(NamedTuple):
    """What lies before the mid-term stream, raw as stored, int64 [B, events], oldest first.

    `item` is PADDING where there is no event, `domain` the hash with its bits read as signed.
    """

    item: Tensor
    action: Tensor
    domain: Tensor
    dwell_ms: Tensor
    event_time_ms: Tensor


class Batch(NamedTuple):
    """Streams as known at each label, and the dense items that came (0 where none is left)."""

    recent: Stream
    mid: Stream
    targets_BT: Tensor
    older: OldEvents | None = None


@dataclass(frozen=True, slots=True)
class BatchSource:
    """Cuts batches out of a log; the dense columns are computed once."""

    log: EventLog
    item_N: Int64s
    domain_N: Int64s
    num_recent: int
    num_mid: int
    num_older: int = 0

    @classmethod
    def of(
        cls,
        log: EventLog,
        vocabulary: Vocabulary,
        *,
        num_recent: int = NUM_RECENT,
        num_mid: int = NUM_MID,
        num_older: int = 0,
    ) -> "BatchSource":
        """Prepare the columns of a log for a vocabulary.

        Args:
            log: The events.
            vocabulary: Gives items and domains their dense index.
            num_recent: Length of the recent stream.
            num_mid: Length of the mid-term stream.
            num_older: Events before them that a label sees at most; 0 for models without a
                lifelong stream.
        """
        return cls(
            log=log,
            item_N=vocabulary.index_items(log.item_id_N),
            domain_N=vocabulary.index_domains(log.domain_N),
            num_recent=num_recent,
            num_mid=num_mid,
            num_older=num_older,
        )

    def history_rows(self, groups: LabelGroups) -> tuple[Int64s, Bools]:
        """Rows known at each group [B, M + R], newest last, and which of them exist."""
        return known_rows(self.log, groups, self.num_recent + self.num_mid)

    def streams(self, groups: LabelGroups) -> tuple[Stream, Stream]:
        """The recent and the mid-term stream at each group.

        Ages count back from the newest event known then, not from the group's time: scoring must
        give the same answer however long after that event it is asked.
        """
        rows, known = self.history_rows(groups)
        time_ms = self.log.event_time_ms_N[rows]
        age = time_ms[:, -1:] - time_ms
        columns = (
            np.where(known, self.item_N[rows], UNKNOWN),
            np.where(known, age, 0),
            np.where(known, self.domain_N[rows], UNKNOWN),
            np.where(known, self.log.action_N[rows], 0),
            np.where(known, self.log.dwell_ms_N[rows], 0),
            known,
        )
        mid = Stream(*(_tensor(column[:, : self.num_mid]) for column in columns))
        recent = Stream(*(_tensor(column[:, self.num_mid :]) for column in columns))
        return recent, mid

    def older(self, groups: LabelGroups) -> OldEvents | None:
        """Events before both streams at each group, None for a source without any.

        A longer past is thinned to `num_older` events at even distances: the state is read as a
        mean, so that the thinned past estimates the whole one, its oldest part included.
        """
        if self.num_older == 0:
            return None
        window, known = self.history_rows(groups)
        oldest = self.log.offsets[groups.user_G]
        num_old = np.where(known[:, 0], window[:, 0] - oldest, 0)
        num_kept = np.minimum(num_old, self.num_older)
        # Right-aligned, so that the newest old event is last for everyone; never without a column.
        lane = np.arange(-max(1, int(num_kept.max(initial=0))), 0)[None, :] + num_kept[:, None]
        rows = oldest[:, None] + lane * num_old[:, None] // num_kept.clip(min=1)[:, None]
        rows = rows.clip(min=0)
        held = (lane >= 0) & (self.log.ordinal_N[rows] < groups.first_ordinal_G[:, None])
        columns = (
            np.where(held, self.log.item_id_N[rows], PADDING),
            np.where(held, self.log.action_N[rows], 0),
            np.where(held, self.log.domain_N[rows], 0),
            np.where(held, self.log.dwell_ms_N[rows], 0),
            np.where(held, self.log.event_time_ms_N[rows], 0),
        )
        return OldEvents(*(_tensor(column) for column in columns))

    def targets(self, groups: LabelGroups, *, num_targets: int, rng: np.random.Generator) -> Tensor:
        """Up to T items of each group, drawn without replacement; unknown items are 0."""
        longest = int(groups.num_rows_G.max())
        lane = np.arange(longest)[None, :]
        exists = lane < groups.num_rows_G[:, None]
        rows = np.where(exists, groups.first_row_G[:, None] + lane, 0)
        item = np.where(exists, self.item_N[rows], UNKNOWN)
        draw = np.where(item != UNKNOWN, rng.random(item.shape), 2.0)
        order = np.argsort(draw, axis=1)[:, :num_targets]
        return _tensor(np.take_along_axis(item, order, axis=1))

    def batch(self, groups: LabelGroups, *, num_targets: int, rng: np.random.Generator) -> Batch:
        """Everything one training step needs."""
        recent, mid = self.streams(groups)
        targets = self.targets(groups, num_targets=num_targets, rng=rng)
        return Batch(recent, mid, targets, self.older(groups))


def shuffled(groups: LabelGroups, *, size: int, rng: np.random.Generator) -> Iterator[LabelGroups]:
    """Visit every group once, in random order, `size` at a time; the last part may be smaller."""
    order = rng.permutation(len(groups))
    for begin in range(0, len(order), size):
        yield groups.select(order[begin : begin + size])


def in_order(groups: LabelGroups, *, size: int) -> Iterator[LabelGroups]:
    """Visit every group once, as they come, `size` at a time."""
    for begin in range(0, len(groups), size):
        yield groups.select(np.arange(begin, min(begin + size, len(groups))))


def _tensor(column: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column))
