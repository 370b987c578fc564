"""A topic set of its own for every test, with as many partitions as these tests count on."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest

from streams.kafka import ensure_topics
from streams.topics import Topics

if TYPE_CHECKING:
    from streams.kafka import KafkaConfig

NUM_PARTITIONS = 4


@pytest.fixture
def config(kafka: KafkaConfig) -> KafkaConfig:
    """The broker as the code under test takes it."""
    return kafka


@pytest.fixture
def topics(config: KafkaConfig) -> Topics:
    """Topics nobody else uses, created as an installation has them."""
    topics = Topics(f"t{uuid.uuid4().hex[:12]}")
    ensure_topics(config, topics.specs(NUM_PARTITIONS))
    return topics
