"""Pointers in the compacted control topic: the record of truth that a restored Redis follows."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

import msgspec

from features.redis import Pointers
from streams.errors import BrokerUnavailableError, DeliveryError
from streams.kafka import KafkaConfig, TopicPartition, make_consumer, make_producer, watermarks

if TYPE_CHECKING:
    from streams.topics import Topics

POINTERS_KEY: Final = b"pointers"
_TIMEOUT_S: Final = 10.0


def write_pointers(kafka: KafkaConfig, topics: Topics, pointers: Pointers) -> None:
    """Record what is live; returns once the broker has acknowledged it.

    Raises:
        DeliveryError: the broker did not take it.
    """
    failed: list[object] = []
    producer = make_producer(kafka)
    producer.produce(
        topics.control,
        key=POINTERS_KEY,
        value=msgspec.json.encode(pointers),
        on_delivery=lambda error, _: failed.append(error) if error else None,
    )
    if producer.flush(_TIMEOUT_S) or failed:
        raise DeliveryError(
            f"the pointers were not recorded in {topics.control} ({failed}): "
            "nothing changed. Check `moveline status` and publish again.",
            retriable=True,
        )


def read_pointers(kafka: KafkaConfig, topics: Topics) -> Pointers | None:
    """Return the last recorded pointers, None before the first publication.

    Raises:
        BrokerUnavailableError: the topic could not be read to its end.
    """
    low, high = watermarks(kafka, topics.control)[0]
    if low == high:
        return None
    consumer = make_consumer(kafka, group="moveline-control-reader")
    consumer.assign([TopicPartition(topics.control, 0, low)])
    newest = None
    deadline = time.monotonic() + _TIMEOUT_S
    try:
        while True:
            message = consumer.poll(0.2)
            if message is not None and message.error() is None:
                if message.key() == POINTERS_KEY:
                    newest = message.value()
                if (message.offset() or 0) >= high - 1:
                    break
            elif consumer.position([TopicPartition(topics.control, 0)])[0].offset >= high:
                break
            if time.monotonic() > deadline:
                raise BrokerUnavailableError(
                    f"{topics.control} at {kafka.bootstrap} could not be read to offset {high} "
                    f"within {_TIMEOUT_S} s: check the broker with `moveline status`."
                )
    finally:
        consumer.close()
    return None if newest is None else msgspec.json.decode(newest, type=Pointers)
