"""The stack's servers, made from its options one after the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from compose.errors import PortInUseError
from compose.local import kafka, redis, triton
from compose.local.ports import LOOPBACK, free_ports, is_free

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from compose.local.options import StackOptions
    from compose.local.server import Server
    from compose.local.state import Addresses


def servers(
    options: StackOptions, known: Callable[[], Addresses], *, run_dir: Path, shm_prefix: str
) -> Iterator[Server]:
    """Yield the servers in the order of start, each made when it is asked for.

    Args:
        options: what to start.
        known: tells the addresses of the servers that have been started by then.
        run_dir: the stack's folder.
        shm_prefix: of this stack's shared-memory regions.
    """
    data, timeout_s = data_dir(options, run_dir=run_dir), options.ready_timeout_s
    if "redis" in options.services:
        yield redis.Redis(
            binary=redis.locate(),
            data_dir=data / "redis",
            port=options.redis_port,
            ready_timeout_s=timeout_s,
        )
    if "kafka" in options.services:
        yield _broker(options, data / "kafka", run_dir=run_dir)
    if "triton" in options.services:
        yield triton.Triton(
            home=options.triton_home.absolute(),
            work_dir=run_dir / "triton",
            repository=options.model_repository.absolute(),
            extra_environment=_filled(options.triton_environment, known()),
            shm_prefix=shm_prefix,
            ports={
                triton.GRPC_OPTION: options.triton_grpc_port,
                triton.HTTP_OPTION: options.triton_http_port,
                triton.METRICS_OPTION: options.triton_metrics_port,
            },
            ready_timeout_s=timeout_s,
        )


def _broker(options: StackOptions, data_dir: Path, *, run_dir: Path) -> Server:
    if options.kafka_home is None:
        return kafka.EmbeddedKafka(
            binary=kafka.locate_embedded(),
            data_dir=data_dir,
            port=options.kafka_port,
            ready_timeout_s=options.ready_timeout_s,
        )
    home = options.kafka_home.absolute()
    kafka.require_home(home)
    return kafka.ApacheKafka(
        java=kafka.locate_java(),
        home=home,
        data_dir=data_dir,
        log_dir=run_dir / "logs",
        port=options.kafka_port,
        ready_timeout_s=options.ready_timeout_s,
    )


def choose_ports(server: Server) -> dict[str, int]:
    """Return a port for each option; those asked for by number must be free.

    Raises:
        PortInUseError: one of those is not.
    """
    wanted = server.wanted_ports
    for option, port in wanted.items():
        if port is not None and not is_free(port):
            raise PortInUseError(port, server=server.name, option=option)
    fresh = iter(free_ports(len(wanted)))
    return {option: next(fresh) if port is None else port for option, port in wanted.items()}


def addresses_of(name: str, ports: Mapping[str, int]) -> dict[str, str]:
    """Return the fields of Addresses that a server with these ports fills."""
    if name == "redis":
        return {"redis": f"redis://{LOOPBACK}:{ports[redis.PORT_OPTION]}/0"}
    if name == "kafka":
        return {"kafka": f"{LOOPBACK}:{ports[kafka.PORT_OPTION]}"}
    return {
        "triton_grpc": f"{LOOPBACK}:{ports[triton.GRPC_OPTION]}",
        "triton_http": f"{LOOPBACK}:{ports[triton.HTTP_OPTION]}",
        "triton_metrics": f"{LOOPBACK}:{ports[triton.METRICS_OPTION]}",
    }


def data_dir(options: StackOptions, *, run_dir: Path) -> Path:
    """Return where the servers keep what they hold."""
    # State in Redis names positions in one broker's log: another kind of broker gets another Redis.
    if "kafka" not in options.services:
        return run_dir / "data" / "external"
    return run_dir / "data" / ("apache" if options.kafka_home else "embedded")


def _filled(environment: Mapping[str, str], addresses: Addresses) -> dict[str, str]:
    return {
        name: value.replace("{kafka}", addresses.kafka).replace("{redis}", addresses.redis)
        for name, value in environment.items()
    }
