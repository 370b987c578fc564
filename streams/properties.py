"""librdkafka's properties: what we set and why, and what a user may pass through. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from streams.errors import KafkaConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

# A broker on the same machine answers in milliseconds, one far away within a second; whoever waits
# longer than this waits for a broker that is not there.
DEADLINE_S: Final = 10.0
# Linger trades latency for batches: at 5 ms a busy producer already fills its batches.
LINGER_MS: Final = 5
# The send queue's bounds: at either, `produce` raises BufferError and the caller has to wait.
QUEUE_MESSAGES_MAX: Final = 100_000
QUEUE_KBYTES_MAX: Final = 65_536
# How long the broker may stay away before a record counts as lost and its report says so.
DELIVERY_TIMEOUT_MS: Final = 120_000
# How soon a producer that began before its topic was there sees it; the library's default is five
# minutes, and until then every record is refused.
TOPIC_REFRESH_MS: Final = 5_000
# librdkafka's own prefetch (100,000 records, 64 MB) looks like a leak, and is thrown away at every
# seek. At this bound fetching stops and goes on when half a batch has been taken out.
PREFETCH_MESSAGES: Final = 20_000
PREFETCH_KBYTES: Final = 16_384
# Once the prefetch is full the library looks again after this long; its default of 1 s would make
# a fast reader stand still.
FETCH_RETRY_MS: Final = 10
# What a dead worker without group.instance.id costs its partitions.
SESSION_TIMEOUT_MS: Final = 45_000
MAX_POLL_INTERVAL_MS: Final = 300_000


@dataclass(frozen=True)
class KafkaConfig:
    """Where the brokers are and how to reach them.

    Attributes:
        bootstrap: host:port, several separated by commas.
        properties: librdkafka properties passed through to every client (TLS, SASL, tuning).
    """

    bootstrap: str
    properties: Mapping[str, str] = field(default_factory=dict)


def producer_properties(
    config: KafkaConfig,
    *,
    idempotence: bool,
    linger_ms: int,
    queue_messages_max: int,
    queue_kbytes_max: int,
    delivery_timeout_ms: int,
    compression: str,
) -> dict[str, Any]:
    """Return what `streams.kafka.make_producer` configures."""
    tuning = {
        "linger.ms": linger_ms,
        "compression.type": compression,
        "queue.buffering.max.messages": queue_messages_max,
        "queue.buffering.max.kbytes": queue_kbytes_max,
        "delivery.timeout.ms": delivery_timeout_ms,
        "topic.metadata.refresh.interval.ms": TOPIC_REFRESH_MS,
    }
    fixed = {
        "acks": "all",
        "enable.idempotence": idempotence,
        "partitioner": "murmur2",
        # A topic made by a typing error would have the broker's settings, not ours.
        "allow.auto.create.topics": False,
    }
    return merged(config, tuning, fixed)


def consumer_properties(
    config: KafkaConfig,
    *,
    group: str,
    instance: str | None,
    session_timeout_ms: int,
    max_poll_interval_ms: int,
    prefetch_messages: int,
    reader: bool,
) -> dict[str, Any]:
    """Return what `streams.kafka.make_consumer` configures."""
    tuning = {
        "partition.assignment.strategy": "cooperative-sticky",
        "session.timeout.ms": session_timeout_ms,
        "max.poll.interval.ms": max_poll_interval_ms,
        "queued.min.messages": prefetch_messages,
        "queued.max.messages.kbytes": PREFETCH_KBYTES,
        "fetch.queue.backoff.ms": FETCH_RETRY_MS,
    }
    fixed: dict[str, Any] = {
        "group.id": group,
        "enable.auto.commit": False,
        "enable.auto.offset.store": False,
        # A position that Kafka no longer has must never jump to the newest record.
        "auto.offset.reset": "error" if reader else "earliest",
        "isolation.level": "read_committed",
        "allow.auto.create.topics": False,
        "enable.partition.eof": reader,
    }
    if instance is not None:
        fixed["group.instance.id"] = instance
    return merged(config, tuning, fixed)


def merged(
    config: KafkaConfig, tuning: Mapping[str, Any], fixed: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the properties: tuning, which the user may override, and what guarantees rest on."""
    for name, value in fixed.items():
        given = config.properties.get(name)
        if given is not None and str(given).lower() != str(value).lower():
            raise KafkaConfigError(
                f"property {name}={given} cannot be passed through: Moveline needs {name}={value}. "
                "Leave it out."
            )
    given_bootstrap = config.properties.get("bootstrap.servers", config.bootstrap)
    if given_bootstrap != config.bootstrap:
        raise KafkaConfigError(
            f"property bootstrap.servers={given_bootstrap} contradicts the bootstrap address "
            f"{config.bootstrap}. Leave the property out."
        )
    return {"bootstrap.servers": config.bootstrap, **tuning, **config.properties, **fixed}
