"""What live sources said at any time of a log, counted as the near-line app counts.

A label is told what was counted before its time. Popularity is renewed each minute (in service
every ten seconds), what follows an item at once (in service within seconds). Events count at their
own time: one that came late is known a little early here, which service cannot do.

Legend: N events, P pairs of an item and one that followed it, I items of the log, G labels,
S sources, K places of a list.
"""

from dataclasses import dataclass, field
from typing import Self

import numpy as np
from numpy.typing import NDArray

from features.history import known_rows
from features.sources import (
    FOLLOWERS_HALF_LIVES_KEPT,
    HOUR_MS,
    NO_COUNTED,
    NUM_COUNTED,
    NUM_STEPS,
    SOURCES,
    Counted,
    followers_half_life_h,
    popularity_hours,
)
from trainer.dataset import EventLog, Int64s, LabelGroups

Float64s = NDArray[np.float64]
Int32s = NDArray[np.int32]
# Item ids, best first, and their shares.
Listed = tuple[Int64s, Float64s]

RENEWED_MS = 60_000
# Decimals that a sum of weights is rounded to before it is ranked: sums made in another order tie.
DECIMALS = 6
# Items of a popularity list that are kept for the next label of the same minute.
KEPT = 300
_NOTHING: Listed = (np.zeros(0, np.int64), np.zeros(0))


@dataclass(frozen=True, slots=True)
class Popularity:
    """How often each item was met lately, at any time of a log.

    Attributes:
        time_ms_N, item_N: Events in the order of time, items as places in `item_ids_I`.
    """

    item_ids_I: Int64s
    time_ms_N: Int64s
    item_N: Int64s
    half_life_h: int
    renewed: dict[int, Listed] = field(default_factory=dict)

    @classmethod
    def of(cls, log: EventLog, half_life_h: int) -> Self:
        """Put the events in the order of time."""
        item_ids_I, item_N = np.unique(log.item_id_N, return_inverse=True)
        order = np.argsort(log.event_time_ms_N, kind="stable")
        return cls(item_ids_I, log.event_time_ms_N[order], item_N[order], half_life_h)

    def at(self, time_ms: int) -> Listed:
        """The most popular items as last renewed before a time, at most KEPT."""
        number = time_ms // RENEWED_MS
        if number not in self.renewed:
            self.renewed[number] = self._counted(number * RENEWED_MS)
        return self.renewed[number]

    def _counted(self, now_ms: int) -> Listed:
        hour = now_ms // HOUR_MS
        oldest_ms = (hour - popularity_hours(self.half_life_h) + 1) * HOUR_MS
        begin, end = np.searchsorted(self.time_ms_N, (oldest_ms, now_ms))
        hours_ago = hour - self.time_ms_N[begin:end] // HOUR_MS
        weight = 0.5 ** (hours_ago / self.half_life_h)
        return _best(self.item_ids_I, self.item_N[begin:end], weight, KEPT)


@dataclass(frozen=True, slots=True)
class Followers:
    """What came soon after each item, for anyone, at any time of a log.

    Attributes:
        offsets: I + 1 places; item i owns the pairs offsets[i]..offsets[i + 1], by time.
        after_P: What followed, as a place in `item_ids_I`.
        time_ms_P: When it did.
        weight_P: By how many steps it did.
    """

    item_ids_I: Int64s
    offsets: Int64s
    after_P: Int32s
    time_ms_P: Int64s
    weight_P: NDArray[np.float32]
    half_life_h: int

    @classmethod
    def of(cls, log: EventLog, half_life_h: int) -> Self:
        """Look up what follows every event."""
        item_ids_I, item_N = np.unique(log.item_id_N, return_inverse=True)
        before, after, weight = [], [], []
        rows = np.arange(log.num_events)
        for step in range(1, NUM_STEPS + 1):
            follows = rows[:-step][log.user_N[step:] == log.user_N[:-step]]
            before.append(follows)
            after.append(follows + step)
            weight.append(np.full(len(follows), 1.0 / step, np.float32))
        before_P, after_P = np.concatenate(before), np.concatenate(after)
        time_ms_P = log.event_time_ms_N[after_P]
        order = np.lexsort((time_ms_P, item_N[before_P]))
        return cls(
            item_ids_I,
            np.searchsorted(item_N[before_P][order], np.arange(len(item_ids_I) + 1)),
            item_N[after_P][order].astype(np.int32),
            time_ms_P[order],
            np.concatenate(weight)[order],
            followers_half_life_h(half_life_h),
        )

    def at(self, item_id: int, time_ms: int) -> Listed:
        """What had followed an item before a time, at most KEPT; nothing where that is long ago."""
        item = int(np.searchsorted(self.item_ids_I, item_id))
        if item == len(self.item_ids_I) or self.item_ids_I[item] != item_id:
            return _NOTHING
        begin, end = int(self.offsets[item]), int(self.offsets[item + 1])
        end = begin + int(np.searchsorted(self.time_ms_P[begin:end], time_ms))
        if begin == end:
            return _NOTHING
        hours_ago = time_ms // HOUR_MS - self.time_ms_P[begin:end] // HOUR_MS
        if hours_ago[-1] > FOLLOWERS_HALF_LIVES_KEPT * self.half_life_h:
            return _NOTHING
        weight = self.weight_P[begin:end] * 0.5 ** (hours_ago / self.half_life_h)
        return _best(self.item_ids_I, self.after_P[begin:end], weight, KEPT)


@dataclass(frozen=True, slots=True)
class LiveSources:
    """Both sources over one log."""

    log: EventLog
    popularity: Popularity
    followers: Followers

    @classmethod
    def of(cls, log: EventLog, *, half_life_h: int) -> Self:
        """Prepare a log; the half-life is that of popularity, in hours."""
        return cls(log, Popularity.of(log, half_life_h), Followers.of(log, half_life_h))

    def at(self, groups: LabelGroups) -> Counted:
        """What the sources say at labels, as `scoring` would hand it to the model."""
        counted = Counted.nothing(len(groups))
        last = self.last_items(groups).tolist()
        for number, (time_ms, item_id) in enumerate(
            zip(groups.time_ms_G.tolist(), last, strict=True)
        ):
            lists = (self.popularity.at(time_ms), self.followers.at(item_id, time_ms))
            for place, (items, shares) in enumerate(lists[: len(SOURCES)]):
                held = min(len(items), NUM_COUNTED)
                counted.item_BSK[number, place, :held] = items[:held]
                counted.share_BSK[number, place, :held] = shares[:held]
        return counted

    def last_items(self, groups: LabelGroups) -> Int64s:
        """The newest item known of each user [G], NO_COUNTED without one."""
        rows, known = known_rows(self.log, groups, 1)
        return np.where(known[:, -1], self.log.item_id_N[rows[:, -1]], NO_COUNTED)


def _best(item_ids_I: Int64s, item: Int64s | Int32s, weight: Float64s, k: int) -> Listed:
    """The k heaviest items with their share in all, ties by the smaller id."""
    items, inverse = _distinct(item, len(item_ids_I))
    score = np.bincount(inverse, weight, minlength=len(items)).round(DECIMALS)
    best = np.lexsort((items, -score))[:k]
    best = best[score[best] > 0]
    return item_ids_I[items[best]], score[best] / max(1e-9, score.sum())


def _distinct(item: Int64s | Int32s, num_items: int) -> tuple[Int64s, Int64s]:
    """The distinct items, ascending, and the place of each among them: no sorting."""
    is_there = np.zeros(num_items, np.bool_)
    is_there[item] = True
    place = np.cumsum(is_there) - 1
    return np.flatnonzero(is_there).astype(np.int64), place[item].astype(np.int64)
