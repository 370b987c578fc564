"""EventProducer and its asyncio sibling, against a real broker and against none.

Goal: what is acknowledged is in the log where the delivery says; what is not acknowledged comes
back to the caller; what no reader would take never leaves.
"""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING
from unittest.mock import Mock

import pytest

from features.errors import InvalidEventError, Reason
from features.events import decode_event, stable_id
from streams.async_producer import AsyncEventProducer
from streams.errors import (
    DeliveryError,
    ProducerClosedError,
    QueueFullError,
    UndeliveredError,
)
from streams.kafka import KafkaConfig, Message
from streams.micro_batch import is_msgpack
from streams.producer import Delivery, EventProducer, new_event
from tests.streams.support import NOWHERE, make_event, read_all, wait_until

if TYPE_CHECKING:
    from collections.abc import Callable

    from streams.producer import Outcome
    from streams.topics import Topics

pytestmark = pytest.mark.servers

ABSENT = KafkaConfig(NOWHERE)


@pytest.mark.parametrize("msgpack", [False, True])
def test_what_was_sent_is_what_a_reader_sees(
    config: KafkaConfig, topics: Topics, *, msgpack: bool
) -> None:
    events = [make_event(number) for number in range(500)]
    with EventProducer(config, topics.events, msgpack=msgpack) as producer:
        for event in events:
            producer.send(event)
        assert producer.flush() == []
        assert producer.counters == (500, 500, 0)
    messages = read_all(config, topics.events)
    assert all(is_msgpack(message.headers()) == msgpack for message in messages)
    seen = [decode_event(message.value(), msgpack=msgpack) for message in messages]
    assert sorted(seen, key=lambda event: event.event_time_ms) == events
    keys = [message.key() for message in messages]
    assert keys == [b"%d" % event.user_id for event in seen]


def test_a_users_events_keep_their_order(config: KafkaConfig, topics: Topics) -> None:
    events = [make_event(number, user_id=7) for number in range(2_000)]
    with EventProducer(config, topics.events) as producer:
        for event in events:
            producer.send(event)
    seen = [decode_event(message.value()) for message in read_all(config, topics.events)]
    assert seen == events


def test_the_returned_position_is_the_events(config: KafkaConfig, topics: Topics) -> None:
    with EventProducer(config, topics.events) as producer:
        placed = [producer.send_and_wait(make_event(number)) for number in range(20)]
    found = {
        (message.partition(), message.offset()): message
        for message in read_all(config, topics.events)
    }
    for number, delivery in enumerate(placed):
        message = found[delivery.partition, delivery.offset]
        assert decode_event(message.value()) == make_event(number)
        assert message.timestamp()[1] == delivery.append_time_ms
    assert [delivery.acked_s for delivery in placed] == sorted(d.acked_s for d in placed)


def test_callbacks_get_every_delivery(config: KafkaConfig, topics: Topics) -> None:
    outcomes: dict[str, Outcome] = {}
    with EventProducer(config, topics.events) as producer:
        for number in range(100):
            producer.send(
                make_event(number),
                on_delivery=lambda event, outcome: outcomes.update({event.event_id: outcome}),
            )
    assert outcomes.keys() == {f"e{number}" for number in range(100)}
    assert all(isinstance(outcome, Delivery) for outcome in outcomes.values())


def test_threads_may_share_a_producer(config: KafkaConfig, topics: Topics) -> None:
    with EventProducer(config, topics.events) as producer:

        def send(first: int) -> None:
            for number in range(first, first + 1_000):
                producer.send(make_event(number))

        threads = [threading.Thread(target=send, args=(first,)) for first in (0, 1_000, 2_000)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert producer.flush() == []
        assert producer.counters == (3_000, 3_000, 0)
    seen = {decode_event(message.value()).event_id for message in read_all(config, topics.events)}
    assert seen == {f"e{number}" for number in range(3_000)}


def test_a_full_queue_waits_and_then_says_so() -> None:
    producer = EventProducer(ABSENT, "any", queue_events_max=10, queue_wait_s=0.3)
    for number in range(10):
        producer.send(make_event(number))
    started = time.monotonic()
    with pytest.raises(QueueFullError, match=r"10 events wait.*at most 10") as caught:
        producer.send(make_event(10))
    assert 0.3 <= time.monotonic() - started < 30
    assert (caught.value.num_queued, caught.value.limit) == (10, 10)
    assert producer.close(0.1) == [make_event(number) for number in range(10)]


def test_a_full_queue_only_slows_down_while_the_broker_is_there(
    config: KafkaConfig, topics: Topics
) -> None:
    with EventProducer(config, topics.events, queue_events_max=20) as producer:
        for number in range(2_000):
            producer.send(make_event(number))
    assert producer.counters == (2_000, 2_000, 0)


def test_flush_returns_what_was_not_delivered() -> None:
    producer = EventProducer(ABSENT, "any")
    events = [make_event(number) for number in range(50)]
    for event in events:
        producer.send(event)
    assert producer.flush(0.2) == events
    assert producer.flush(0.2) == []
    assert producer.counters == (50, 0, 50)


def test_events_that_timed_out_wait_for_flush_up_to_a_limit() -> None:
    producer = EventProducer(ABSENT, "any", queue_events_max=5, delivery_timeout_ms=100)
    for number in range(5):
        producer.send(make_event(number))
    wait_until(lambda: poll_and_count_failed(producer) == 5)
    with pytest.raises(DeliveryError, match="5 events were not delivered, at most 5"):
        producer.send(make_event(5))
    assert producer.flush(5) == [make_event(number) for number in range(5)]
    producer.send(make_event(5))
    assert producer.close(0) == [make_event(5)]


def poll_and_count_failed(producer: EventProducer) -> int:
    """Return how many deliveries have failed by now."""
    producer.poll(0.05)
    return producer.counters.num_failed


def test_leaving_the_block_with_undelivered_events_raises() -> None:
    events = tuple(make_event(number) for number in range(3))

    def send_and_leave() -> None:
        with EventProducer(ABSENT, "any", delivery_timeout_ms=100) as producer:
            for event in events:
                producer.send(event)

    with pytest.raises(UndeliveredError, match="3 events were not delivered") as caught:
        send_and_leave()
    assert caught.value.events == events


def test_waiting_for_an_absent_broker_ends_in_time() -> None:
    producer = EventProducer(ABSENT, "any")
    with pytest.raises(DeliveryError, match=r"'e1' was not acknowledged by.*0\.2 s"):
        producer.send_and_wait(make_event(1), timeout_s=0.2)
    producer.close(0)


class Stalled:
    """A client of a process that stood still: the report waits, and the deadline has passed."""

    report: Callable[[None, Mock], None]

    def __len__(self) -> int:
        return 1_000  # so many wait that nobody polls at the sending itself

    def produce(
        self, *_: object, on_delivery: Callable[[None, Mock], None], headers: object
    ) -> None:
        del headers
        self.report = on_delivery

    def poll(self, _timeout_s: float) -> None:
        message = Mock(spec=Message)
        message.partition.return_value, message.offset.return_value = 1, 7
        message.topic.return_value, message.timestamp.return_value = "any", (1, 1_000)
        self.report(None, message)


def test_an_acknowledgement_that_waits_in_the_queue_counts_after_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.producer.make_producer", lambda *_, **__: Stalled())
    delivery = EventProducer(ABSENT, "any").send_and_wait(make_event(1), timeout_s=0.0)
    assert delivery.position == (1, 7)


def test_a_topic_that_is_not_there_fails_the_delivery(config: KafkaConfig) -> None:
    producer = EventProducer(config, "no-such-topic", delivery_timeout_ms=3_000)
    with pytest.raises(DeliveryError, match="no-such-topic"):
        producer.send_and_wait(make_event(1))
    assert producer.close() == []


def test_a_closed_producer_refuses() -> None:
    producer = EventProducer(ABSENT, "any")
    producer.close()
    with pytest.raises(ProducerClosedError):
        producer.send(make_event(1))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"user_id": -1}, Reason.ID_OUT_OF_RANGE),
        ({"item_id": 2**63}, Reason.ID_OUT_OF_RANGE),
        ({"user_id": "42"}, Reason.WRONG_TYPE),
        ({"action": None}, Reason.WRONG_TYPE),
        ({"event_time_ms": -1}, Reason.TIME_OUT_OF_RANGE),
        ({"event_time_ms": 1.5}, Reason.WRONG_TYPE),
        ({"dwell_ms": -1}, Reason.WRONG_TYPE),
        ({"value": 1e300}, Reason.WRONG_TYPE),
        ({"domain": object()}, Reason.WRONG_TYPE),
        ({"domain": "\ud800"}, Reason.WRONG_TYPE),
        ({"request_id": "x" * 20_000}, Reason.TOO_LARGE),
        ({"v": 2}, Reason.UNSUPPORTED_VERSION),
    ],
)
def test_what_readers_would_refuse_is_refused_at_once(
    changes: dict[str, object], reason: Reason
) -> None:
    producer = EventProducer(ABSENT, "any")
    with pytest.raises(InvalidEventError) as caught:
        producer.send(make_event(1, **changes))
    assert caught.value.reason is reason
    assert producer.counters == (0, 0, 0)
    assert producer.close(0) == []


def test_new_event_fills_in_and_hashes() -> None:
    event = new_event(user_id="anna", item_id="42", action="click")
    assert (event.user_id, event.item_id) == (stable_id("anna"), 42)
    assert abs(event.event_time_ms - time.time_ns() // 1_000_000) < 60_000
    assert event.event_id != new_event(user_id=1, item_id=1, action="click").event_id


async def test_async_sends_return_positions(config: KafkaConfig, topics: Topics) -> None:
    events = [make_event(number) for number in range(1_000)]
    async with AsyncEventProducer(config, topics.events, in_flight_max=64) as producer:
        placed = await asyncio.gather(*(producer.send(event) for event in events))
        assert producer.counters == (1_000, 1_000, 0)
    found = {
        (message.partition(), message.offset()): decode_event(message.value())
        for message in read_all(config, topics.events)
    }
    assert [found[delivery.partition, delivery.offset] for delivery in placed] == events


async def test_async_failures_reach_their_sender() -> None:
    producer = AsyncEventProducer(ABSENT, "any", in_flight_max=4, delivery_timeout_ms=100)
    for _ in range(3):  # more than the producer below keeps undelivered events for
        outcomes = await asyncio.gather(
            *(producer.send(make_event(number)) for number in range(8)), return_exceptions=True
        )
        assert [type(outcome) for outcome in outcomes] == [DeliveryError] * 8
    with pytest.raises(InvalidEventError):
        await producer.send(make_event(1, user_id=-1))
    await producer.close(0.1)
    with pytest.raises(ProducerClosedError):
        await producer.send(make_event(1))


async def test_async_close_settles_what_is_on_its_way() -> None:
    producer = AsyncEventProducer(ABSENT, "any")
    sends = [asyncio.create_task(producer.send(make_event(number))) for number in range(5)]
    await asyncio.sleep(0)  # one turn of the loop: each task has handed its event over
    assert producer.counters.num_sent == 5
    await producer.close(0.1)
    outcomes = await asyncio.wait_for(asyncio.gather(*sends, return_exceptions=True), 10)
    assert [type(outcome) for outcome in outcomes] == [DeliveryError] * 5
