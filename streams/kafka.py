"""The only door to confluent-kafka: how clients are configured, and what is asked of the broker.

What other modules need of the library is re-exported here.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    Message,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

# The library's type information hides these behind confluent_kafka.admin; the version is pinned.
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewTopic

from streams.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    KafkaConfigError,
    StreamError,
    TopicMissingError,
)
from streams.properties import (
    DEADLINE_S,
    DELIVERY_TIMEOUT_MS,
    LINGER_MS,
    MAX_POLL_INTERVAL_MS,
    PREFETCH_KBYTES,
    PREFETCH_MESSAGES,
    QUEUE_KBYTES_MAX,
    QUEUE_MESSAGES_MAX,
    SESSION_TIMEOUT_MS,
    KafkaConfig,
    consumer_properties,
    merged,
    producer_properties,
)
from streams.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from streams.topics import TopicSpec

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
    "is_offset_gone",
    "make_consumer",
    "make_producer",
    "offsets_for_time",
    "partition_count",
    "topic_width",
    "watermarks",
]

_LOG: Final = logging.getLogger("moveline.kafka")
_Client = TypeVar("_Client")
_Answer = TypeVar("_Answer")

# Untyped in the library, hence named with their types here.
_EARLIEST: Final[Callable[[], OffsetSpec]] = OffsetSpec.earliest
_LATEST: Final[Callable[[], OffsetSpec]] = OffsetSpec.latest
_AT_TIME: Final[Callable[[int], OffsetSpec]] = OffsetSpec.for_timestamp

_UNREACHABLE: Final = frozenset(
    {
        KafkaError._TRANSPORT,  # noqa: SLF001 - how the library names its own errors
        KafkaError._ALL_BROKERS_DOWN,  # noqa: SLF001 - how the library names its own errors
        KafkaError._TIMED_OUT,  # noqa: SLF001 - how the library names its own errors
        KafkaError._RESOLVE,  # noqa: SLF001 - how the library names its own errors
        KafkaError.REQUEST_TIMED_OUT,
    }
)
# What a cluster says while it finds out who leads a new or moved partition.
_SETTLING: Final = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
        KafkaError.OFFSET_NOT_AVAILABLE,
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
    }
)
_SETTLING_RETRY_S: Final = 0.05
# Asked again a few seconds later; a worker that waits applies nothing meanwhile.
_WIDTH_TIMEOUT_S: Final = 1.0
_NO_GROUP: Final = KafkaError.GROUP_ID_NOT_FOUND


def make_producer(
    config: KafkaConfig,
    *,
    idempotence: bool = True,
    linger_ms: int = LINGER_MS,
    queue_messages_max: int = QUEUE_MESSAGES_MAX,
    queue_kbytes_max: int = QUEUE_KBYTES_MAX,
    delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
    compression: str = "lz4",
) -> Producer:
    """Return a producer whose acknowledged records are on every in-sync replica, in order, once.

    Partitions are chosen by murmur2, so that Java's producers put a key where this one does.

    Args:
        config: the cluster.
        idempotence: off only for brokers without it; a retry can then double or reorder.
        linger_ms: how long a record waits for others to share its request.
        queue_messages_max: records that may wait for the broker; then `produce` raises BufferError.
        queue_kbytes_max: likewise, in KiB.
        delivery_timeout_ms: after this long a record's delivery report says that it failed.
        compression: none, lz4, zstd, snappy or gzip.

    Raises:
        KafkaConfigError: a property in `config` is unknown or contradicts the above.
    """
    settings = producer_properties(
        config,
        idempotence=idempotence,
        linger_ms=linger_ms,
        queue_messages_max=queue_messages_max,
        queue_kbytes_max=queue_kbytes_max,
        delivery_timeout_ms=delivery_timeout_ms,
        compression=compression,
    )
    return _built(lambda: Producer(_with_log(settings), logger=_LOG), config)


def make_consumer(
    config: KafkaConfig,
    *,
    group: str,
    instance: str | None = None,
    session_timeout_ms: int = SESSION_TIMEOUT_MS,
    max_poll_interval_ms: int = MAX_POLL_INTERVAL_MS,
    prefetch_messages: int = PREFETCH_MESSAGES,
    prefetch_kbytes: int = PREFETCH_KBYTES,
    reader: bool = False,
) -> Consumer:
    """Return a consumer that commits nothing by itself and holds a bounded prefetch.

    Args:
        config: the cluster.
        group: consumer group; whoever only assigns never joins it.
        instance: static membership (group.instance.id): a restart within the session time-out
            gets its partitions back without a rebalance.
        session_timeout_ms: silence after which the group gives a member's partitions away.
        max_poll_interval_ms: likewise, for a member that stopped polling.
        prefetch_messages: records fetched ahead, at most about this many per partition.
        prefetch_kbytes: likewise, in KiB for all partitions together.
        reader: for whoever assigns and seeks by itself: an "end of partition" is delivered too
            (`is_end_of_partition`), and an offset that Kafka no longer has is an error
            (`is_offset_gone`), not a jump to the oldest.

    Raises:
        KafkaConfigError: a property in `config` is unknown or contradicts the above.
    """
    settings = consumer_properties(
        config,
        group=group,
        instance=instance,
        session_timeout_ms=session_timeout_ms,
        max_poll_interval_ms=max_poll_interval_ms,
        prefetch_messages=prefetch_messages,
        prefetch_kbytes=prefetch_kbytes,
        reader=reader,
    )
    return _built(lambda: Consumer(_with_log(settings), logger=_LOG), config)


def is_end_of_partition(error: KafkaError) -> bool:
    """Return whether a message's `error()` only says that nothing more is there yet."""
    return bool(error.code() == KafkaError._PARTITION_EOF)  # noqa: SLF001 - likewise


def is_offset_gone(error: KafkaError) -> bool:
    """Return whether a message's `error()` says that Kafka no longer has the offset asked for."""
    return bool(error.code() == KafkaError._AUTO_OFFSET_RESET)  # noqa: SLF001 - likewise


def is_fatal(error: KafkaError) -> bool:
    """Return whether the client that raised the error is of no use any more.

    A message that carries such an error says so by its code alone; `fatal()` is for exceptions.
    """
    return bool(error.fatal() or error.code() == KafkaError._FATAL)  # noqa: SLF001 - likewise


def as_stream_error(
    error: KafkaException | KafkaError, config: KafkaConfig, *, timeout_s: float = DEADLINE_S
) -> StreamError:
    """Return the error of ours that says the same as the library's."""
    cause: KafkaError = error.args[0] if isinstance(error, KafkaException) else error
    if cause.code() in _UNREACHABLE:
        return BrokerUnavailableError(
            f"No Kafka broker answered at {config.bootstrap} within {timeout_s:g} s "
            f"({cause.str()}). Start the local stack with `moveline up`, or give the right "
            "bootstrap address."
        )
    return BrokerRefusedError(
        f"Kafka at {config.bootstrap} refused: {cause.name()}, {cause.str()}",
        retriable=cause.code() in _SETTLING,
    )


def ensure_topics(
    config: KafkaConfig, specs: Iterable[TopicSpec], *, timeout_s: float = DEADLINE_S
) -> list[str]:
    """Every topic exists as its spec says; return the names of those that were created.

    Raises:
        TopicMismatchError: one exists with other settings; nothing was changed in it.
        BrokerUnavailableError: no broker answered in time.
        BrokerRefusedError: the broker refused to create one (rights, replication factor).
    """
    wanted = {spec.name: spec for spec in specs}
    admin = _admin(config)
    counts = _partition_counts(admin, config, timeout_s)
    missing = [spec for name, spec in wanted.items() if name not in counts]
    created = _create(admin, config, missing, timeout_s)
    if missing:
        counts = _await_topics(admin, config, set(wanted), timeout_s)
    settings = _settings(admin, config, wanted, timeout_s)
    for name, spec in wanted.items():
        check_topic(
            spec,
            num_partitions=counts[name],
            settings=settings[name],
            bootstrap=config.bootstrap,
        )
    return created


def partition_count(config: KafkaConfig, topic: str, *, timeout_s: float = DEADLINE_S) -> int:
    """Return how many partitions the topic has.

    Raises:
        TopicMissingError: it does not exist.
        BrokerUnavailableError: no broker answered in time.
    """
    return _partitions_of(_admin(config), config, topic, timeout_s)


def topic_width(consumer: Consumer, topic: str) -> int | None:
    """Return how many partitions a topic that exists has now; None: the broker did not say.

    One request on the consumer's own connection, so that a worker can ask every few seconds.
    """
    try:
        found = consumer.list_topics(topic, timeout=_WIDTH_TIMEOUT_S).topics[topic]
    except KafkaException as error:
        _LOG.warning("partitions of %s not known: %s", topic, error.args[0].str())
        return None
    return None if found.error is not None else len(found.partitions)


def watermarks(
    config: KafkaConfig, topic: str, *, timeout_s: float = DEADLINE_S
) -> dict[int, tuple[int, int]]:
    """Return each partition's (oldest offset, offset after the newest).

    Raises:
        TopicMissingError: it does not exist.
        BrokerUnavailableError: no broker answered in time.
    """
    admin = _admin(config)
    num_partitions = _partitions_of(admin, config, topic, timeout_s)
    lows = _offsets(admin, config, topic, num_partitions, _EARLIEST(), timeout_s)
    highs = _offsets(admin, config, topic, num_partitions, _LATEST(), timeout_s)
    return {partition: (lows[partition], highs[partition]) for partition in lows}


def end_offsets(
    config: KafkaConfig, topic: str, *, timeout_s: float = DEADLINE_S
) -> dict[int, int]:
    """Return each partition's offset after the newest record; errors as for `watermarks`."""
    admin = _admin(config)
    num_partitions = _partitions_of(admin, config, topic, timeout_s)
    return _offsets(admin, config, topic, num_partitions, _LATEST(), timeout_s)


def offsets_for_time(
    config: KafkaConfig, topic: str, time_ms: int, *, timeout_s: float = DEADLINE_S
) -> dict[int, int]:
    """Return each partition's first offset appended at or after `time_ms`, else its end.

    Errors as for `watermarks`.
    """
    admin = _admin(config)
    num_partitions = _partitions_of(admin, config, topic, timeout_s)
    # The end is asked for first: a record that arrives in between is then found by its time.
    ends = _offsets(admin, config, topic, num_partitions, _LATEST(), timeout_s)
    spec = _AT_TIME(time_ms)
    found = _offsets(admin, config, topic, num_partitions, spec, timeout_s)
    return {p: offset if offset >= 0 else ends[p] for p, offset in found.items()}


def committed(
    config: KafkaConfig, group: str, topic: str, *, timeout_s: float = DEADLINE_S
) -> dict[int, int]:
    """Return the group's committed offset for each partition that has one; joins nothing.

    Raises:
        BrokerUnavailableError: no broker answered in time.
    """
    admin = _admin(config)

    def ask() -> Any:  # noqa: ANN401 - the library's answer has no type
        request = [ConsumerGroupTopicPartitions(group)]
        answers = admin.list_consumer_group_offsets(request, request_timeout=timeout_s)
        return _answer(answers[group], config, timeout_s)

    try:
        found = _once_settled(ask, timeout_s)
    except BrokerRefusedError as error:
        cause = error.__cause__
        if isinstance(cause, KafkaException) and cause.args[0].code() == _NO_GROUP:
            return {}
        raise
    return {
        place.partition: place.offset
        for place in found.topic_partitions
        if place.topic == topic and place.offset >= 0
    }


def group_is_active(config: KafkaConfig, group: str, *, timeout_s: float = DEADLINE_S) -> bool:
    """Return whether the group has members: somebody consumes, or died a moment ago.

    Raises:
        BrokerUnavailableError: no broker answered in time.
    """
    admin = _admin(config)

    def ask() -> Any:  # noqa: ANN401 - the library's answer has no type
        answers = admin.describe_consumer_groups([group], request_timeout=timeout_s)
        return _answer(answers[group], config, timeout_s)

    try:
        return bool(_once_settled(ask, timeout_s).members)
    except BrokerRefusedError as error:
        cause = error.__cause__
        if isinstance(cause, KafkaException) and cause.args[0].code() == _NO_GROUP:
            return False
        raise


def _with_log(settings: dict[str, Any]) -> dict[str, Any]:
    return {**settings, "error_cb": _log_error}


def _log_error(error: KafkaError) -> None:
    _LOG.warning("%s: %s", error.name(), error.str())


def _built(make: Callable[[], _Client], config: KafkaConfig) -> _Client:
    try:
        return make()
    except KafkaException as error:
        raise KafkaConfigError(
            f"{error.args[0].str()} (properties given: {', '.join(config.properties) or 'none'})"
        ) from error


def _admin(config: KafkaConfig) -> AdminClient:
    settings = merged(config, {}, {})
    return _built(lambda: AdminClient(_with_log(settings), logger=_LOG), config)


def _answer(future: Future[Any], config: KafkaConfig, timeout_s: float) -> Any:  # noqa: ANN401 - each request answers with a type of its own
    try:
        return future.result()
    except KafkaException as error:
        raise as_stream_error(error, config, timeout_s=timeout_s) from error


def _once_settled(ask: Callable[[], _Answer], timeout_s: float) -> _Answer:
    """Return the answer, asking again while the cluster finds a leader."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return ask()
        except BrokerRefusedError as error:
            if not error.retriable or time.monotonic() > deadline:
                raise
        time.sleep(_SETTLING_RETRY_S)


def _partition_counts(admin: AdminClient, config: KafkaConfig, timeout_s: float) -> dict[str, int]:
    """Return every topic's partition count, of the whole cluster: asking by name may create it."""
    try:
        topics = admin.list_topics(timeout=timeout_s).topics
    except KafkaException as error:
        raise as_stream_error(error, config, timeout_s=timeout_s) from error
    return {name: len(topic.partitions) for name, topic in topics.items() if topic.error is None}


def _partitions_of(admin: AdminClient, config: KafkaConfig, topic: str, timeout_s: float) -> int:
    counts = _partition_counts(admin, config, timeout_s)
    if topic not in counts:
        raise TopicMissingError(topic, bootstrap=config.bootstrap)
    return counts[topic]


def _create(
    admin: AdminClient, config: KafkaConfig, specs: list[TopicSpec], timeout_s: float
) -> list[str]:
    if not specs:
        return []
    new = [
        NewTopic(
            spec.name,
            num_partitions=spec.num_partitions,
            replication_factor=spec.replication,
            config=dict(spec.settings),
        )
        for spec in specs
    ]
    created = []
    for name, future in admin.create_topics(new, request_timeout=timeout_s).items():
        try:
            future.result()
        except KafkaException as error:
            # Somebody else was faster; whether what they made fits is checked afterwards.
            if error.args[0].code() == KafkaError.TOPIC_ALREADY_EXISTS:
                continue
            raise as_stream_error(error, config, timeout_s=timeout_s) from error
        created.append(name)
    return created


def _await_topics(
    admin: AdminClient, config: KafkaConfig, names: set[str], timeout_s: float
) -> dict[str, int]:
    """Return the partition counts once all are known; a cluster spreads the news by and by."""
    deadline = time.monotonic() + timeout_s
    while True:
        counts = _partition_counts(admin, config, timeout_s)
        if all(counts.get(name, 0) > 0 for name in names):
            return counts
        if time.monotonic() > deadline:
            raise TopicMissingError(
                ", ".join(sorted(names - counts.keys())), bootstrap=config.bootstrap
            )
        time.sleep(0.05)


def _settings(
    admin: AdminClient, config: KafkaConfig, names: Iterable[str], timeout_s: float
) -> dict[str, dict[str, str]]:
    resources = [ConfigResource(ResourceType.TOPIC, name) for name in names]
    answers = admin.describe_configs(resources, request_timeout=timeout_s)
    return {
        resource.name: {
            name: entry.value for name, entry in _answer(future, config, timeout_s).items()
        }
        for resource, future in answers.items()
    }


def _offsets(
    admin: AdminClient,
    config: KafkaConfig,
    topic: str,
    num_partitions: int,
    spec: OffsetSpec,
    timeout_s: float,
) -> dict[int, int]:
    places = [TopicPartition(topic, partition) for partition in range(num_partitions)]

    def ask() -> dict[int, int]:
        answers = admin.list_offsets(
            dict.fromkeys(places, spec),
            isolation_level=IsolationLevel.READ_COMMITTED,
            request_timeout=timeout_s,
        )
        return {
            place.partition: _answer(future, config, timeout_s).offset
            for place, future in answers.items()
        }

    return _once_settled(ask, timeout_s)
