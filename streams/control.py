"""The compacted control topic: records of truth that a restored Redis follows.

Newest record of a key wins. `pointers:TOKEN` says what is live, `was_live:VERSION` what was before,
`promotion` which generation was, `memories` which memory versions are kept up to date,
`redriven:REASON` up to where dead letters were sent again.

Whoever moves the pointers claims a token first: the position of a record in this topic, so that
tokens only grow, also when Redis is lost. Of all pointers those with the greatest token hold. What
a process that slept writes late is in the topic, and nobody follows it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from features.clock import now_ms
from features.errors import StaleTokenError
from features.lifelong import LiveMemory
from features.redis import Pointers
from streams.errors import DeliveryError
from streams.kafka import KafkaConfig, make_producer, watermarks
from streams.log_reader import LogReader

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streams.kafka import KafkaError, Message
    from streams.topics import Topics

# The pointers of an installation from before there were tokens; the same as token 0.
POINTERS_KEY: Final = b"pointers"
CLAIM_KEY: Final = b"claim"
_WAS_LIVE: Final = b"was_live:"
PROMOTION_KEY: Final = b"promotion"
MEMORIES_KEY: Final = b"memories"
_TIMEOUT_S: Final = 10.0


class Promotion(msgspec.Struct, frozen=True):
    """The last change of the live generation: what `moveline demote` takes back."""

    generation: int
    previous: int | None
    at_ms: int


class Claim(msgspec.Struct, frozen=True):
    """Who wanted to move the pointers last; for people."""

    owner: str
    at_ms: int


def claim_token(kafka: KafkaConfig, topics: Topics, owner: str) -> int:
    """Return a token greater than every one before it; raises as `write_pointers` does.

    Args:
        kafka: where the topic is.
        topics: of the installation.
        owner: the command that claims it, for people who read the topic.
    """
    placed: list[int] = []
    value = msgspec.json.encode(Claim(owner, now_ms()))

    def delivered(error: KafkaError | None, message: Message) -> None:
        offset = message.offset()
        if error is None and offset is not None:
            placed.append(offset)

    producer = make_producer(kafka)
    producer.produce(topics.control, key=CLAIM_KEY, value=value, on_delivery=delivered)
    if producer.flush(_TIMEOUT_S) or not placed:
        raise DeliveryError(
            f"{topics.control} did not take a claim: nothing changed. Check `moveline status` and "
            "try again.",
            retriable=True,
        )
    # Token 0 is that of pointers without one: the first record's position must not equal it.
    return placed[0] + 1


def write_pointers(kafka: KafkaConfig, topics: Topics, pointers: Pointers) -> None:
    """Record what is live; returns once the broker has acknowledged it.

    Raises:
        DeliveryError: the broker did not take it.
        StaleTokenError: pointers with a greater token are recorded; those hold.
    """
    _write(kafka, topics, pointers, {})


def write_promotion(
    kafka: KafkaConfig, topics: Topics, pointers: Pointers, promotion: Promotion
) -> None:
    """Record what is live and what was before; raises as `write_pointers` does.

    The promotion comes first: one without its pointers names a generation that is not live, and
    is not believed.
    """
    _write(kafka, topics, pointers, {PROMOTION_KEY: msgspec.json.encode(promotion)})


def _write(
    kafka: KafkaConfig, topics: Topics, pointers: Pointers, first: Mapping[bytes, bytes]
) -> None:
    """Record what was live, then `first`, then the pointers; then remove what they replace."""
    before = newest_pointers(read_records(kafka, topics))
    _refuse_stale(pointers, before)
    records = dict(first)
    if before is not None and before.model_version not in {None, pointers.model_version}:
        records[_WAS_LIVE + b"%d" % before.model_version] = msgspec.json.encode(before)
    records[pointers_key(pointers.token)] = msgspec.json.encode(pointers)
    write_records(kafka, topics, records)
    after = read_records(kafka, topics)
    older = [
        key
        for key, value in after.items()
        if (found := decode_pointers(key, value)) and found.token < pointers.token
    ]
    if older:
        write_records(kafka, topics, dict.fromkeys(older))
    # Between the look and the write somebody with a greater token may have been faster.
    _refuse_stale(pointers, newest_pointers(after))


def _refuse_stale(pointers: Pointers, held: Pointers | None) -> None:
    if held is not None and held.token > pointers.token:
        raise StaleTokenError(pointers.token, held.token)


def pointers_key(token: int) -> bytes:
    """Return the record's key.

    >>> pointers_key(0), pointers_key(7)
    (b'pointers', b'pointers:7')
    """
    return POINTERS_KEY + b":%d" % token if token else POINTERS_KEY


def decode_pointers(key: bytes | None, value: bytes | None) -> Pointers | None:
    """Return what a record says is live, None if it says nothing of that.

    >>> decode_pointers(b"pointers:7", b'{"model_version":3,"generation":1,"token":7}').token
    7
    >>> decode_pointers(b"pointers:7", None), decode_pointers(b"memories", b"[]")
    (None, None)
    """
    if not key or not value or key.partition(b":")[0] != POINTERS_KEY:
        return None
    return msgspec.json.decode(value, type=Pointers)


def newest_pointers(records: Mapping[bytes, bytes]) -> Pointers | None:
    """Return those with the greatest token."""
    found = [one for key, value in records.items() if (one := decode_pointers(key, value))]
    return max(found, key=lambda one: one.token, default=None)


def read_pointers(kafka: KafkaConfig, topics: Topics) -> Pointers | None:
    """Return the recorded pointers that hold, None before the first publication.

    Raises:
        BrokerUnavailableError: the topic could not be read to its end.
    """
    return newest_pointers(read_records(kafka, topics))


def were_live(records: Mapping[bytes, bytes]) -> dict[int, Pointers]:
    """Return, by model version, the last pointers that named each that was replaced."""
    return {
        int(key.removeprefix(_WAS_LIVE)): msgspec.json.decode(value, type=Pointers)
        for key, value in records.items()
        if key.startswith(_WAS_LIVE) and value
    }


def forget_live(kafka: KafkaConfig, topics: Topics, versions: Sequence[int]) -> None:
    """Record that there is no going back to these; raises as `write_records` does."""
    if versions:
        write_records(kafka, topics, {_WAS_LIVE + b"%d" % version: None for version in versions})


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


def write_records(
    kafka: KafkaConfig, topics: Topics, records: Mapping[bytes, bytes | None]
) -> None:
    """Return once the broker has acknowledged every record, in this order; None removes one.

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
