"""Where the near-line app finds everything: Faust starts it, so the environment tells it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from features.keys import parse_generation
from features.sources import HALF_LIFE_H_DEFAULT
from streams.errors import NearlineConfigError
from streams.nearline_metrics import METRICS_PORT_DEFAULT
from streams.properties import KafkaConfig
from streams.topics import DEFAULT_PREFIX, Topics

if TYPE_CHECKING:
    from collections.abc import Mapping

PORT_DEFAULT: Final = 6066
TRITON_DEFAULT: Final = "127.0.0.1:8001"
# How long after its gap a session may still be continued by an event that was on its way.
LATENESS_S_DEFAULT: Final = 60.0
_PREFIX: Final = "MOVELINE_"
_PORT_MAX: Final = 65_535


@dataclass(frozen=True, kw_only=True)
class NearlineConfig:
    """How the near-line app runs.

    Attributes:
        kafka: the cluster.
        topics: names of the topics.
        redis_url: redis://, rediss:// or unix://.
        generation: the state whose sessions are swept, and under whose rules events count.
        port: Faust's web port, with /moveline/status on it.
        metrics_port: where Prometheus scrapes; 0 takes a free one.
        triton: host:port of the server that folds chunks.
        lateness_s: how long after its gap a session waits for late events before it closes.
        half_life_h: hours in which an event's weight among trending items halves.
    """

    kafka: KafkaConfig
    topics: Topics
    redis_url: str
    generation: int
    port: int = PORT_DEFAULT
    metrics_port: int = METRICS_PORT_DEFAULT
    lateness_s: float = LATENESS_S_DEFAULT
    triton: str = TRITON_DEFAULT
    half_life_h: int = HALF_LIFE_H_DEFAULT

    @property
    def app_id(self) -> str:
        """The consumer group; apps of two generations or prefixes do not share one."""
        return f"{self.topics.prefix}-nearline-g{self.generation}"

    def to_environment(self) -> dict[str, str]:
        """Return the variables from which `from_environment` makes the same again."""
        return {
            f"{_PREFIX}KAFKA__BOOTSTRAP": self.kafka.bootstrap,
            f"{_PREFIX}KAFKA__PROPERTIES": json.dumps(dict(self.kafka.properties)),
            f"{_PREFIX}KAFKA__PREFIX": self.topics.prefix,
            f"{_PREFIX}REDIS__URL": self.redis_url,
            f"{_PREFIX}TRITON__GRPC": self.triton,
            f"{_PREFIX}GENERATION": f"g{self.generation}",
            f"{_PREFIX}NEARLINE__PORT": str(self.port),
            f"{_PREFIX}NEARLINE__METRICS_PORT": str(self.metrics_port),
            f"{_PREFIX}NEARLINE__LATENESS_S": str(self.lateness_s),
            f"{_PREFIX}SOURCES__HALF_LIFE_H": str(self.half_life_h),
        }


def from_environment(environment: Mapping[str, str]) -> NearlineConfig:
    """Return the configuration in the environment, with the defaults of a local stack.

    Raises:
        NearlineConfigError: a value cannot be used.
    """

    def read(name: str, default: object) -> str:
        return environment.get(_PREFIX + name) or str(default)

    try:
        return NearlineConfig(
            kafka=KafkaConfig(
                read("KAFKA__BOOTSTRAP", "127.0.0.1:9092"),
                _plaintext_only(json.loads(read("KAFKA__PROPERTIES", "{}"))),
            ),
            topics=Topics(read("KAFKA__PREFIX", DEFAULT_PREFIX)),
            redis_url=read("REDIS__URL", "redis://127.0.0.1:6379/0"),
            generation=parse_generation("g" + read("GENERATION", "g1").removeprefix("g")),
            port=_port(read("NEARLINE__PORT", PORT_DEFAULT)),
            metrics_port=_port(read("NEARLINE__METRICS_PORT", METRICS_PORT_DEFAULT)),
            triton=read("TRITON__GRPC", TRITON_DEFAULT),
            lateness_s=max(0.0, float(read("NEARLINE__LATENESS_S", LATENESS_S_DEFAULT))),
            half_life_h=max(1, int(read("SOURCES__HALF_LIFE_H", HALF_LIFE_H_DEFAULT))),
        )
    except ValueError as error:
        raise NearlineConfigError(
            f"near-line app: {error}. Start it with `moveline nearline`, or mend the variable."
        ) from error


def _port(text: str) -> int:
    number = int(text)
    if not 0 <= number <= _PORT_MAX:
        raise ValueError(f"port {number}, allowed 0..{_PORT_MAX}")
    return number


def _plaintext_only(properties: Mapping[str, str]) -> Mapping[str, str]:
    """Return the properties; Faust's own connection takes none of them, so it must need none."""
    protocol = properties.get("security.protocol", "plaintext")
    if protocol.lower() != "plaintext":
        raise ValueError(
            f"kafka property security.protocol={protocol}: Faust's connection is plaintext here"
        )
    return properties
