"""Bulk sending: many events at a chosen rate, and the item catalogue."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from features.catalogue import encode_item
from streams.errors import DeliveryError
from streams.kafka import make_producer
from streams.progress import REPORT_EVERY, progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from features.catalogue import Item
    from features.events import Event
    from streams.kafka import KafkaConfig, KafkaError, Message
    from streams.producer import EventProducer
    from streams.topics import Topics

# What the end of a bulk send waits for the last acknowledgements.
FLUSH_TIMEOUT_S: Final = 60.0
# Sleeping for less would cost more than it holds back; the schedule makes up for it.
_AHEAD_MIN_S: Final = 0.001


@dataclass(frozen=True, kw_only=True)
class PublishReport:
    """What a bulk send did.

    Attributes:
        undelivered: the events behind `num_failed`; sending them again is harmless.
        first_failure: why the first of them failed, in words.
    """

    num_sent: int
    num_delivered: int
    num_failed: int
    seconds: float
    events_per_s: float
    undelivered: tuple[Event, ...] = ()
    first_failure: str | None = None


def publish_events(
    producer: EventProducer,
    events: Iterable[Event],
    *,
    rate: float | None = None,
    total: int | None = None,
    progress: bool = True,
) -> PublishReport:
    """Send every event and wait for the broker's answers.

    Args:
        producer: stays open; only its events of this call are counted.
        events: taken one by one, never held together.
        rate: events per second at most, on a schedule fixed at the start: a late event is made up
            for, so that the average does not drift. None: as fast as the broker takes them.
        total: how many there are, for the bar.
        progress: show a bar on stderr.

    Raises:
        InvalidEventError: an event readers would refuse; those before it are sent.
        QueueFullError: the broker takes nothing any more.
        DeliveryError: more events are undelivered than the producer keeps.
        ValueError: a rate that is not above 0.
    """
    if rate is not None and rate <= 0:
        raise ValueError(f"rate={rate}: give events per second above 0, or leave it out.")
    before = producer.counters
    started_s = time.monotonic()
    with progress_bar("publish", total=total, shown=progress) as advance:
        num_shown = 0
        for num_sent, event in enumerate(_paced(producer, events, rate, started_s), start=1):
            producer.send(event)
            if num_sent - num_shown >= _report_every(rate):
                advance(num_sent - num_shown)
                num_shown = num_sent
        undelivered = producer.flush(FLUSH_TIMEOUT_S)
        advance(producer.counters.num_sent - before.num_sent - num_shown)
    seconds = time.monotonic() - started_s
    after = producer.counters
    num_delivered = after.num_delivered - before.num_delivered
    return PublishReport(
        num_sent=after.num_sent - before.num_sent,
        num_delivered=num_delivered,
        num_failed=after.num_failed - before.num_failed,
        seconds=seconds,
        events_per_s=num_delivered / max(seconds, 1e-9),
        undelivered=tuple(undelivered),
        first_failure=str(producer.first_failure) if undelivered else None,
    )


def publish_items(
    config: KafkaConfig,
    topics: Topics,
    items: Iterable[Item],
    *,
    total: int | None = None,
    progress: bool = True,
) -> PublishReport:
    """The catalogue topic holds every item, acknowledged; the last entry of an item_id wins.

    Raises:
        DeliveryError: the broker did not take them all; run it again.
    """
    producer = make_producer(config)
    failures: list[str] = []

    def report(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            failures.append(error.str())

    started_s = time.monotonic()
    num_sent = 0
    with progress_bar("items", total=total, unit="items", shown=progress) as advance:
        for num_sent, item in enumerate(items, start=1):
            key, value = b"%d" % item.item_id, encode_item(item)
            while True:
                try:
                    producer.produce(topics.items, value, key, on_delivery=report)
                    break
                except BufferError:
                    producer.poll(FLUSH_TIMEOUT_S)
            if num_sent % REPORT_EVERY == 0:
                producer.poll(0)
                advance(REPORT_EVERY)
        num_waiting = producer.flush(FLUSH_TIMEOUT_S)
        advance(num_sent % REPORT_EVERY)
    if failures or num_waiting:
        raise DeliveryError(
            f"{len(failures) + num_waiting} of {num_sent} items were not delivered to "
            f"{topics.items!r} at {config.bootstrap} ({(failures or ['no answer in time'])[0]}). "
            "Look at the broker, then load the same file again.",
            retriable=True,
        )
    seconds = time.monotonic() - started_s
    return PublishReport(
        num_sent=num_sent,
        num_delivered=num_sent,
        num_failed=0,
        seconds=seconds,
        events_per_s=num_sent / max(seconds, 1e-9),
    )


def _paced(
    producer: EventProducer, events: Iterable[Event], rate: float | None, started_s: float
) -> Iterator[Event]:
    """Yield each event when it is due; reports are served while waiting."""
    for number, event in enumerate(events):
        if rate is not None:
            while True:
                ahead_s = started_s + number / rate - time.monotonic()
                if ahead_s < _AHEAD_MIN_S:
                    break
                producer.poll(ahead_s)
        yield event


def _report_every(rate: float | None) -> int:
    """Return how many events pass between two moves of the bar: about ten a second if paced."""
    return REPORT_EVERY if rate is None else max(1, min(REPORT_EVERY, int(rate / 10)))
