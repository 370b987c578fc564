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
# Of the events of a batch in training, padding included, at most this share is padding: examples
# of one batch have histories of similar length, and one that fits nowhere makes a smaller batch.
PADDING_SHARE_MAX = 0.2


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

    def history_lengths(self, groups: LabelGroups) -> Int64s:
        """Number of events in the streams of each group [B]."""
        lengths: Int64s = np.minimum(self._num_known(groups), self.num_recent + self.num_mid)
        return lengths

    def read_lengths(self, groups: LabelGroups) -> Int64s:
        """Number of events a batch holds of each group, the older ones counted [B]."""
        most = self.num_recent + self.num_mid + self.num_older
        lengths: Int64s = np.minimum(self._num_known(groups), most)
        return lengths

    def _num_known(self, groups: LabelGroups) -> Int64s:
        known: Int64s = groups.first_row_G - self.log.offsets[groups.user_G] - groups.num_late_G
        return known

    def streams(
        self, groups: LabelGroups, *, num_events: int | None = None
    ) -> tuple[Stream, Stream]:
        """The recent and the mid-term stream at each group.

        Ages count back from the newest event known then, not from the group's time: scoring must
        give the same answer however long after that event it is asked.

        Args:
            groups: What the streams lead up to.
            num_events: Make both streams together no longer than this, the oldest events go; one
                mid-term event stays in any case. As long as they can be if left out.
        """
        longest = self.num_recent + self.num_mid if num_events is None else num_events
        num_recent = max(1, min(longest, self.num_recent))
        # A stream of no events at all would be a special case for every model.
        num_mid = max(1, min(longest - num_recent, self.num_mid))
        rows, known = known_rows(self.log, groups, num_recent + num_mid)
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
        mid = Stream(*(_tensor(column[:, :num_mid]) for column in columns))
        recent = Stream(*(_tensor(column[:, num_mid:]) for column in columns))
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
        """Up to T items of each group, drawn without replacement; unknown items are 0.

        What is drawn of a group does not depend on the groups beside it.
        """
        longest = int(groups.num_rows_G.max())
        lane = np.arange(longest)[None, :]
        exists = lane < groups.num_rows_G[:, None]
        rows = np.where(exists, groups.first_row_G[:, None] + lane, 0)
        item = np.where(exists, self.item_N[rows], UNKNOWN)
        draw = np.where(item != UNKNOWN, _drawn(rows, rng), 2.0)
        order = np.argsort(draw, axis=1)[:, :num_targets]
        return _tensor(np.take_along_axis(item, order, axis=1))

    def batch(self, groups: LabelGroups, *, num_targets: int, rng: np.random.Generator) -> Batch:
        """Everything one training step needs, the streams as short as the groups allow."""
        longest = int(self.history_lengths(groups).max())
        recent, mid = self.streams(groups, num_events=longest)
        targets = self.targets(groups, num_targets=num_targets, rng=rng)
        return Batch(recent, mid, targets, self.older(groups))


@dataclass(frozen=True, slots=True)
class LabelExamples:
    """Label groups as the training loop takes them; an example is a group."""

    source: BatchSource
    groups: LabelGroups
    num_targets: int

    def lengths(self) -> Int64s:
        """Events known at each group, as many as a batch holds."""
        return self.source.read_lengths(self.groups)

    def batch(self, chosen: Int64s, rng: np.random.Generator) -> Batch:
        """The batch of the chosen groups."""
        groups = self.groups.select(chosen)
        return self.source.batch(groups, num_targets=self.num_targets, rng=rng)


def length_batches(lengths: Int64s, *, size: int, rng: np.random.Generator) -> list[Int64s]:
    """Every example once, in batches of at most `size` similarly long ones, in random order.

    Padded to the longest of its batch, an example is padded by PADDING_SHARE_MAX at most. How many
    batches there are follows from the lengths alone.
    """
    rung = np.searchsorted(_rungs(int(lengths.max(initial=1))), lengths)
    order = rng.permutation(len(lengths))
    order = order[np.argsort(rung[order], kind="stable")]
    begins = np.flatnonzero(np.diff(rung[order], prepend=-1))
    batches = [
        one
        for part in np.split(order, begins[1:])
        for one in np.split(part, np.arange(size, len(part), size))
    ]
    return [batches[place] for place in rng.permutation(len(batches))]


def _rungs(longest: int) -> Int64s:
    """Lengths l1, l2, ...: what is longer than one and not longer than the next goes together.

    >>> _rungs(30).tolist()
    [1, 2, 3, 5, 7, 10, 13, 17, 22, 28, 36]
    """
    rungs = [1]
    while rungs[-1] < longest:
        # Padding may be a share s of the padded length: the shortest, l + 1, is 1 - s of it.
        rungs.append(int((rungs[-1] + 1) / (1 - PADDING_SHARE_MAX)))
    return np.array(rungs, np.int64)


def _drawn(rows: Int64s, rng: np.random.Generator) -> NDArray[np.float64]:
    """A number in [0, 1) for each row, the same for the same row.

    Source: the finaliser of SplitMix64, Steele, Lea and Flood, OOPSLA 2014.
    """
    mixed = rows.astype(np.uint64) + rng.integers(2**63, dtype=np.uint64)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def in_order(groups: LabelGroups, *, size: int) -> Iterator[LabelGroups]:
    """Visit every group once, as they come, `size` at a time."""
    for begin in range(0, len(groups), size):
        yield groups.select(np.arange(begin, min(begin + size, len(groups))))


def _tensor(column: NDArray[np.int64] | NDArray[np.bool_]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(column))
