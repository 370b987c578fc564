"""The compacted control topic: records of truth that a restored Redis follows.

Newest record of a key wins. `pointers` says what is live, `promotion` what was live before it,
`memories` which memory versions are kept up to date, `redriven:REASON` up to where dead letters
were sent again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from features.lifelong import LiveMemory
from features.redis import Pointers
from streams.errors import DeliveryError
from streams.kafka import KafkaConfig, make_producer, watermarks
from streams.log_reader import LogReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streams.topics import Topics

POINTERS_KEY: Final = b"pointers"
PROMOTION_KEY: Final = b"promotion"
MEMORIES_KEY: Final = b"memories"
_TIMEOUT_S: Final = 10.0


class Promotion(msgspec.Struct, frozen=True):
    """The last change of the live generation: what `moveline demote` takes back."""

    generation: int
    previous: int | None
    at_ms: int


def write_pointers(kafka: KafkaConfig, topics: Topics, pointers: Pointers) -> None:
    """Record what is live; returns once the broker has acknowledged it.

    Raises:
        DeliveryError: the broker did not take it.
    """
    write_records(kafka, topics, {POINTERS_KEY: msgspec.json.encode(pointers)})


def write_promotion(
    kafka: KafkaConfig, topics: Topics, pointers: Pointers, promotion: Promotion
) -> None:
    """Record what is live and what was before; raises as `write_pointers` does.

    The promotion comes first: one without its pointers names a generation that is not live, and
    is not believed.
    """
    records = {
        PROMOTION_KEY: msgspec.json.encode(promotion),
        POINTERS_KEY: msgspec.json.encode(pointers),
    }
    write_records(kafka, topics, records)


def read_pointers(kafka: KafkaConfig, topics: Topics) -> Pointers | None:
    """Return the last recorded pointers, None before the first publication.

    Raises:
        BrokerUnavailableError: the topic could not be read to its end.
    """
    newest = read_records(kafka, topics).get(POINTERS_KEY)
    return None if newest is None else msgspec.json.decode(newest, type=Pointers)


def read_promotion(kafka: KafkaConfig, topics: Topics) -> Promotion | None:
    """Return the last promotion, None before the first; raises as `read_pointers` does."""
    newest = read_records(kafka, topics).get(PROMOTION_KEY)
    return None if newest is None else msgspec.json.decode(newest, type=Promotion)


def write_memories(kafka: KafkaConfig, topics: Topics, live: Sequence[LiveMemory]) -> None:
    """Record which memory versions are kept up to date; raises as `write_pointers` does."""
    write_records(kafka, topics, {MEMORIES_KEY: msgspec.json.encode(live)})


def read_memories(kafka: KafkaConfig, topics: Topics) -> tuple[LiveMemory, ...]:
    """Return the memory versions that are kept up to date; raises as `read_pointers` does."""
    newest = read_records(kafka, topics).get(MEMORIES_KEY)
    return decode_memories(newest) if newest else ()


def decode_memories(raw: bytes) -> tuple[LiveMemory, ...]:
    """Return what a record `memories` says."""
    return msgspec.json.decode(raw, type=tuple[LiveMemory, ...])


def write_records(kafka: KafkaConfig, topics: Topics, records: Mapping[bytes, bytes]) -> None:
    """Return once the broker has acknowledged every record, in this order.

    Raises:
        DeliveryError: the broker did not take one.
    """
    failed: list[object] = []
    producer = make_producer(kafka)
    for key, value in records.items():
        producer.produce(
            topics.control,
            key=key,
            value=value,
            on_delivery=lambda error, _: failed.append(error) if error else None,
        )
    if producer.flush(_TIMEOUT_S) or failed:
        names = ", ".join(key.decode() for key in records)
        raise DeliveryError(
            f"the {names} were not recorded in {topics.control} ({failed}): "
            "nothing changed. Check `moveline status` and try again.",
            retriable=True,
        )


def read_records(kafka: KafkaConfig, topics: Topics) -> dict[bytes, bytes]:
    """Return the newest record of each key; raises as `read_pointers` does."""
    low, high = watermarks(kafka, topics.control)[0]
    newest: dict[bytes, bytes] = {}
    reader = LogReader.open(kafka)
    try:
        for messages, _ in reader.read(topics.control, 0, low, high):
            newest |= {message.key() or b"": message.value() or b"" for message in messages}
    finally:
        reader.close()
    return newest
