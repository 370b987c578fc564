"""The app's parts on the real servers, under small rules, without Faust."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streams.kafka import KafkaConfig, make_producer
from streams.log_reader import LogReader
from streams.nearline_config import NearlineConfig
from tests.conftest import NUM_PARTITIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compose.local.stack import LocalStack
    from features.redis import StateStore
    from streams.kafka import Producer
    from streams.topics import Topics


@pytest.fixture
def config(
    stack: LocalStack, kafka: KafkaConfig, topics: Topics, store: StateStore
) -> NearlineConfig:
    """How the app finds the servers; sessions wait for nobody."""
    return NearlineConfig(
        kafka=kafka,
        topics=topics,
        redis_url=stack.addresses.redis,
        generation=store.generation,
        lateness_s=0,
    )


@pytest.fixture
def reader(kafka: KafkaConfig) -> Iterator[LogReader]:
    """A reader of the log."""
    opened = LogReader.open(kafka)
    yield opened
    opened.close()


@pytest.fixture
def producer(kafka: KafkaConfig) -> Producer:
    """What sends session records."""
    return make_producer(kafka)


@pytest.fixture
def partitions() -> int:
    """How wide the topics of a test are."""
    return NUM_PARTITIONS
