"""What the group may do to a worker: another one under its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from streams.errors import BrokerRefusedError
from tests.waiting import until
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import Traffic, assert_equals_oracle, publish

if TYPE_CHECKING:
    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics


def test_a_second_worker_of_the_same_name_fences_the_first(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    sent = Traffic(seed=21, num_users=30).make(1_000)
    publish(kafka, topics.events, sent[:500])
    with (  # noqa: PT012 - the worker's error is raised where its block ends
        pytest.raises(BrokerRefusedError, match="fenced"),
        running(kafka, topics, store, instance="same") as first,
    ):
        first.wait("events_total", 1)
        with running(kafka, topics, store, instance="same") as second:
            until(lambda: first.errors, 30, what="the first one has ended")
            publish(kafka, topics.events, sent[500:])
            wait_caught_up(kafka, topics, second)
    assert_equals_oracle(store, kafka, topics, sent)
