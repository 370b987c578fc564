"""Reads stretches of the log by offset, outside every group: offsets of others never move."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from streams.errors import BrokerUnavailableError
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
    from collections.abc import Iterator

    from streams.kafka import Consumer, Message

# How long a broker that holds the records may take to hand out the first of them.
TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.1


class Bounds(NamedTuple):
    """The oldest offset a partition still has, and the one after the newest."""

    low: int
    high: int


@dataclass
class LogReader:
    """One consumer that only assigns."""

    kafka: KafkaConfig
    consumer: Consumer

    @classmethod
    def open(cls, kafka: KafkaConfig) -> LogReader:
        """Return a reader; close it."""
        return cls(kafka, make_consumer(kafka, group="moveline-nearline-reader", reader=True))

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
        self, topic: str, partition: int, start: int, stop: int, *, records_max: int
    ) -> Iterator[tuple[list[Message], int]]:
        """Yield the records of [start, stop) in stretches, each with the offset after it.

        Offsets that hold no record (transaction markers) are passed over; an open transaction
        ends the reading before `stop`.

        Raises:
            StreamError: the broker does not hand them out.
        """
        self.consumer.assign([TopicPartition(topic, partition, start)])
        at, deadline = start, time.monotonic() + TIMEOUT_S
        try:
            is_end = False
            while at < stop and not is_end:
                messages = self.consumer.consume(records_max, _POLL_S)
                records, at, is_end = self._sorted_out(messages, at)
                if messages:
                    deadline = time.monotonic() + TIMEOUT_S
                    yield records, at
                elif time.monotonic() > deadline:
                    raise BrokerUnavailableError(
                        f"{topic}[{partition}] could not be read from offset {at} to {stop} "
                        f"within {TIMEOUT_S:g} s: check the broker with `moveline status`."
                    )
        except KafkaException as error:
            raise as_stream_error(error, self.kafka) from error
        finally:
            self.consumer.unassign()

    def _sorted_out(self, messages: list[Message], at: int) -> tuple[list[Message], int, bool]:
        records, is_end = [], False
        for message in messages:
            error, offset = message.error(), message.offset() or 0
            if error is None:
                records.append(message)
                at = offset + 1
            elif is_end_of_partition(error):
                at, is_end = max(at, offset), True
            elif error.fatal() or is_offset_gone(error):
                raise as_stream_error(error, self.kafka)
        return records, at, is_end
