"""Counts the log into hourly tiles, and turns tiles into trending items and item statistics.

Where a partition stands is a mark in Redis that moves in the same script as the counts, and only
if it stood where they were made from. So it does not matter which hint came, how often, or when:
each one counts from the mark to the end, and what was counted is never counted again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from features.clock import now_ms
from features.nearline import HOUR_MS, TILE_HOURS_MAX, Tile, TileStore
from features.sources import HALF_LIFE_H_DEFAULT
from streams.kafka import offsets_for_time
from streams.log_reader import Bounds
from streams.micro_batch import sort_records
from streams.nearline_metrics import NearlineMetrics
from streams.placement import drop_misplaced
from streams.trending import (
    WEEK_HOURS,
    count_events,
    hour_of,
    rank,
    rank_by_domain,
    total_by_item,
    window_hours,
)
from streams.worker import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from features.config import StateConfig
    from features.redis import CatalogueStore, Trending
    from streams.follower_lists import FollowerCounter
    from streams.kafka import Message
    from streams.log_reader import LogReader

log = logging.getLogger("moveline.nearline")

# Records of one script call: Redis answers nobody else while it adds them (a few milliseconds).
STRETCH_RECORDS: Final = 5_000


@dataclass
class TileCounter:
    """Brings the tiles of one partition after another up to the end of a topic of the log.

    Attributes:
        num_partitions: over which its keys are distributed; events elsewhere do not count here.
        ends: where it ended, by partition, if it is retired.
        sealed: partitions that were found to have ended.
        followers: counts what follows items too; None counts tiles alone.
    """

    reader: LogReader
    topic: str
    tiles: TileStore
    config: StateConfig
    num_partitions: int | None = None
    ends: Mapping[int, int] | None = None
    sealed: set[int] = field(default_factory=set)
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    clock: Callable[[], int] = now_ms
    followers: FollowerCounter | None = None

    def advance(self, partition: int, *, budget_s: float) -> int:
        """Count on from the mark; return how many records are left to be counted.

        Ends early when the time is used up or somebody else counts: the next hint goes on.

        Raises:
            StoreError: Redis did not answer.
            StreamError: Kafka did not.
        """
        deadline = time.monotonic() + budget_s
        bounds = self._bounds(partition)
        mark = self.tiles.marks(partition).next_offset
        start = self._start(partition) if mark is None else mark
        if start < bounds.low:
            log.warning("%s[%d]: %d to %d are gone", self.topic, partition, start, bounds.low)
            self.metrics.skipped_records.inc(bounds.low - start)
            start = bounds.low
        if start < bounds.high:
            for messages, end in self.reader.read(
                self.topic, partition, start, bounds.high, records_max=STRETCH_RECORDS
            ):
                counted = self._count(partition, messages, mark, end)
                if counted is None:
                    break
                mark = start = counted
                if time.monotonic() > deadline or partition in self.sealed:
                    break
        left = max(0, bounds.high - start)
        left = 0 if partition in self.sealed else left
        self.metrics.lag.labels(str(partition)).set(left)
        return left

    def _bounds(self, partition: int) -> Bounds:
        """Return the oldest offset and the one to count up to."""
        if self.ends is None:
            return self.reader.bounds(self.topic, partition)
        end = self.ends[partition]
        mark = self.tiles.marks(partition).next_offset
        if mark is not None and mark >= end:
            # The topic may be gone from Kafka.
            return Bounds(mark, end)
        return Bounds(min(self.reader.bounds(self.topic, partition).low, end), end)

    def _start(self, partition: int) -> int:
        """Return the first record that a window can see, so that a long log is not read whole."""
        oldest_ms = (hour_of(self.clock()) - TILE_HOURS_MAX) * HOUR_MS
        oldest_ms -= self.config.future_tolerance_ms
        found = offsets_for_time(self.reader.kafka, self.topic, max(0, oldest_ms))[partition]
        return found if self.ends is None else min(found, self.ends[partition])

    def _count(
        self, partition: int, messages: list[Message], mark: int | None, end: int
    ) -> int | None:
        """Return up to where was counted, None if another app was faster."""
        batch = sort_records([to_record(message) for message in messages], self.config)
        if self.num_partitions is not None:
            drop_misplaced(batch, self.num_partitions)
        if partition in batch.seals:
            end = batch.seals[partition]
            self.sealed.add(partition)
        events = [event for of_user in batch.by_user.values() for event in of_user]
        counts = count_events(events)
        followers, kept_s = None, 0
        if self.followers is not None:
            followers = self.followers.counted(partition, batch.by_user)
            kept_s = self.followers.kept_s
        if not self.tiles.add(
            partition,
            counts,
            expected=mark,
            advance_to=end,
            followers=followers,
            followers_kept_s=kept_s,
        ):
            self.metrics.refused.inc()
            return None
        self.metrics.tiles.inc()
        self.metrics.events.inc(len(events))
        return end


class StatisticsWriter(Protocol):
    """Takes rows of the item_statistics view: `features.item_statistics` through Feast."""

    def push(self, rows: Mapping[int, tuple[int, int]], at_ms: int) -> None:
        """Return once (events of a day, events of a week) of those items are readable."""
        ...


@dataclass
class Popularity:
    """Rolls the tiles of all partitions up.

    Attributes:
        half_life_h: of trending items, in hours.
        held: tiles as last read, by (partition, hour), with the offset they had changed at. A
            week of them, 24 bytes for each (domain, item, hour) with an event.
        told: statistics as last pushed, by item.
    """

    tiles: TileStore
    catalogue: CatalogueStore
    partitions: int
    statistics: StatisticsWriter
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    half_life_h: int = HALF_LIFE_H_DEFAULT
    clock: Callable[[], int] = now_ms
    held: dict[tuple[int, int], tuple[int, Tile]] = field(default_factory=dict)
    told: dict[int, tuple[int, int]] = field(default_factory=dict)

    def put_trending(self) -> Trending | None:
        """Replace the trending items, and those of each domain; None: they were left alone.

        They stay as they are when no event was met lately (something is better than nothing),
        and while another generation is the live one.
        """
        clock_ms = self.clock()
        self._refresh(clock_ms)
        pointers = self.catalogue.get_pointers()
        if pointers is not None and pointers.generation != self.tiles.generation:
            return None
        trending = rank(self._tiles(), clock_ms, half_life_h=self.half_life_h)
        if not trending.item_ids:
            return None
        self.catalogue.put_trending(trending)
        self.tiles.put_domain_trending(
            rank_by_domain(self._tiles(), clock_ms, half_life_h=self.half_life_h)
        )
        self.metrics.rankings.inc()
        return trending

    def push_statistics(self) -> int:
        """Push what has changed since the last time; return the number of rows."""
        clock_ms = self.clock()
        self._refresh(clock_ms)
        day = total_by_item(self._tiles(), window_hours(clock_ms, 24))
        week = total_by_item(self._tiles(), window_hours(clock_ms, WEEK_HOURS))
        now = {item: (day.get(item, 0), count) for item, count in week.items()}
        gone = dict.fromkeys(self.told.keys() - now.keys(), (0, 0))
        changed = {item: row for item, row in now.items() if self.told.get(item) != row} | gone
        if changed:
            self.statistics.push(changed, clock_ms)
            self.metrics.pushed.inc(len(changed))
        self.told = now
        return len(changed)

    def _tiles(self) -> Iterator[tuple[int, Tile]]:
        """Yield (hour, tile); by partition, so that sums are made in one order."""
        for (_, hour), (_, tile) in sorted(self.held.items(), key=lambda entry: entry[0]):
            yield hour, tile

    def _refresh(self, clock_ms: int) -> None:
        wanted = window_hours(clock_ms, WEEK_HOURS)
        expired = wanted.start - (TILE_HOURS_MAX - WEEK_HOURS)
        kept: dict[tuple[int, int], tuple[int, Tile]] = {}
        for partition in range(self.partitions):
            changed_at = self.tiles.marks(partition).changed_at
            self.tiles.forget_hours(partition, [hour for hour in changed_at if hour < expired])
            for hour in sorted(set(wanted) & changed_at.keys()):
                place, at = (partition, hour), changed_at[hour]
                held = self.held.get(place)
                if held is None or held[0] != at:
                    held = at, self.tiles.read(partition, [hour])[hour]
                kept[place] = held
        self.held = kept
