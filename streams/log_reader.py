"""Reads stretches of a topic by offset, outside every group: offsets of others never move.

The one reader that only assigns: of the event log, the dead letters, the control topic, and for
the near-line app.
"""

from __future__ import annotations

import logging
import time
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from streams.errors import BrokerUnavailableError, OffsetGoneError
from streams.kafka import (
    KafkaConfig,
    KafkaException,
    TopicPartition,
    as_stream_error,
    is_end_of_partition,
    is_offset_gone,
    make_consumer,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator, Mapping

    from streams.kafka import Consumer, KafkaError, Message

log = logging.getLogger("moveline.log")

# librdkafka asks for a name; nobody joins the group, and nothing is committed in it.
GROUP: Final = "moveline-log-reader"
# How long a broker that holds the records may take to hand out the next of them.
TIMEOUT_S: Final = 10.0
# Records of one fetch, where nobody says how many they want.
RECORDS_MAX: Final = 5_000
_POLL_S: Final = 0.1


class Bounds(NamedTuple):
    """The oldest offset a partition still has, and the one after the newest."""

    low: int
    high: int


class Stretch(NamedTuple):
    """What one fetch brought.

    Attributes:
        messages: records, those of a partition in offset order.
        ends: by partition, of those that moved, the offset to go on at.
        at_end: partitions that have nothing more now.
    """

    messages: list[Message]
    ends: dict[int, int]
    at_end: set[int]


@dataclass
class LogReader:
    """One consumer that only assigns; one reading at a time."""

    kafka: KafkaConfig
    consumer: Consumer

    @classmethod
    def open(cls, kafka: KafkaConfig) -> LogReader:
        """Return a reader; close it."""
        return cls(kafka, make_consumer(kafka, group=GROUP, reader=True))

    def close(self) -> None:
        """Give the connection back."""
        self.consumer.close()

    def bounds(self, topic: str, partition: int) -> Bounds:
        """Return where a partition begins and ends now.

        Raises:
            StreamError: the broker does not say.
        """
        try:
            at = TopicPartition(topic, partition)
            return Bounds(*self.consumer.get_watermark_offsets(at, timeout=TIMEOUT_S))
        except KafkaException as error:
            raise as_stream_error(error, self.kafka) from error

    def read(
        self,
        topic: str,
        partition: int,
        start: int,
        stop: int,
        *,
        records_max: int = RECORDS_MAX,
    ) -> Iterator[tuple[list[Message], int]]:
        """Yield the records of [start, stop) in stretches, each with the offset after it.

        An open transaction ends the reading before `stop`. Raises as `stretches` does.
        """
        span = {partition: start}, {partition: stop}
        with closing(self.stretches(topic, *span, records_max=records_max)) as stretches:
            for stretch in stretches:
                if stretch.ends:
                    yield stretch.messages, stretch.ends[partition]
                if stretch.at_end:
                    return

    def stretches(
        self,
        topic: str,
        starts: Mapping[int, int],
        stops: Mapping[int, int],
        *,
        records_max: int = RECORDS_MAX,
        timeout_s: float = TIMEOUT_S,
    ) -> Generator[Stretch, None, None]:
        """Yield what [start, stop) of each partition holds, in the order in which it comes.

        Offsets that hold no record (transaction markers) are passed over.

        Args:
            topic: which.
            starts: by partition, the first offset.
            stops: by partition, the offset to stop before.
            records_max: of one stretch.
            timeout_s: how long the broker may deliver nothing while it has more.

        Raises:
            OffsetGoneError: retention has overtaken the reading; what came before was yielded.
            BrokerUnavailableError: nothing came for `timeout_s`.
            StreamError: the broker refuses.
        """
        left = {partition: at for partition, at in starts.items() if at < stops[partition]}
        if not left:
            return
        self.consumer.assign([TopicPartition(topic, p, at) for p, at in left.items()])
        heard_s = time.monotonic()
        try:
            while left:
                stretch, gone = self._sorted_out(self._consume(records_max), left, stops)
                if stretch.ends or stretch.at_end:
                    yield stretch
                    # What was done with it meanwhile is no silence of the broker.
                    heard_s = time.monotonic()
                if gone:
                    raise OffsetGoneError(topic, gone)
                if time.monotonic() - heard_s > timeout_s:
                    raise self._silent(topic, left, stops, timeout_s)
                self._advance(topic, left, stretch.ends, stops)
        finally:
            self.consumer.unassign()

    def _consume(self, records_max: int) -> list[Message]:
        try:
            return self.consumer.consume(records_max, _POLL_S)
        except KafkaException as error:
            raise as_stream_error(error, self.kafka) from error

    def _sorted_out(
        self, messages: list[Message], left: Mapping[int, int], stops: Mapping[int, int]
    ) -> tuple[Stretch, set[int]]:
        """Return the records asked for, and the partitions whose next offset is gone."""
        records: list[Message] = []
        ends: dict[int, int] = {}
        at_end: set[int] = set()
        gone: set[int] = set()
        for message in messages:
            plain: Any = message  # the library calls its partition and offset optional
            error, partition, offset = plain.error(), plain.partition(), plain.offset()
            if error is not None and not is_end_of_partition(error):
                if is_offset_gone(error):
                    gone.add(partition)
                else:
                    self._refuse(error)
                continue
            at = ends.get(partition, left.get(partition))
            if at is None:
                continue  # fetched before its partition was paused
            if error is None:
                if at <= offset < stops[partition]:
                    records.append(message)
                offset += 1
            elif offset < stops[partition]:
                at_end.add(partition)
            # The end of a partition passes over what is no record, too.
            if offset > at:
                ends[partition] = min(offset, stops[partition])
        return Stretch(records, ends, at_end), gone

    def _refuse(self, error: KafkaError) -> None:
        cause = as_stream_error(error, self.kafka)
        if not cause.retriable:
            raise cause
        log.warning("%s", cause)

    def _advance(
        self, topic: str, left: dict[int, int], ends: Mapping[int, int], stops: Mapping[int, int]
    ) -> None:
        left |= ends
        done = [partition for partition, at in ends.items() if at >= stops[partition]]
        for partition in done:
            del left[partition]
        if done and left:
            self.consumer.pause([TopicPartition(topic, partition) for partition in done])

    def _silent(
        self, topic: str, left: Mapping[int, int], stops: Mapping[int, int], timeout_s: float
    ) -> BrokerUnavailableError:
        where = ", ".join(f"[{p}] from {at} to {stops[p]}" for p, at in left.items())
        return BrokerUnavailableError(
            f"Kafka at {self.kafka.bootstrap} delivered nothing of {topic!r} for {timeout_s:g} s, "
            f"with more to come: {where}. Look at the broker with `moveline status`, then repeat "
            "the command; what is applied by then is not read again."
        )
