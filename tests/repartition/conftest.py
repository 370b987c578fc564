"""An installation whose log goes over to another topic, and what its states must be then."""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING

import pytest

from features.redis import CatalogueStore, StateStore
from streams.chain import known_chain
from streams.errors import BrokerUnavailableError
from streams.generations import Installation
from streams.micro_batch import to_accepted
from streams.placement import partitions_of
from streams.repartition import MOVED_HEADER, Repartition
from streams.replay import Replay, ReplayRequest
from streams.retired import is_complete
from streams.seal import is_seal
from streams.worker import to_record
from tests.conftest import SMALL
from tests.streams.support import read_all
from tests.waiting import until
from tests.worker.traffic import Traffic, assert_holds, publish

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig
    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.repartition import RepartitionReport
    from streams.replay import ReplayReport
    from streams.topics import Topics
    from tests.worker.running import Running
    from tests.worker.traffic import Sent

# Apart from other tests' numbers: a group that a killed worker left lives on for a while.
_GENERATIONS = itertools.count(400_001)


@dataclass
class Log:
    """One installation and everything sent to it, whichever topic it was sent to."""

    here: Installation
    live: StateStore
    traffic: Traffic = field(default_factory=lambda: Traffic(seed=11))
    sent: list[Sent] = field(default_factory=list)

    @property
    def kafka(self) -> KafkaConfig:
        return self.here.kafka

    @property
    def topics(self) -> Topics:
        return self.here.topics

    def produce(self, count: int, *, source: int) -> None:
        """Send more records to a topic of the log."""
        self.send(self.traffic.make(count), source=source)

    def send(self, records: Sequence[Sent], *, source: int) -> None:
        """Send these records to a topic of the log."""
        publish(self.kafka, self.topics.at(source).events, records)
        self.sent += records

    def repartition(self, num_partitions: int) -> RepartitionReport:
        """Run the command."""
        return self.command().run(num_partitions)

    def command(self) -> Repartition:
        """Return the command."""
        return Repartition(self.kafka, self.topics, live=self.live)

    def is_applied(self, store: StateStore) -> bool:
        """Return whether everything that counts is in a generation, in every bucket."""
        try:
            chain = known_chain(self.kafka, self.topics)
            return is_complete(store, chain) and self.here.lag(store) == 0
        except BrokerUnavailableError:
            # A machine that stands still; whoever waits asks again.
            return False

    def wait(self, *workers: Running) -> None:
        """Return once the live generation has everything."""
        until(
            lambda: any(one.errors for one in workers) or self.is_applied(self.live),
            what="everything applied",
        )
        for one in workers:
            if one.errors:
                raise one.errors[0]

    def replay(self, request: ReplayRequest | None = None) -> tuple[StateStore, ReplayReport]:
        """Build another generation; return it and what that did."""
        store = replace(self.live, generation=next(_GENERATIONS))
        catalogue = CatalogueStore(store.client)
        builder = Replay(self.kafka, self.topics, store, catalogue, request or ReplayRequest())
        return store, builder.run(Event())

    def accepted(self, config: StateConfig = SMALL) -> dict[int, list[Accepted]]:
        """Return every user's events in the order that counts, worked out from the topics alone.

        Of a topic that has ended: what is before its seal and where its key belongs. Then the
        next one. Which records are events is the generator's word.
        """
        events = {(one.key, one.value): one.event for one in self.sent}
        codes = {action: code for code, action in enumerate(config.actions)}
        by_user: dict[int, list[Accepted]] = defaultdict(list)
        chain = known_chain(self.kafka, self.topics)
        for number, source in enumerate(chain.sources):
            sealed: set[int] = set()
            for message in read_all(self.kafka, self.topics.at(number).events):
                key, value = message.key(), message.value()
                if is_seal(key, value, message.headers()):
                    sealed.add(message.partition())
                    continue
                if message.partition() in sealed:
                    continue
                if partitions_of([key or b""], source.num_partitions) != [message.partition()]:
                    continue
                event = events[key or b"", value or b""]
                if event is not None and event.action in config.stream_actions:
                    record = to_record(message)
                    by_user[event.user_id].append(to_accepted(event, record, codes, number))
        return by_user

    def assert_exact(self, *stores: StateStore) -> None:
        """Each generation is the oracle's, byte by byte."""
        by_user = self.accepted()
        for store in stores or (self.live,):
            assert_holds(store, by_user)

    def assert_nothing_lost(self) -> None:
        """Every record sent counts once: in the topic it was sent to, or where it was moved."""
        count: dict[tuple[bytes, bytes], int] = defaultdict(int)
        for one in self.sent:
            count[one.key, one.value] += 1
        for number, source in enumerate(known_chain(self.kafka, self.topics).sources):
            ends = source.end_offsets if source.ends is not None else None
            for message in read_all(self.kafka, self.topics.at(number).events):
                place = message.key() or b"", message.value() or b""
                if is_seal(message.key(), message.value(), message.headers()):
                    continue
                partition, offset = message.partition(), message.offset()
                if ends is not None and offset >= ends.get(partition, 0):
                    continue
                if partitions_of([place[0]], source.num_partitions) == [partition]:
                    count[place] -= 1
        assert not [place for place, left in count.items() if left]

    def num_moved(self, source: int) -> int:
        """Return how many records of a topic were moved there."""
        messages = read_all(self.kafka, self.topics.at(source).events)
        return sum(any(name == MOVED_HEADER for name, _ in m.headers() or ()) for m in messages)


@pytest.fixture
def log(kafka: KafkaConfig, topics: Topics, store: StateStore) -> Log:
    """An installation whose live generation is empty."""
    live = replace(store, generation=next(_GENERATIONS))
    return Log(Installation(kafka, topics, live.client), live)
