"""A live generation built by a real worker, and what replays beside it need."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING

import pytest

from features.redis import CatalogueStore, StateStore
from streams.generations import Installation
from streams.lake import LakeSink
from streams.replay import Replay, ReplayRequest
from tests.conftest import SMALL
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import Traffic, publish

if TYPE_CHECKING:
    from pathlib import Path

    from features.config import StateConfig
    from streams.kafka import KafkaConfig
    from streams.replay import ReplayReport
    from streams.topics import Topics
    from tests.worker.traffic import Sent

# Apart from tests/conftest.py's numbers: a group that a killed worker left lives on for a while.
_GENERATIONS = itertools.count(200_001)


@dataclass
class Place:
    """One installation and the records sent to it."""

    here: Installation
    live: StateStore
    traffic: Traffic
    sent: list[Sent] = field(default_factory=list)

    @property
    def topics(self) -> Topics:
        """The topics."""
        return self.here.topics

    @property
    def kafka(self) -> KafkaConfig:
        """The broker."""
        return self.here.kafka

    def produce(self, count: int) -> None:
        """Send more records."""
        records = self.traffic.make(count)
        publish(self.kafka, self.topics.events, records)
        self.sent += records

    def catch_up(self, store: StateStore | None = None) -> None:
        """Bring a generation to the end of the log with a worker."""
        with running(self.kafka, self.topics, store or self.live) as worker:
            wait_caught_up(self.kafka, self.topics, worker)

    def fresh(self, config: StateConfig = SMALL) -> StateStore:
        """Return a generation no other test has used."""
        return StateStore(self.live.client, next(_GENERATIONS), config)

    def replay(self, store: StateStore, request: ReplayRequest | None = None) -> Replay:
        """Return a replay into a generation."""
        catalogue = CatalogueStore(store.client)
        return Replay(self.kafka, self.topics, store, catalogue, request or ReplayRequest())

    def build(self, store: StateStore, request: ReplayRequest | None = None) -> ReplayReport:
        """Replay to the end."""
        return self.replay(store, request).run(Event())

    def sink(self, root: Path) -> None:
        """Write the log as it is now to a lake."""
        LakeSink(self.kafka, self.topics.events, root).run(until_end=True)


@pytest.fixture
def place(kafka: KafkaConfig, topics: Topics, store: StateStore) -> Place:
    """An installation whose live generation is empty."""
    # The fixture's generation is numbered per run of tests; one of ours never meets its group.
    live = replace(store, generation=next(_GENERATIONS))
    return Place(Installation(kafka, topics, live.client), live, Traffic(seed=7))
