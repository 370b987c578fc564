"""What several tests of this area need: events by number, and everything a topic holds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from features.events import Event
from streams.kafka import TopicPartition, make_consumer, watermarks

if TYPE_CHECKING:
    from collections.abc import Callable

    from streams.kafka import KafkaConfig, Message

START_MS = 1_763_700_000_000
# Where nothing listens: the discard port.
NOWHERE = "127.0.0.1:9"


def make_event(number: int, **changes: Any) -> Event:  # noqa: ANN401 - also wrong types, on purpose
    """Return a valid event; 50 users take turns."""
    fields: dict[str, Any] = {
        "event_id": f"e{number}",
        "user_id": number % 50,
        "item_id": number % 97,
        "action": "click",
        "event_time_ms": START_MS + number,
        "domain": f"d{number % 3}",
    }
    return Event(**{**fields, **changes})


def read_all(config: KafkaConfig, topic: str, *, timeout_s: float = 30.0) -> list[Message]:
    """Return every record of the topic, by partition and offset."""
    bounds = watermarks(config, topic)
    missing = {number: high for number, (low, high) in bounds.items() if high > low}
    found: list[Message] = []
    consumer = make_consumer(config, group="tests")
    consumer.assign([TopicPartition(topic, number, bounds[number][0]) for number in missing])
    deadline = time.monotonic() + timeout_s
    try:
        while missing:
            assert time.monotonic() < deadline, f"not read in {timeout_s} s: {missing}"
            for message in consumer.consume(1_000, 0.2):
                assert message.error() is None, message.error()
                found.append(message)
                if message.offset() == missing.get(message.partition(), -1) - 1:
                    del missing[message.partition()]
    finally:
        consumer.close()
    return sorted(found, key=lambda message: (message.partition(), message.offset()))


def wait_until(condition: Callable[[], bool], *, timeout_s: float = 30.0) -> None:
    """Return once the condition holds; fail if it does not in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"not true within {timeout_s} s"
        time.sleep(0.01)
