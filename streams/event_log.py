"""A topic of the event log from any offset to any other, as micro-batches: lake first, then Kafka.

Whoever reads with it joins no group and commits nothing, so that no live group can notice
(streams/log_reader.py).
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeVar

from features.keys import NUM_BUCKETS, bucket_of
from features.lake import LakeFile, list_partition, read_file
from streams.errors import (
    LogHoleError,
    LogTruncatedError,
    MisplacedEventError,
    OffsetGoneError,
    TopicMissingError,
)
from streams.kafka import end_offsets, offsets_for_time, watermarks
from streams.lake_fill import lake_batches
from streams.log_reader import LogReader
from streams.micro_batch import MicroBatch, sort_records
from streams.placement import drop_misplaced
from streams.worker import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path

    from features.config import StateConfig
    from streams.chain import Chain
    from streams.kafka import KafkaConfig
    from streams.micro_batch import Record
    from streams.topics import Topics

    Keep = Callable[[int], bool]

_Of = TypeVar("_Of")

log = logging.getLogger("moveline.replay")

# As many as a worker takes: the more of a user's events are in one, the less each costs.
BATCH_MAX: Final = 30_000
# A broker that delivers nothing for so long while more is there has gone.
STALL_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class EventLog:
    """One topic of events, in Kafka and in the lake.

    Attributes:
        lake: folder of the lake, None where there is none.
        prefer_lake: take from the lake whatever it has; otherwise only what Kafka has no more.
        source: which topic of the log's chain it is.
        num_partitions: over which its keys are distributed: what lies elsewhere does not count.
            None: all it has, whatever lies where.
        ends: where it ended, by partition, if it is retired; it may be gone from Kafka then.
    """

    kafka: KafkaConfig
    topic: str
    lake: Path | None = None
    prefer_lake: bool = False
    source: int = 0
    num_partitions: int | None = None
    ends: Mapping[int, int] | None = None

    def end_offsets(self) -> dict[int, int]:
        """Return the offset after the last event by partition, as of now."""
        if self.ends is not None:
            return dict(self.ends)
        return self._counted(end_offsets(self.kafka, self.topic))

    def bounds(self) -> dict[int, tuple[int, int]]:
        """Return each partition's oldest offset in Kafka and the one after its last event."""
        try:
            bounds = self._counted(watermarks(self.kafka, self.topic))
        except TopicMissingError:
            if self.ends is None:
                raise
            return {partition: (end, end) for partition, end in self.ends.items()}
        if self.ends is None:
            return bounds
        return {p: (min(low, self.ends[p]), self.ends[p]) for p, (low, _) in bounds.items()}

    def _counted(self, of_partition: Mapping[int, _Of]) -> dict[int, _Of]:
        num = self.num_partitions
        return {p: of for p, of in of_partition.items() if num is None or p < num}

    def batches(
        self,
        positions: dict[int, int],
        ends: Mapping[int, int],
        config: StateConfig,
        *,
        keep: Keep | None = None,
        batch_max: int = BATCH_MAX,
    ) -> Generator[MicroBatch, None, None]:
        """Yield everything from `positions` to before `ends`, each partition in offset order.

        Args:
            positions: next offset by partition; moved on when the next micro-batch is asked for.
            ends: by partition, the offset to stop before.
            config: the rules that judge.
            keep: whose events; of other users nothing is decoded, and their bad records are not
                counted.
            batch_max: records in a micro-batch, at most (of the lake: as its reader cuts them).

        Raises:
            LogHoleError: offsets that neither Kafka nor the lake has.
            LogTruncatedError: the lake goes further than Kafka: this is another log.
            MisplacedEventError: an event that was not moved yet to where its key belongs.
            BrokerUnavailableError: Kafka went silent.
        """
        while num_missing(positions, ends):
            for batch in self._from_lake(positions, ends, config):
                if keep is not None:
                    batch.by_user = {u: e for u, e in batch.by_user.items() if keep(u)}
                yield self._placed(batch)
                positions.update(batch.ends)
            # Ends early when retention overtakes it: then the lake has what Kafka dropped.
            yield from self._from_kafka(positions, ends, config, keep=keep, batch_max=batch_max)

    def starts_at(self, time_ms: int) -> dict[int, int]:
        """Return each partition's first offset appended at or after `time_ms`, lake included."""
        bounds = self.bounds()
        try:
            found = offsets_for_time(self.kafka, self.topic, time_ms)
        except TopicMissingError:
            # Retired and deleted (`bounds` has seen to that): only the lake can tell.
            found = {}
        return {
            partition: self._lake_start(partition, time_ms, low) if at <= low else min(at, high)
            for partition, (low, high) in bounds.items()
            for at in [found.get(partition, low)]
        }

    def _lake_start(self, partition: int, time_ms: int, low: int) -> int:
        """Return the oldest offset from `time_ms` on, when everything in Kafka is that new."""
        if self.lake is None:
            return low
        for file in list_partition(self.lake, self.topic, partition):
            if file.start >= low:
                break
            table = read_file(file)
            # Append times grow with offsets: the broker stamps them.
            at = int(table["append_time_ms"].to_numpy().searchsorted(time_ms))
            if at < table.num_rows:
                return min(low, int(table["offset"][at].as_py()))
        return low

    def _from_lake(
        self, positions: dict[int, int], ends: Mapping[int, int], config: StateConfig
    ) -> Iterator[MicroBatch]:
        bounds = self.bounds()
        for partition, start in sorted(positions.items()):
            low, high = bounds[partition]
            if ends[partition] > high:
                end = ends[partition]
                raise LogTruncatedError(self.topic, partition, lake_end=end, high=high)
            files = self._files(partition, high)
            covered = files[-1].end + 1 if files and files[0].start <= start else start
            if start < min(low, ends[partition]) and covered < min(low, ends[partition]):
                raise LogHoleError(self.topic, partition, lake_end=covered, low=low)
            stop = covered if self.prefer_lake else low
            stop_here = min(stop, ends[partition])
            yield from lake_batches(files, start, stop_here, config, self.source)
            positions[partition] = max(start, min(stop, covered, ends[partition]))

    def _files(self, partition: int, high: int) -> list[LakeFile]:
        if self.lake is None:
            return []
        files = list_partition(self.lake, self.topic, partition)
        if files and files[-1].end >= high:
            end = files[-1].end + 1
            raise LogTruncatedError(self.topic, partition, lake_end=end, high=high)
        return files

    def _from_kafka(
        self,
        positions: dict[int, int],
        ends: Mapping[int, int],
        config: StateConfig,
        *,
        keep: Keep | None,
        batch_max: int,
    ) -> Iterator[MicroBatch]:
        if not num_missing(positions, ends):
            return
        reader = LogReader.open(self.kafka)
        read = reader.stretches(
            self.topic, positions, ends, records_max=batch_max, timeout_s=STALL_S
        )
        try:
            with closing(read):
                for stretch in read:
                    if stretch.ends:
                        records = [to_record(message) for message in stretch.messages]
                        batch = self._to_batch(records, stretch.ends, config, keep)
                        yield self._placed(batch)
                        positions.update(stretch.ends)
        except OffsetGoneError as error:
            log.info("%s", error)
        finally:
            reader.close()

    def _to_batch(
        self,
        records: list[Record],
        moved: dict[int, int],
        config: StateConfig,
        keep: Keep | None,
    ) -> MicroBatch:
        mine = records if keep is None else [r for r in records if _is_kept(r.key, keep)]
        batch = sort_records(mine, config, self.source)
        batch.num_records = len(records)
        batch.ends = moved
        return batch

    def _placed(self, batch: MicroBatch) -> MicroBatch:
        """Return the batch without what does not count; in the newest topic nothing may be so.

        There it was not moved yet: a generation that passed over it would hide it.
        """
        if self.num_partitions is not None:
            num_dropped = drop_misplaced(batch, self.num_partitions)
            if num_dropped and self.ends is None:
                what = f"{num_dropped} events before offsets {batch.ends} by partition"
                raise MisplacedEventError(self.topic, what)
        return batch


def logs_of(
    kafka: KafkaConfig,
    topics: Topics,
    chain: Chain,
    *,
    lake: Path | None = None,
    prefer_lake: bool = False,
) -> list[EventLog]:
    """Return the topics of a log in the order in which a user's events lie in them."""
    return [
        EventLog(
            kafka=kafka,
            topic=topics.at(number).events,
            lake=lake,
            prefer_lake=prefer_lake,
            source=number,
            num_partitions=source.num_partitions,
            ends=None if source.ends is None else source.end_offsets,
        )
        for number, source in enumerate(chain.sources)
    ]


def num_missing(positions: Mapping[int, int], ends: Mapping[int, int]) -> int:
    """Return how many offsets are still to be read."""
    return sum(max(0, ends[partition] - at) for partition, at in positions.items())


def some_buckets(share: float) -> Keep:
    """Return what keeps about this share of all users, whole buckets, the same ones every time."""
    num_buckets = max(1, min(NUM_BUCKETS, round(share * NUM_BUCKETS)))
    return lambda user: bucket_of(user) < num_buckets


def _is_kept(key: bytes | None, keep: Keep) -> bool:
    """Return whether a record is of a user asked for: an event's key is its decimal user id."""
    return key is not None and key.isdigit() and keep(int(key))
