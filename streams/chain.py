"""Which topics hold the event log, in which order, and how many partitions each counts.

The log is a chain of topics: `PREFIX.events` (source 0), then `PREFIX.events-1`, ... A topic that
has another behind it is retired: it ended with a seal in each partition (streams/seal.py). A
user's events in it come before those in the next one. The chain is a record of the control topic;
the number of partitions in it is what every state rests on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from streams.control import read_records, write_records
from streams.errors import (
    PartitionsChangedError,
    RepartitionUnfinishedError,
    TopicMissingError,
)
from streams.kafka import end_offsets, ensure_topics, partition_count

if TYPE_CHECKING:
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# Written by `moveline repartition` alone: nobody else may put an older word over it.
CHAIN_KEY: Final = b"event-log"
# How many partitions the first topic had when states were first built from it.
WIDTH_KEY: Final = b"event-log-partitions"

# JSON has no integer keys.
_Offsets = dict[str, int]


class Source(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One topic of the event log.

    Attributes:
        num_partitions: that its keys were distributed over; the topic may have got more since.
        next_partitions: of the topic that is to follow it; None: none is.
        sealing: by partition, where the topic ended before its seals were sent.
        ends: by partition, the offset of its seal, once the next topic is in use.
    """

    num_partitions: int
    next_partitions: int | None = None
    sealing: _Offsets | None = None
    ends: _Offsets | None = None

    @property
    def end_offsets(self) -> dict[int, int]:
        """Return the offset after the last event by partition; of a retired topic only."""
        assert self.ends is not None
        return {int(partition): offset for partition, offset in self.ends.items()}


class Chain(msgspec.Struct, frozen=True):
    """The topics of the event log, oldest first; the last one takes events."""

    sources: tuple[Source, ...]

    @property
    def current(self) -> int:
        """Return the number of the topic that takes events."""
        return len(self.sources) - 1

    @property
    def newest(self) -> Source:
        """Return the topic that takes events."""
        return self.sources[-1]

    @property
    def retired(self) -> tuple[Source, ...]:
        """Return the topics that have ended; their place is their number."""
        return self.sources[:-1]

    @property
    def num_partitions_max(self) -> int:
        """Return how many partitions the widest of the topics has."""
        return max(source.num_partitions for source in self.sources)


def write_chain(kafka: KafkaConfig, topics: Topics, chain: Chain) -> None:
    """Record the chain; raises as `streams.control.write_records` does."""
    write_records(kafka, topics, {CHAIN_KEY: msgspec.json.encode(chain)})


def recorded_chain(kafka: KafkaConfig, topics: Topics) -> Chain | None:
    """Return the chain as recorded, None where no state was ever built on the log.

    Raises:
        BrokerUnavailableError: the control topic could not be read to its end.
    """
    try:
        records = read_records(kafka, topics)
    except TopicMissingError:
        # Whoever only sends events needs no control topic.
        return None
    if CHAIN_KEY in records:
        return msgspec.json.decode(records[CHAIN_KEY], type=Chain)
    if WIDTH_KEY in records:
        return Chain((Source(num_partitions=int(records[WIDTH_KEY])),))
    return None


def known_chain(kafka: KafkaConfig, topics: Topics) -> Chain:
    """Return the chain; a log that has none yet is its first topic as it is. Records nothing.

    Raises:
        TopicMissingError: there is no events topic either.
        BrokerUnavailableError: Kafka does not answer.
    """
    recorded = recorded_chain(kafka, topics)
    if recorded is not None:
        return recorded
    return Chain((Source(num_partitions=partition_count(kafka, topics.at(0).events)),))


def checked_chain(kafka: KafkaConfig, topics: Topics) -> Chain:
    """Return the chain if the newest topic has the partitions that it is recorded with.

    Raises:
        PartitionsChangedError: it has others.
        StreamError: as `known_chain`.
    """
    chain = known_chain(kafka, topics)
    refuse_other_count(kafka, topics, chain)
    return chain


def claimed_chain(kafka: KafkaConfig, topics: Topics) -> Chain:
    """Return the chain, its width recorded from now on: for whoever builds state on it.

    Raises:
        PartitionsChangedError: the newest topic has other partitions than it is recorded with.
        StreamError: as `known_chain`, or the record was not taken.
    """
    chain = checked_chain(kafka, topics)
    if recorded_chain(kafka, topics) is None:
        write_records(kafka, topics, {WIDTH_KEY: b"%d" % chain.newest.num_partitions})
    return chain


def settled_chain(kafka: KafkaConfig, topics: Topics) -> tuple[Chain, dict[int, int]]:
    """Return the chain and where its newest topic ends now, both before any seal of that topic.

    Raises:
        RepartitionUnfinishedError: a repartition was begun and has not ended.
        PartitionsChangedError: the newest topic has other partitions than it is recorded with.
        StreamError: as `known_chain`.
    """
    # Ends first: seals are sent only after the chain says so.
    before = known_chain(kafka, topics)
    ends = end_offsets(kafka, topics.at(before.current).events)
    chain = checked_chain(kafka, topics)
    if chain.newest.sealing is not None:
        raise RepartitionUnfinishedError(
            topics.at(chain.current).events, next_partitions=chain.newest.next_partitions or 0
        )
    if chain.current != before.current:
        return settled_chain(kafka, topics)
    return chain, {p: end for p, end in ends.items() if p < chain.newest.num_partitions}


def refuse_other_count(
    kafka: KafkaConfig, topics: Topics, chain: Chain, *, found: int | None = None
) -> None:
    """Return if the newest topic has as many partitions as it is recorded with.

    Args:
        kafka: the cluster.
        topics: of the installation.
        chain: as recorded.
        found: how many it has; asked for if left out.

    Raises:
        PartitionsChangedError: naming the topic, both counts and the way out.
    """
    topic = topics.at(chain.current).events
    found = partition_count(kafka, topic) if found is None else found
    if found != chain.newest.num_partitions:
        raise PartitionsChangedError(
            topic,
            recorded=chain.newest.num_partitions,
            found=found,
            wanted=chain.newest.next_partitions or found,
        )


def ensure_installation(
    kafka: KafkaConfig, topics: Topics, *, partitions: int, replication: int
) -> list[str]:
    """Every topic exists as it must; return the names of those that were created.

    Args:
        kafka: the cluster.
        topics: of the installation.
        partitions: of the first events topic; once there is one, the chain says how many.
        replication: copies of each topic.

    Raises:
        StreamError: as `streams.kafka.ensure_topics`.
    """
    chain = recorded_chain(kafka, topics)
    if chain is not None:
        topics, partitions = topics.at(chain.current), chain.newest.num_partitions
    return ensure_topics(kafka, topics.specs(partitions, replication))


def current_topics(kafka: KafkaConfig, topics: Topics) -> Topics:
    """Return the topics with the one that takes events now: what a producer sends to.

    Raises:
        PartitionsChangedError: that one has other partitions than it is recorded with.
        StreamError: as `known_chain`.
    """
    return topics.at(checked_chain(kafka, topics).current)
