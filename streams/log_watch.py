"""What a worker watches of the event log's topics: their number of partitions, and their end."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streams.chain import known_chain, refuse_other_count
from streams.errors import BrokerUnavailableError, MisplacedEventError
from streams.kafka import topic_width

if TYPE_CHECKING:
    from features.state import PartitionMovedError
    from streams.chain import Chain
    from streams.kafka import Consumer, KafkaConfig
    from streams.retired import CatchUp
    from streams.topics import Topics

log = logging.getLogger("moveline.worker")

# How soon a worker that has met the end of its topic goes over to the next one.
CHAIN_INTERVAL_S: Final = 1.0


@dataclass
class LogWatch:
    """One worker's view of the chain.

    Attributes:
        topics: with the newest of the log's topics.
        chain: the log's topics as this worker found them.
        catch_up: what the topics before the newest may still owe; None where there are none.
        asked_at: when the chain was last read again.
    """

    kafka: KafkaConfig
    topics: Topics
    chain: Chain
    catch_up: CatchUp | None
    asked_at: float

    def check_width(self, consumer: Consumer) -> None:
        """Return unless somebody has given the topic other partitions.

        Raises:
            PartitionsChangedError: somebody has.
        """
        found = topic_width(consumer, self.topics.events)
        if found is not None:
            refuse_other_count(self.kafka, self.topics, self.chain, found=found)

    def misplaced(self, error: PartitionMovedError) -> MisplacedEventError:
        """Return what is to be said of an event that lies where its key does not belong.

        Raises:
            PartitionsChangedError: that is the cause.
        """
        refuse_other_count(self.kafka, self.topics, self.chain)
        return MisplacedEventError(self.topics.events, error)

    def has_successor(self, clock_s: float) -> bool:
        """Return whether the log goes on in another topic; asks now and then."""
        if clock_s - self.asked_at < CHAIN_INTERVAL_S:
            return False
        self.asked_at = clock_s
        try:
            return known_chain(self.kafka, self.topics).current > self.chain.current
        except BrokerUnavailableError as error:
            log.warning("asked in vain where the log goes on: %s", error)
            return False
