"""The door to Kafka, against a real broker.

Goal: what is asked of the broker comes back as plain numbers, and every refusal is an error of
ours that names value, limit and the way out.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient

from streams.errors import (
    BrokerUnavailableError,
    KafkaConfigError,
    TopicMismatchError,
    TopicMissingError,
)
from streams.kafka import (
    KafkaConfig,
    TopicPartition,
    committed,
    end_offsets,
    ensure_topics,
    is_end_of_partition,
    is_offset_gone,
    make_consumer,
    make_producer,
    offsets_for_time,
    partition_count,
    watermarks,
)
from streams.topics import Topics, TopicSpec
from tests.streams.conftest import NUM_PARTITIONS
from tests.streams.support import NOWHERE, read_all, wait_until

if TYPE_CHECKING:
    from streams.kafka import KafkaError, Message

pytestmark = pytest.mark.servers

# Apache Kafka, UtilsTest.testMurmur2.
MURMUR2_VECTORS = {
    b"21": -973932308,
    b"foobar": -790332482,
    b"a-little-bit-long-string": -985981536,
    b"a-little-bit-longer-string": -1486304829,
    b"lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8": -58897971,
    b"abc": 479470107,
}


def murmur2(data: bytes) -> int:
    """Return the signed 32-bit hash, written from the algorithm's definition."""
    m, mask = 0x5BD1E995, 0xFFFFFFFF
    h = (0x9747B28C ^ len(data)) & mask
    for i in range(0, len(data) - len(data) % 4, 4):
        k = int.from_bytes(data[i : i + 4], "little") * m & mask
        k = (k ^ k >> 24) * m & mask
        h = (h * m & mask) ^ k
    if tail := data[len(data) - len(data) % 4 :]:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    h ^= h >> 15
    return h - 2**32 if h >= 2**31 else h


@pytest.mark.parametrize(("key", "expected"), MURMUR2_VECTORS.items())
def test_reference_murmur2_gives_java_values(key: bytes, expected: int) -> None:
    assert murmur2(key) == expected


def test_records_lie_where_java_would_put_them(config: KafkaConfig, topics: Topics) -> None:
    producer = make_producer(config)
    keys = [*MURMUR2_VECTORS, *(b"%d" % user_id for user_id in range(500))]
    for key in keys:
        producer.produce(topics.events, b"x", key)
    assert producer.flush(30) == 0
    placed = {message.key(): message.partition() for message in read_all(config, topics.events)}
    assert placed == {key: (murmur2(key) & 0x7FFFFFFF) % NUM_PARTITIONS for key in keys}


def test_topics_are_created_once(config: KafkaConfig) -> None:
    topics = Topics("once")
    names = {spec.name for spec in topics.specs()}
    assert {topics.events, topics.sessions, topics.nearline} < names
    assert set(ensure_topics(config, topics.specs())) == names
    assert ensure_topics(config, topics.specs()) == []
    assert partition_count(config, topics.events) == 4
    assert partition_count(config, topics.items) == 1


def test_the_event_log_has_append_times_and_is_kept(config: KafkaConfig, topics: Topics) -> None:
    producer = make_producer(config)
    before_ms = time.time_ns() // 1_000_000
    producer.produce(topics.events, b"x", b"1", timestamp=1_000)
    assert producer.flush(30) == 0
    (message,) = read_all(config, topics.events)
    assert message.timestamp()[1] >= before_ms


def test_another_partition_count_is_refused(config: KafkaConfig, topics: Topics) -> None:
    with pytest.raises(TopicMismatchError, match=r"partitions=4, expected 8.*partitions to 4"):
        ensure_topics(config, topics.specs(8))


def test_another_timestamp_type_is_refused(config: KafkaConfig, topics: Topics) -> None:
    spec = TopicSpec(
        name=topics.items,
        num_partitions=1,
        settings={"message.timestamp.type": "LogAppendTime"},
        required=("message.timestamp.type",),
    )
    with pytest.raises(TopicMismatchError, match=r"timestamp\.type=CreateTime.*kafka-configs"):
        ensure_topics(config, [spec])


def test_missing_topic_is_named_and_not_created(config: KafkaConfig) -> None:
    for ask in (watermarks, end_offsets, partition_count):
        with pytest.raises(TopicMissingError, match="'absent'"):
            ask(config, "absent")


def test_absent_broker_is_named_within_the_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(
        BrokerUnavailableError, match=rf"{NOWHERE} within 1 s.*`moveline up`"
    ) as caught:
        watermarks(KafkaConfig(NOWHERE), "any", timeout_s=1)
    assert caught.value.retriable
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("properties", "words"),
    [
        ({"no.such.property": "1"}, "no.such.property"),
        ({"linger.ms": "soon"}, "linger.ms"),
        ({"acks": "0"}, "acks=all"),
        ({"bootstrap.servers": "elsewhere:9092"}, "elsewhere:9092"),
    ],
)
def test_wrong_property_is_refused(properties: dict[str, str], words: str) -> None:
    with pytest.raises(KafkaConfigError, match=words):
        make_producer(KafkaConfig(NOWHERE, properties))


def test_properties_are_passed_through() -> None:
    """A queue of one record, set as a property, is full at the second."""
    small = KafkaConfig(NOWHERE, {"queue.buffering.max.messages": "1"})
    producer = make_producer(small)
    producer.produce("any", b"x")
    with pytest.raises(BufferError):
        producer.produce("any", b"x")
    producer.purge()
    producer.flush(5)


def test_offsets_by_position_group_and_time(config: KafkaConfig, topics: Topics) -> None:
    producer = make_producer(config)
    for number in range(10):
        producer.produce(topics.events, b"x", partition=1 if number < 7 else 2)
    assert producer.flush(30) == 0
    assert end_offsets(config, topics.events) == {0: 0, 1: 7, 2: 3, 3: 0}
    assert watermarks(config, topics.events)[1] == (0, 7)
    assert offsets_for_time(config, topics.events, 0) == {0: 0, 1: 0, 2: 0, 3: 0}
    tomorrow_ms = time.time_ns() // 1_000_000 + 86_400_000
    assert offsets_for_time(config, topics.events, tomorrow_ms) == {0: 0, 1: 7, 2: 3, 3: 0}

    consumer = make_consumer(config, group=f"{topics.prefix}-group")
    consumer.commit(offsets=[TopicPartition(topics.events, 1, 5)], asynchronous=False)
    consumer.close()
    assert committed(config, f"{topics.prefix}-group", topics.events) == {1: 5}
    assert committed(config, f"{topics.prefix}-nobody", topics.events) == {}


def test_a_reader_is_told_of_ends_and_of_lost_offsets(config: KafkaConfig, topics: Topics) -> None:
    producer = make_producer(config)
    for _ in range(10):
        producer.produce(topics.events, b"x", partition=0)
    assert producer.flush(30) == 0
    place = TopicPartition(topics.events, 0, 4)
    admin = AdminClient({"bootstrap.servers": config.bootstrap})
    admin.delete_records([place])[place].result()
    wait_until(lambda: watermarks(config, topics.events)[0] == (4, 10))

    assert is_end_of_partition(first_error(config, TopicPartition(topics.events, 0, 4)))
    assert is_offset_gone(first_error(config, TopicPartition(topics.events, 0, 1)))


def first_error(config: KafkaConfig, place: TopicPartition) -> KafkaError:
    """Return the first error a reader gets from there on."""
    consumer = make_consumer(config, group="tests", reader=True)
    consumer.assign([place])
    errors: list[KafkaError] = []

    def read() -> bool:
        message: Message | None = consumer.poll(0.2)
        error = None if message is None else message.error()
        if error is not None:
            errors.append(error)
        return bool(errors)

    wait_until(read)
    consumer.close()
    return errors[0]


@pytest.mark.parametrize("prefix", ["", "a b", "ä", "x" * 201])
def test_bad_prefix_is_refused(prefix: str) -> None:
    with pytest.raises(ValueError, match="topic prefix"):
        Topics(prefix)
