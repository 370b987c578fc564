"""What a local stack is asked to be, and whether the one that runs is that."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from compose.local import triton
from compose.local.state import Request, StackState

if TYPE_CHECKING:
    from collections.abc import Mapping

# In the order of their start; they stop the other way round.
SERVICES = ("redis", "kafka", "triton")
DEFAULT_RUN_DIR = Path(".moveline")
READY_TIMEOUT_S = 90.0  # a JVM on two busy cores needs 10; beyond this a start is taken for failed


@dataclass(frozen=True, kw_only=True)
class StackOptions:
    """What to start, and where; a port of None means a free one."""

    model_repository: Path = Path("model_repo")
    run_dir: Path = DEFAULT_RUN_DIR
    services: frozenset[str] = frozenset(SERVICES)
    kafka_home: Path | None = None  # Apache Kafka's folder; None starts the embedded broker
    kafka_port: int | None = None
    redis_port: int | None = None
    triton_grpc_port: int | None = None
    triton_http_port: int | None = None
    triton_metrics_port: int | None = None
    # {kafka} and {redis} in a value become the addresses of the servers started before it.
    triton_environment: Mapping[str, str] = field(default_factory=dict)
    triton_home: Path = field(default_factory=triton.default_home)
    persist: bool = True  # False: begin with empty data folders; nothing is ever deleted at the end
    ready_timeout_s: float = READY_TIMEOUT_S  # for each server


def request_of(options: StackOptions) -> Request:
    """Return the part of the options that a second `up` must repeat."""
    return Request(
        services=sorted(options.services),
        model_repository=str(options.model_repository.absolute()),
        kafka_home=str(options.kafka_home.absolute()) if options.kafka_home else "",
        triton_environment=dict(options.triton_environment),
    )


def difference(state: StackState, options: StackOptions) -> str:
    """Return how the running stack differs from the one asked for, or nothing."""
    asked = request_of(options)
    for name in Request.__struct_fields__:
        if getattr(state.request, name) != getattr(asked, name):
            return f"it runs with {name}={getattr(state.request, name)}"
    given = {
        "kafka": options.kafka_port,
        "redis": options.redis_port,
        "triton_grpc": options.triton_grpc_port,
        "triton_http": options.triton_http_port,
        "triton_metrics": options.triton_metrics_port,
    }
    for name, port in given.items():
        address: str = getattr(state.addresses, name)
        if port is not None and not address.removesuffix("/0").endswith(f":{port}"):
            return f"its {name} is at {address}"
    return ""
