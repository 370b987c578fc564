"""From Kafka records to what each user's state takes: decode, judge, group. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from features.errors import InvalidEventError
from features.events import (
    CONTENT_TYPE_HEADER,
    MSGPACK_TYPE,
    VALUE_BYTES_MAX,
    decode_checked,
    decode_event,
    domain_hash,
    event_hash,
    judge_ranges,
    judge_rules,
)
from features.state import NO_DWELL, NO_VALUE, Accepted, Position
from streams.seal import cut_at_seals, is_seal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig
    from features.errors import Reason
    from features.events import Event

Headers = list[tuple[str, bytes | None]]


class Record(msgspec.Struct, frozen=True, gc=False):
    """One Kafka record as the broker handed it out."""

    partition: int
    offset: int
    append_time_ms: int
    key: bytes | None
    value: bytes | None
    headers: Headers | None


class DeadLetter(NamedTuple):
    """A record that is not an event, and why."""

    record: Record
    reason: Reason
    detail: str


@dataclass
class MicroBatch:
    """A micro-batch sorted by what has to happen to it.

    Attributes:
        by_user: valid events that enter streams, per user in offset order.
        dead_letters: records that break the contract.
        domains: text of every domain seen, by hash.
        ends: by partition, the offset after the last record looked at, or that of its seal.
        seals: by partition, the offset of the record that ends it, if it came by.
        num_records: records looked at.
        num_outside: valid events whose action does not enter the streams.
    """

    by_user: dict[int, list[Accepted]] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    domains: dict[int, str] = field(default_factory=dict)
    ends: dict[int, int] = field(default_factory=dict)
    seals: dict[int, int] = field(default_factory=dict)
    num_records: int = 0
    num_outside: int = 0


def is_msgpack(headers: Headers | None) -> bool:
    """Return whether a record's content-type header says MessagePack."""
    return headers is not None and (CONTENT_TYPE_HEADER, MSGPACK_TYPE) in headers


def accept_record(record: Record, config: StateConfig) -> Event:
    """Return the event in a record, judged by the generation's rules.

    Raises:
        InvalidEventError: it belongs into the dead-letter topic.
    """
    event = decode_event(record.value, msgpack=is_msgpack(record.headers))
    judge_ranges(event, record.key)
    judge_rules(event, append_time_ms=record.append_time_ms, config=config)
    return event


def _plain_event(record: Record, codes: dict[str, int], tolerance_ms: int) -> Event | None:
    """Return the event if it is one beyond doubt, which almost all are; None leaves it open.

    The same judgement as `accept_record`, by the decoder itself and without reasons.
    """
    value = record.value
    if record.headers is not None or value is None or len(value) > VALUE_BYTES_MAX:
        return None
    event = decode_checked(value, record.key)
    if (
        event is None
        or event.action not in codes
        or event.event_time_ms - record.append_time_ms > tolerance_ms
    ):
        return None
    return event


def to_accepted(event: Event, record: Record, codes: dict[str, int], source: int = 0) -> Accepted:
    """Return a valid event as the step takes it."""
    return Accepted(
        Position(source, record.partition, record.offset),
        record.append_time_ms,
        event.item_id,
        event.event_time_ms,
        domain_hash(event.domain),
        event_hash(event.event_id),
        NO_DWELL if event.dwell_ms is None else event.dwell_ms,
        NO_VALUE if event.value is None else event.value,
        codes[event.action],
    )


def sort_records(records: Sequence[Record], config: StateConfig, source: int = 0) -> MicroBatch:
    """Return the micro-batch in `records`; nothing is dropped without a count.

    Only what comes after a seal is passed over: `moveline repartition` moves it.
    """
    batch = MicroBatch()
    codes, entering = config.codes, config.entering
    tolerance_ms = config.future_tolerance_ms
    by_user, domains, ends = batch.by_user, batch.domains, batch.ends
    for record in records:
        batch.num_records += 1
        ends[record.partition] = record.offset + 1
        event = _plain_event(record, codes, tolerance_ms)
        if event is None:
            try:
                event = accept_record(record, config)
            except InvalidEventError as error:
                if is_seal(record.key, record.value, record.headers):
                    return _sort_sealed(records, config, source)
                batch.dead_letters.append(DeadLetter(record, error.reason, error.detail))
                continue
        if event.action not in entering:
            batch.num_outside += 1
            continue
        accepted = to_accepted(event, record, codes, source)
        if event.domain is not None:
            domains[accepted.domain] = event.domain
        events = by_user.get(event.user_id)
        if events is None:
            by_user[event.user_id] = [accepted]
        else:
            events.append(accepted)
    return batch


def _sort_sealed(records: Sequence[Record], config: StateConfig, source: int) -> MicroBatch:
    kept, seals = cut_at_seals(records)
    batch = sort_records(kept, config, source)
    batch.seals = seals
    # A partition goes on at its seal for ever: whoever reads it again has to see it first.
    batch.ends |= seals
    return batch


def dead_letter_headers(letter: DeadLetter, topic: str) -> Sequence[tuple[str, bytes]]:
    """Return the headers that say where a dead letter came from and why it is one."""
    record = letter.record
    kept = [(name, value) for name, value in record.headers or [] if value is not None]
    return [
        *kept,
        ("moveline-reason", letter.reason.value.encode()),
        ("moveline-detail", letter.detail.encode()[:DETAIL_BYTES_MAX]),
        ("moveline-topic", topic.encode()),
        ("moveline-partition", b"%d" % record.partition),
        ("moveline-offset", b"%d" % record.offset),
        ("moveline-append-time-ms", b"%d" % record.append_time_ms),
    ]


# A detail is for a person's eye; the original bytes are the record's value.
DETAIL_BYTES_MAX = 512
