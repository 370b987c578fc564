"""The event log from any offset to any other, as micro-batches: the lake first, then Kafka.

Whoever reads with it joins no group and commits nothing, so that no live group can notice
(streams/log_reader.py).
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from features.keys import NUM_BUCKETS, bucket_of
from features.lake import LakeFile, list_partition, read_file
from streams.errors import LogHoleError, LogTruncatedError, OffsetGoneError
from streams.kafka import offsets_for_time, watermarks
from streams.lake_fill import lake_batches
from streams.log_reader import LogReader
from streams.micro_batch import MicroBatch, sort_records
from streams.worker import to_record

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Mapping
    from pathlib import Path

    from features.config import StateConfig
    from streams.kafka import KafkaConfig
    from streams.micro_batch import Record

    Keep = Callable[[int], bool]

log = logging.getLogger("moveline.replay")

BATCH_MAX: Final = 10_000
# A broker that delivers nothing for so long while more is there has gone.
STALL_S: Final = 30.0


@dataclass(frozen=True, kw_only=True)
class EventLog:
    """One topic of events, in Kafka and in the lake.

    Attributes:
        lake: folder of the lake, None where there is none.
        prefer_lake: take from the lake whatever it has; otherwise only what Kafka has no more.
    """

    kafka: KafkaConfig
    topic: str
    lake: Path | None = None
    prefer_lake: bool = False

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
            BrokerUnavailableError: Kafka went silent.
        """
        while num_missing(positions, ends):
            for batch in self._from_lake(positions, ends, config):
                if keep is not None:
                    batch.by_user = {u: e for u, e in batch.by_user.items() if keep(u)}
                yield batch
                positions.update(batch.ends)
            # Ends early when retention overtakes it: then the lake has what Kafka dropped.
            yield from self._from_kafka(positions, ends, config, keep=keep, batch_max=batch_max)

    def starts_at(self, time_ms: int) -> dict[int, int]:
        """Return each partition's first offset appended at or after `time_ms`, lake included."""
        bounds = watermarks(self.kafka, self.topic)
        found = offsets_for_time(self.kafka, self.topic, time_ms)
        return {
            partition: self._lake_start(partition, time_ms, low) if found[partition] <= low else at
            for partition, (low, _) in bounds.items()
            for at in [found[partition]]
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
        bounds = watermarks(self.kafka, self.topic)
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
            yield from lake_batches(files, start, min(stop, ends[partition]), config)
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
                        yield _to_batch(records, stretch.ends, config, keep)
                        positions.update(stretch.ends)
        except OffsetGoneError as error:
            log.info("%s", error)
        finally:
            reader.close()


def num_missing(positions: Mapping[int, int], ends: Mapping[int, int]) -> int:
    """Return how many offsets are still to be read."""
    return sum(max(0, ends[partition] - at) for partition, at in positions.items())


def some_buckets(share: float) -> Keep:
    """Return what keeps about this share of all users, whole buckets, the same ones every time."""
    num_buckets = max(1, min(NUM_BUCKETS, round(share * NUM_BUCKETS)))
    return lambda user: bucket_of(user) < num_buckets


def _to_batch(
    records: list[Record], moved: dict[int, int], config: StateConfig, keep: Keep | None
) -> MicroBatch:
    mine = records if keep is None else [r for r in records if _is_kept(r.key, keep)]
    batch = sort_records(mine, config)
    batch.num_records = len(records)
    batch.ends = moved
    return batch


def _is_kept(key: bytes | None, keep: Keep) -> bool:
    """Return whether a record is of a user asked for: an event's key is its decimal user id."""
    return key is not None and key.isdigit() and keep(int(key))
