"""The only door to confluent-kafka; what other modules need of the library is re-exported here.

`clients` says how producers and consumers are configured, `admin` what is asked of the broker.
"""

from __future__ import annotations

from confluent_kafka import (
    Consumer,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)

from streams.kafka.admin import (
    committed,
    end_offsets,
    ensure_topics,
    group_is_active,
    offsets_for_time,
    partition_count,
    topic_settings,
    topic_width,
    watermarks,
)
from streams.kafka.clients import (
    as_stream_error,
    is_end_of_partition,
    is_fatal,
    is_not_ready,
    is_offset_gone,
    make_consumer,
    make_producer,
)
from streams.properties import KafkaConfig

__all__ = [
    "Consumer",
    "KafkaConfig",
    "KafkaError",
    "KafkaException",
    "Message",
    "Producer",
    "TopicPartition",
    "as_stream_error",
    "committed",
    "end_offsets",
    "ensure_topics",
    "group_is_active",
    "is_end_of_partition",
    "is_fatal",
    "is_not_ready",
    "is_offset_gone",
    "make_consumer",
    "make_producer",
    "offsets_for_time",
    "partition_count",
    "topic_settings",
    "topic_width",
    "watermarks",
]
