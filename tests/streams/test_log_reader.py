"""Goal: one reader of stretches of a topic that says everything it was asked for, and no more.

Method: a real broker; several partitions at once, transactions, records deleted under the reader,
and more asked for than there is.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient

from streams.errors import BrokerUnavailableError, OffsetGoneError
from streams.kafka import Producer, TopicPartition, make_producer, watermarks
from streams.log_reader import LogReader
from tests.streams.support import wait_until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streams.kafka import KafkaConfig
    from streams.log_reader import Stretch
    from streams.topics import Topics


@pytest.fixture
def reader(config: KafkaConfig) -> Iterator[LogReader]:
    """A reader that is closed again."""
    opened = LogReader.open(config)
    yield opened
    opened.close()


def produce(producer: Producer, topic: str, partition: int, count: int) -> None:
    for number in range(count):
        producer.produce(topic, b"%d" % number, partition=partition)
    assert producer.flush(30) == 0


@dataclass
class Read:
    """What a reading has brought."""

    stretches: Iterator[Stretch]
    values: dict[int, list[int]] = field(default_factory=lambda: defaultdict(list))
    ends: dict[int, int] = field(default_factory=dict)

    def to_end(self) -> None:
        for stretch in self.stretches:
            for message in stretch.messages:
                self.values[message.partition() or 0].append(int(message.value() or b""))
            self.ends |= stretch.ends


def test_each_partition_is_read_from_its_start_to_before_its_stop(
    config: KafkaConfig, topics: Topics, reader: LogReader
) -> None:
    producer = make_producer(config)
    for partition, count in ((0, 300), (1, 50), (2, 20)):
        produce(producer, topics.events, partition, count)
    starts, stops = {0: 10, 1: 0, 2: 5, 3: 0}, {0: 290, 1: 50, 2: 5, 3: 0}
    read = Read(reader.stretches(topics.events, starts, stops, records_max=40))
    read.to_end()
    assert read.values == {0: list(range(10, 290)), 1: list(range(50))}
    assert read.ends == {0: 290, 1: 50}


def test_one_reader_reads_again_after_a_reading_was_given_up(
    config: KafkaConfig, topics: Topics, reader: LogReader
) -> None:
    produce(make_producer(config), topics.events, 0, 100)
    for messages, end in reader.read(topics.events, 0, 0, 100, records_max=10):
        assert len(messages) == end
        break
    values = [
        message.value()
        for messages, _ in reader.read(topics.events, 0, 95, 100)
        for message in messages
    ]
    assert values == [b"95", b"96", b"97", b"98", b"99"]


def test_markers_are_passed_over_and_an_open_transaction_ends_the_reading(
    config: KafkaConfig, topics: Topics, reader: LogReader
) -> None:
    settings = {"bootstrap.servers": config.bootstrap, "transactional.id": topics.prefix}
    producer = Producer(settings)
    producer.init_transactions()
    producer.begin_transaction()
    producer.produce(topics.events, b"a", partition=0)
    producer.commit_transaction()
    wait_until(lambda: reader.bounds(topics.events, 0).high == 2)
    read = list(reader.read(topics.events, 0, 0, 2))
    assert [message.value() for messages, _ in read for message in messages] == [b"a"]
    assert read[-1][1] == 2

    producer.begin_transaction()
    producer.produce(topics.events, b"b", partition=0)
    assert producer.flush(30) == 0
    assert [end for _, end in reader.read(topics.events, 0, 0, 3)][-1] == 2
    producer.abort_transaction()


def test_offsets_that_are_gone_are_an_error_after_what_was_there(
    config: KafkaConfig, topics: Topics, reader: LogReader
) -> None:
    producer = make_producer(config)
    produce(producer, topics.events, 0, 10)
    produce(producer, topics.events, 1, 10)
    place = TopicPartition(topics.events, 0, 4)
    admin = AdminClient({"bootstrap.servers": config.bootstrap})
    admin.delete_records([place])[place].result()
    wait_until(lambda: watermarks(config, topics.events)[0] == (4, 10))
    read = Read(reader.stretches(topics.events, {0: 1, 1: 0}, {0: 10, 1: 10}))
    with pytest.raises(OffsetGoneError, match=r"partitions \[0\]"):
        read.to_end()
    assert 0 not in read.ends


def test_a_broker_that_delivers_nothing_is_an_error_in_time(
    config: KafkaConfig, topics: Topics, reader: LogReader
) -> None:
    produce(make_producer(config), topics.events, 0, 5)
    read = Read(reader.stretches(topics.events, {0: 0}, {0: 6}, timeout_s=5))
    with pytest.raises(BrokerUnavailableError, match=r"\[0\] from 5 to 6"):
        read.to_end()
    assert read.ends == {0: 5}
