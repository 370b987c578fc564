"""How producers and consumers are configured, and what their errors mean."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition

from streams.errors import (
    BrokerRefusedError,
    BrokerUnavailableError,
    KafkaConfigError,
    StreamError,
)
from streams.properties import (
    DEADLINE_S,
    DELIVERY_TIMEOUT_MS,
    LINGER_MS,
    MAX_POLL_INTERVAL_MS,
    PREFETCH_MESSAGES,
    QUEUE_KBYTES_MAX,
    QUEUE_MESSAGES_MAX,
    SESSION_TIMEOUT_MS,
    KafkaConfig,
    consumer_properties,
    producer_properties,
)

LOG: Final = logging.getLogger("moveline.kafka")
_Client = TypeVar("_Client")
OnCommit = Callable[[KafkaError | None, list[TopicPartition]], None]

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
    return built(lambda: Producer(with_log(settings), logger=LOG), config)


def make_consumer(
    config: KafkaConfig,
    *,
    group: str,
    instance: str | None = None,
    session_timeout_ms: int = SESSION_TIMEOUT_MS,
    max_poll_interval_ms: int = MAX_POLL_INTERVAL_MS,
    prefetch_messages: int = PREFETCH_MESSAGES,
    reader: bool = False,
    on_commit: OnCommit | None = None,
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
        reader: for whoever assigns and seeks by itself: an "end of partition" is delivered too
            (`is_end_of_partition`), and an offset that Kafka no longer has is an error
            (`is_offset_gone`), not a jump to the oldest.
        on_commit: told how each commit ended, by whoever polls.

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
        reader=reader,
    )
    callbacks = {} if on_commit is None else {"on_commit": on_commit}
    return built(lambda: Consumer({**with_log(settings), **callbacks}, logger=LOG), config)


def is_end_of_partition(error: KafkaError) -> bool:
    """Return whether a message's `error()` only says that nothing more is there yet."""
    return bool(error.code() == KafkaError._PARTITION_EOF)  # noqa: SLF001 - likewise


def is_not_ready(error: KafkaError) -> bool:
    """Return whether a partition was given so lately that nobody can seek in it yet."""
    return bool(error.code() == KafkaError._STATE)  # noqa: SLF001 - the library's name for it


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


def with_log(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the properties of a client whose errors are logged."""
    return {**settings, "error_cb": _log_error}


def _log_error(error: KafkaError) -> None:
    LOG.warning("%s: %s", error.name(), error.str())


def built(make: Callable[[], _Client], config: KafkaConfig) -> _Client:
    """Return the client that `make` makes.

    Raises:
        KafkaConfigError: the library refuses a property.
    """
    try:
        return make()
    except KafkaException as error:
        raise KafkaConfigError(
            f"{error.args[0].str()} (properties given: {', '.join(config.properties) or 'none'})"
        ) from error
