"""What is asked of the broker: topics, offsets, groups. Nothing is joined and nothing consumed."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final, TypeVar

from confluent_kafka import (
    ConsumerGroupTopicPartitions,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

# The library's type information hides these behind confluent_kafka.admin; the version is pinned.
from confluent_kafka.admin._config import ConfigResource
from confluent_kafka.admin._listoffsets import OffsetSpec
from confluent_kafka.admin._resource import ResourceType
from confluent_kafka.cimpl import NewTopic

from streams.errors import BrokerRefusedError, TopicMissingError
from streams.kafka.clients import LOG, as_stream_error, built, with_log
from streams.properties import DEADLINE_S, KafkaConfig, merged
from streams.topics import check_topic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from concurrent.futures import Future

    from confluent_kafka import Consumer

    from streams.topics import TopicSpec

_Answer = TypeVar("_Answer")

# Untyped in the library, hence named with their types here.
_EARLIEST: Final[Callable[[], OffsetSpec]] = OffsetSpec.earliest
_LATEST: Final[Callable[[], OffsetSpec]] = OffsetSpec.latest
_AT_TIME: Final[Callable[[int], OffsetSpec]] = OffsetSpec.for_timestamp

_SETTLING_RETRY_S: Final = 0.05
# Asked again a few seconds later; a worker that waits applies nothing meanwhile.
_WIDTH_TIMEOUT_S: Final = 1.0
_NO_GROUP: Final = KafkaError.GROUP_ID_NOT_FOUND


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


def topic_settings(
    config: KafkaConfig, topics: Iterable[str], *, timeout_s: float = DEADLINE_S
) -> dict[str, dict[str, str]]:
    """Return the settings of each topic, by name; errors as for `watermarks`."""
    return _settings(_admin(config), config, topics, timeout_s)


def topic_width(consumer: Consumer, topic: str) -> int | None:
    """Return how many partitions a topic that exists has now; None: the broker did not say.

    One request on the consumer's own connection, so that a worker can ask every few seconds.
    """
    try:
        found = consumer.list_topics(topic, timeout=_WIDTH_TIMEOUT_S).topics[topic]
    except KafkaException as error:
        LOG.warning("partitions of %s not known: %s", topic, error.args[0].str())
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


def _admin(config: KafkaConfig) -> AdminClient:
    settings = merged(config, {}, {})
    return built(lambda: AdminClient(with_log(settings), logger=LOG), config)


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
