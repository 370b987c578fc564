"""The lake sink: the event log as Parquet, every offset in exactly one file.

Positions live in the names of the files and nowhere else: the sink joins no group and commits
nothing. Any number of sinks may run at once; what one has written the others drop.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from features.errors import InvalidEventError
from features.events import decode_event, judge_ranges
from features.lake import next_offset
from streams.errors import (
    BrokerUnavailableError,
    LogHoleError,
    LogTruncatedError,
    PartitionsChangedError,
    TopicMissingError,
)
from streams.kafka import (
    TopicPartition,
    as_stream_error,
    is_end_of_partition,
    is_offset_gone,
    make_consumer,
    topic_width,
    watermarks,
)
from streams.lake_file import LakeRow, Partition, remove_pending
from streams.micro_batch import is_msgpack
from streams.placement import partitions_of
from streams.progress import progress_bar
from streams.seal import is_seal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from streams.kafka import Consumer, KafkaConfig, KafkaError, Message
    from streams.micro_batch import Headers

_LOG: Final = logging.getLogger("moveline.lake")

# How old an event may grow in memory; a crash makes the next sink read that much again.
FLUSH_S: Final = 10.0
# Events in memory over all partitions, about 0.5 kB each. At the limit all of them are written.
BUFFERED_ROWS_MAX: Final = 262_144
# Among the reasons for which a record is left out: `moveline repartition` moves it.
_MISPLACED: Final = "misplaced"
_CONSUME_MESSAGES: Final = 5_000
_CONSUME_S: Final = 0.2
# With `until_end`: a broker that delivers nothing for so long while more is there has gone.
STALL_S: Final = 30.0
# How often the sink looks whether somebody has given the topic other partitions.
WIDTH_INTERVAL_S: Final = 5.0


class Stop(Protocol):
    """Asked between batches; a `threading.Event` is one."""

    def is_set(self) -> bool:
        """Return whether to write what is in memory and end."""


class NeverStop:
    """A `Stop` that never does."""

    def is_set(self) -> bool:
        """Return False."""
        return False


@dataclass(kw_only=True)
class LakeReport:
    """What a run did.

    Attributes:
        num_rows: events this sink wrote.
        num_invalid: records skipped because they are no events; the worker dead-letters them.
        invalid: likewise, by reason.
        num_flushes: how often memory was written out.
        ends: the offset the lake goes on at, by partition.
        is_sealed: whether the topic has ended in every partition: the log goes on in another.
    """

    num_rows: int = 0
    num_invalid: int = 0
    invalid: dict[str, int] = field(default_factory=dict)
    num_flushes: int = 0
    seconds: float = 0.0
    ends: dict[int, int] = field(default_factory=dict)
    is_sealed: bool = False

    def count_invalid(self, reason: str) -> None:
        """Count a record that was left out."""
        self.num_invalid += 1
        self.invalid[reason] = self.invalid.get(reason, 0) + 1

    @property
    def rows_per_s(self) -> float:
        """Events written per second of the run."""
        return self.num_rows / max(self.seconds, 1e-9)


class LakeSink:
    """Writes a topic's events to `root`; `run` does it."""

    def __init__(
        self,
        config: KafkaConfig,
        topic: str,
        root: Path,
        *,
        partitions: Sequence[int] | None = None,
        num_partitions: int | None = None,
        ends: Mapping[int, int] | None = None,
        flush_s: float = FLUSH_S,
        buffered_rows_max: int = BUFFERED_ROWS_MAX,
    ) -> None:
        """Say what goes where; nothing is opened yet.

        Args:
            config: the cluster.
            topic: usually `Topics().events`.
            root: the lake's folder; the topic gets one of its own in it.
            partitions: those to write; all if left out.
            num_partitions: over which the topic's keys are distributed: an event that lies
                elsewhere is left out, and another number of partitions is refused.
            ends: of a retired topic, the offset to end before, by partition.
            flush_s: how long an event may wait in memory.
            buffered_rows_max: how many may.
        """
        self._config = config
        self._topic = topic
        self._root = root
        self._chosen = partitions
        self._num_partitions = num_partitions
        self._ends = ends
        self._flush_s = flush_s
        self._buffered_rows_max = buffered_rows_max

    def run(
        self, stop: Stop | None = None, *, until_end: bool = False, progress: bool = False
    ) -> LakeReport:
        """Write events until `stop` is set; everything read is in the lake then.

        Args:
            stop: asked between batches; never stops if left out.
            until_end: end at what Kafka holds now.
            progress: with `until_end`, show a bar on stderr.

        Raises:
            LogHoleError: Kafka has dropped offsets the lake does not have.
            LogTruncatedError: the lake goes further than Kafka.
            LakeError: files on disk leave a hole or overlap.
            StreamError: the broker is away at the start, or refuses.
        """
        bounds = self._bounds()
        buffers = {number: self._opened(number, *bounds[number]) for number in bounds}
        ends = {number: high for number, (_, high) in bounds.items()} if until_end else None
        run = _Run(buffers, ends, LakeReport())
        started_s = time.monotonic()
        total = sum(run.num_missing(number) for number in buffers) if until_end else None
        consumer = make_consumer(self._config, group=f"{self._topic}.lake", reader=True)
        try:
            consumer.assign([self._place(buffer) for buffer in buffers.values()])
            with progress_bar("lake", total=total, shown=progress and until_end) as advance:
                self._consume(consumer, run, stop or NeverStop(), advance)
        finally:
            consumer.close()
        run.report.seconds = time.monotonic() - started_s
        run.report.ends = {number: buffer.start for number, buffer in buffers.items()}
        run.report.is_sealed = run.sealed >= buffers.keys()
        return run.report

    def _consume(
        self, consumer: Consumer, run: _Run, stop: Stop, advance: Callable[[int], None]
    ) -> None:
        heard_s = asked_s = time.monotonic()
        while not stop.is_set() and not run.is_done():
            messages = consumer.consume(_CONSUME_MESSAGES, _CONSUME_S)
            now_s = time.monotonic()
            heard_s = now_s if messages else heard_s
            if run.ends is not None and now_s - heard_s > STALL_S:
                self._flush(consumer, run, run.buffers.values())
                raise self._stalled(run)
            if now_s - asked_s > WIDTH_INTERVAL_S:
                asked_s = now_s
                self._refuse_other_width(consumer)
            run.strays = self._strays(messages)
            advance(sum(self._take(run, message, now_s) for message in messages))
            self._flush(consumer, run, self._due(run, now_s))
        self._flush(consumer, run, run.buffers.values())

    def _take(self, run: _Run, message: Message, now_s: float) -> int:
        """Put one record into memory; return how many offsets it moved its partition."""
        error = message.error()
        if error is not None and not is_end_of_partition(error):
            self._report_error(run, message, error)
            return 0
        number, offset = message.partition(), message.offset()
        assert number is not None, "a record and the end of a partition have a partition"
        assert offset is not None, "likewise"
        buffer = run.buffers[number]
        if error is not None:
            return run.reach_end(buffer, offset, now_s)
        if offset < buffer.next or run.is_beyond(number, offset):
            return 0
        if message.key() is None and is_seal(None, message.value(), _headers(message)):
            run.sealed.add(number)
            return 0
        if (number, offset) in run.strays:
            run.report.count_invalid(_MISPLACED)
            return run.move(buffer, offset + 1, now_s)
        row = _read_row(message, offset, run.report)
        if row is not None:
            buffer.rows.append(row)
        return run.move(buffer, offset + 1, now_s)

    def _strays(self, messages: Sequence[Message]) -> set[tuple[int, int]]:
        """Return where records lie whose keys belong into another partition."""
        if self._num_partitions is None:
            return set()
        records: list[Any] = [message for message in messages if message.error() is None]
        keys = [record.key() or b"" for record in records]
        belongs = partitions_of(keys, self._num_partitions)
        return {
            (record.partition(), record.offset())
            for record, key, partition in zip(records, keys, belongs, strict=True)
            if key and record.partition() != partition
        }

    def _refuse_other_width(self, consumer: Consumer) -> None:
        wanted = self._num_partitions
        if wanted is None or self._ends is not None:
            return
        found = topic_width(consumer, self._topic)
        if found is not None and found != wanted:
            raise PartitionsChangedError(self._topic, recorded=wanted, found=found, wanted=found)

    def _report_error(self, run: _Run, message: Message, error: KafkaError) -> None:
        """Raise what going on cannot heal, log the rest."""
        number = message.partition()
        if is_offset_gone(error) and number is not None:
            low, high = watermarks(self._config, self._topic)[number]
            raise self._gone(number, run.buffers[number].next, low, high)
        cause = as_stream_error(error, self._config)
        if not cause.retriable:
            raise cause
        _LOG.warning("%s", cause)

    def _due(self, run: _Run, now_s: float) -> list[Partition]:
        """Return the partitions to write now: a whole block, too old, or all if memory is full."""
        waiting = [buffer for buffer in run.buffers.values() if buffer.next > buffer.start]
        if sum(len(buffer.rows) for buffer in waiting) >= self._buffered_rows_max:
            return waiting
        return [
            buffer
            for buffer in waiting
            if buffer.next >= buffer.block_end or now_s - buffer.opened_s >= self._flush_s
        ]

    def _flush(self, consumer: Consumer, run: _Run, buffers: Iterable[Partition]) -> None:
        for buffer in buffers:
            end = buffer.next
            if end == buffer.start:
                continue
            run.report.num_rows += buffer.publish(end)
            run.report.num_flushes += 1
            buffer.opened_s = time.monotonic()
            if buffer.next > end:
                # Another sink is ahead: reading on from here would only be dropped again.
                consumer.seek(self._place(buffer))

    def _bounds(self) -> dict[int, tuple[int, int]]:
        bounds = watermarks(self._config, self._topic)
        if self._ends is not None:
            return {p: (min(bounds[p][0], end), end) for p, end in self._ends.items()}
        if self._num_partitions is not None:
            bounds = {p: span for p, span in bounds.items() if p < self._num_partitions}
        if self._chosen is None:
            return bounds
        absent = sorted(set(self._chosen) - bounds.keys())
        if absent:
            raise TopicMissingError(
                f"{self._topic} partition {absent[0]}", bootstrap=self._config.bootstrap
            )
        return {number: bounds[number] for number in self._chosen}

    def _opened(self, number: int, low: int, high: int) -> Partition:
        """Return the empty buffer of a partition whose lake and log fit together."""
        position = next_offset(self._root, self._topic, number)
        start = low if position is None else position
        if not low <= start <= high:
            raise self._gone(number, start, low, high)
        buffer = Partition(self._root, self._topic, number, start, start)
        remove_pending(buffer.folder)
        return buffer

    def _gone(
        self, number: int, position: int, low: int, high: int
    ) -> LogHoleError | LogTruncatedError:
        if position < low:
            return LogHoleError(self._topic, number, lake_end=position, low=low)
        return LogTruncatedError(self._topic, number, lake_end=position, high=high)

    def _place(self, buffer: Partition) -> TopicPartition:
        return TopicPartition(self._topic, buffer.number, buffer.next)

    def _stalled(self, run: _Run) -> BrokerUnavailableError:
        missing = {n: run.num_missing(n) for n in run.buffers if run.num_missing(n)}
        return BrokerUnavailableError(
            f"Kafka at {self._config.bootstrap} delivered nothing for {STALL_S:g} s while "
            f"{self._topic!r} has more (offsets missing by partition: {missing}). What was read is "
            "in the lake; look at the broker, then run `moveline lake` again."
        )


@dataclass
class _Run:
    """The state of one run: memory by partition, where to end, and what was done."""

    buffers: dict[int, Partition]
    ends: dict[int, int] | None
    report: LakeReport
    sealed: set[int] = field(default_factory=set)
    strays: set[tuple[int, int]] = field(default_factory=set)

    def is_done(self) -> bool:
        """Return whether every partition has reached its end; without ends, that is its seal."""
        if self.ends is None:
            return self.sealed >= self.buffers.keys()
        return not any(map(self.num_missing, self.buffers))

    def num_missing(self, number: int) -> int:
        """Return how many offsets of a partition are still to be read before its end."""
        if number in self.sealed:
            return 0
        return 0 if self.ends is None else max(0, self.ends[number] - self.buffers[number].next)

    def is_beyond(self, number: int, offset: int) -> bool:
        """Return whether the offset is not asked for, because the run ends before it."""
        return number in self.sealed or (self.ends is not None and offset >= self.ends[number])

    def reach_end(self, buffer: Partition, offset: int, now_s: float) -> int:
        """Everything readable before `offset` was seen, transaction markers included.

        An end further on cannot be read yet (a transaction is open): the run ends here.
        """
        if buffer.number in self.sealed:
            return 0
        if self.ends is not None:
            self.ends[buffer.number] = min(self.ends[buffer.number], offset)
            offset = self.ends[buffer.number]
        return self.move(buffer, offset, now_s)

    def move(self, buffer: Partition, offset: int, now_s: float) -> int:
        """The buffer covers every offset before `offset`; return how many that added."""
        moved = offset - buffer.next
        if moved <= 0:
            return 0
        if buffer.next == buffer.start:
            buffer.opened_s = now_s
        buffer.next = offset
        return moved


def _headers(message: Message) -> Headers | None:
    plain: Any = message  # the library's type allows what the broker never sends: text, a dict
    headers: Headers | None = plain.headers()
    return headers


def _read_row(message: Message, offset: int, report: LakeReport) -> LakeRow | None:
    """Return the event of a record; None, counted, if it is none."""
    try:
        event = decode_event(message.value(), msgpack=is_msgpack(_headers(message)))
        judge_ranges(event, message.key())
    except InvalidEventError as error:
        report.count_invalid(error.reason)
        return None
    return LakeRow(offset, message.timestamp()[1], event)
