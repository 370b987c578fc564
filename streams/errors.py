"""Errors of the Kafka side: what a producer, an operator or the lake sink can run into."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from features.events import Event


class StreamError(Exception):
    """Root of this package's errors; `retriable` says whether the same call may work later."""

    retriable: bool = False


class KafkaConfigError(StreamError, ValueError):
    """A librdkafka property is unknown, has a bad value, or would break a guarantee of ours."""


class BrokerUnavailableError(StreamError):
    """No broker answered within the deadline."""

    retriable = True


class BrokerRefusedError(StreamError):
    """The broker answered, and what it said is no; `retriable` while a cluster finds a leader."""

    def __init__(self, message: str, *, retriable: bool = False) -> None:
        super().__init__(message)
        self.retriable = retriable


class TopicMissingError(StreamError):
    """A topic that has to exist does not."""

    def __init__(self, topic: str, *, bootstrap: str) -> None:
        super().__init__(
            f"Topic {topic!r} does not exist at {bootstrap}. Create it with `moveline up`, "
            "or give the right topic prefix."
        )
        self.topic = topic


class TopicMismatchError(StreamError):
    """A topic exists with settings under which the system would give wrong answers."""

    def __init__(
        self, topic: str, *, setting: str, found: str, expected: str, next_step: str
    ) -> None:
        super().__init__(f"Topic {topic!r} has {setting}={found}, expected {expected}. {next_step}")
        self.topic = topic
        self.setting = setting
        self.found = found
        self.expected = expected


class DeliveryError(StreamError):
    """An event was handed over and the broker did not acknowledge it."""

    def __init__(self, message: str, *, retriable: bool = True) -> None:
        super().__init__(message)
        self.retriable = retriable


class QueueFullError(StreamError):
    """The send queue stayed at its limit; this event was not taken."""

    retriable = True

    def __init__(self, *, num_queued: int, limit: int, waited_s: float) -> None:
        super().__init__(
            f"{num_queued} events wait for the broker, at most {limit} may, and none left within "
            f"{waited_s:g} s. Send slower, raise queue_events_max, or look at the broker."
        )
        self.num_queued = num_queued
        self.limit = limit


class ProducerClosedError(StreamError):
    """The producer was closed; make a new one."""


class MappingError(StreamError, ValueError):
    """A file or its column mapping cannot be read as events or items."""


class LogHoleError(StreamError):
    """Kafka no longer has the offsets the lake needs next."""

    def __init__(self, topic: str, partition: int, *, lake_end: int, low: int) -> None:
        super().__init__(
            f"Partition {partition} of {topic!r}: the next offset the lake needs is {lake_end}, "
            f"Kafka's oldest is {low}; offsets {lake_end}..{low - 1} are in neither. Restore them "
            "from a backup, or keep this lake as it is and start a new one in another folder."
        )
        self.partition = partition
        self.lake_end = lake_end
        self.low = low


class OffsetGoneError(StreamError):
    """Retention has removed records before they were read."""

    def __init__(self, topic: str, partitions: Collection[int]) -> None:
        super().__init__(
            f"Kafka no longer has the next offsets of {topic!r} in partitions "
            f"{sorted(partitions)}: retention has overtaken the reading. Repeat the command; what "
            "the lake has is read from there."
        )


class LogTruncatedError(StreamError):
    """Kafka ends before the lake does: the topic was recreated, or the broker lost its disk."""

    def __init__(self, topic: str, partition: int, *, lake_end: int, high: int) -> None:
        super().__init__(
            f"Partition {partition} of {topic!r}: the lake has everything before offset "
            f"{lake_end}, Kafka ends at {high}: this is not the log the lake was written from. "
            "Point at the right broker, or start a new lake in another folder."
        )
        self.partition = partition
        self.lake_end = lake_end
        self.high = high


class DeadLetterError(StreamError):
    """A refused event could not be put aside, so that nothing after it may be committed."""

    retriable = True


class NoLetterError(StreamError, ValueError):
    """There is no dead letter where one was asked for."""


class StateContendedError(StreamError):
    """Another writer keeps moving the same users' state: two workers own one partition."""

    retriable = True


class UndeliveredError(DeliveryError):
    """A producer was closed while events were undelivered; `events` are all of them, in order."""

    def __init__(self, message: str, *, events: tuple[Event, ...]) -> None:
        super().__init__(message)
        self.events = events


class WorkerStuckError(StreamError):
    """Records wait and none is read: a fresh process is the way out."""

    retriable = True


class OutOfStepError(StreamError):
    """Redis does not stand where this worker left it; reading its checkpoints again mends that."""

    retriable = True


class ForgetError(StreamError):
    """A user cannot be forgotten everywhere yet; the message says what is missing."""


class HistoryGoneError(StreamError):
    """The events between the last sweep and now have left Redis: those sessions are not known."""

    def __init__(self, first: int, session_id: int) -> None:
        super().__init__(
            f"the events from ordinal {first} on do not lead to session {session_id}: they have "
            "left Redis. Let the near-line app run while the worker does."
        )
        self.session_id = session_id


class NearlineConfigError(StreamError, ValueError):
    """A variable of the near-line app is missing, out of range, or not supported by it."""


class PartitionsChangedError(StreamError):
    """The events topic has another number of partitions than what the states were built from."""

    def __init__(self, topic: str, *, recorded: int, found: int, wanted: int) -> None:
        super().__init__(
            f"Topic {topic!r} has {found} partitions, the states were built from {recorded}: users "
            "lie elsewhere now, and their order would be lost. Nothing was applied or committed "
            f"out of order; go on with: moveline repartition --partitions {wanted}"
        )
        self.topic = topic
        self.recorded = recorded
        self.found = found


class MisplacedEventError(StreamError):
    """An event lies in a partition where its key does not belong."""

    def __init__(self, topic: str, what: object) -> None:
        super().__init__(
            f"An event of {topic} lies where its key does not belong: {what}. Stop the producer "
            "that uses another partitioner than murmur2, then move what it has sent: "
            "moveline repartition --partitions N, with another N than now."
        )


class RepartitionUnfinishedError(StreamError):
    """A repartition was begun and has not ended: the log's end is not settled."""

    retriable = True

    def __init__(self, topic: str, *, next_partitions: int) -> None:
        super().__init__(
            f"{topic!r} is being repartitioned. End that first: moveline repartition --partitions "
            f"{next_partitions}"
        )


class RepartitionError(StreamError, ValueError):
    """What was asked of `moveline repartition` contradicts what another run has begun."""
