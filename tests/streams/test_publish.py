"""Bulk sending of events and items against a real broker.

Goal: everything arrives, at no more than the rate asked for, and the report counts it.
"""

from __future__ import annotations

import pytest

from features.catalogue import Item, decode_item
from streams.errors import DeliveryError
from streams.kafka import KafkaConfig
from streams.producer import EventProducer
from streams.publish import publish_events, publish_items
from streams.topics import Topics
from tests.streams.support import NOWHERE, make_event, read_all

pytestmark = pytest.mark.servers


def test_events_arrive_and_are_counted(
    config: KafkaConfig, topics: Topics, capfd: pytest.CaptureFixture[str]
) -> None:
    events = [make_event(number) for number in range(3_500)]
    with EventProducer(config, topics.events) as producer:
        producer.send_and_wait(make_event(9_999))
        report = publish_events(producer, iter(events), total=3_500)
    assert (report.num_sent, report.num_delivered, report.num_failed) == (3_500, 3_500, 0)
    assert report.events_per_s == pytest.approx(3_500 / report.seconds)
    assert len(read_all(config, topics.events)) == 3_501
    out, err = capfd.readouterr()
    assert out == ""
    assert "3500/3500" in err


@pytest.mark.parametrize("rate", [200.0, 5_000.0])
def test_the_rate_is_kept(config: KafkaConfig, topics: Topics, rate: float) -> None:
    total = int(rate * 0.8)
    with EventProducer(config, topics.events) as producer:
        producer.send_and_wait(make_event(0))  # connecting is no part of the rate
        report = publish_events(producer, map(make_event, range(total)), rate=rate, progress=False)
    assert report.num_delivered == total
    # The last event is due one period before the end, and may leave a millisecond early. How late
    # it leaves is the machine's; the bound is for a rate that never ends.
    assert (total - 1) / rate - 0.002 <= report.seconds < (total - 1) / rate + 30


@pytest.mark.parametrize("rate", [0, -1])
def test_a_rate_without_progress_is_refused(rate: float) -> None:
    producer = EventProducer(KafkaConfig(NOWHERE), "any")
    with pytest.raises(ValueError, match="above 0"):
        publish_events(producer, [make_event(0)], rate=rate)


def test_failures_are_reported_with_their_events() -> None:
    producer = EventProducer(KafkaConfig(NOWHERE), "any", delivery_timeout_ms=100)
    report = publish_events(producer, map(make_event, range(20)), progress=False)
    assert (report.num_sent, report.num_delivered, report.num_failed) == (20, 0, 20)
    assert report.undelivered == tuple(make_event(number) for number in range(20))
    assert report.first_failure is not None
    assert NOWHERE in report.first_failure


def test_items_arrive_under_their_id(config: KafkaConfig, topics: Topics) -> None:
    items = [Item(item_id=number, name=f"item {number}") for number in range(1_500)]
    report = publish_items(config, topics, items, progress=False)
    assert (report.num_sent, report.num_delivered) == (1_500, 1_500)
    messages = read_all(config, topics.items)
    assert [decode_item(message.value() or b"") for message in messages] == items
    assert [message.key() for message in messages] == [b"%d" % item.item_id for item in items]


def test_items_without_a_broker_are_an_error() -> None:
    absent = KafkaConfig(NOWHERE, {"delivery.timeout.ms": "200"})
    with pytest.raises(DeliveryError, match="1 of 1 items were not delivered"):
        publish_items(absent, Topics(), [Item(item_id=1, name="a")], progress=False)
