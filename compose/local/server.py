"""What the stack needs to know of a server in order to start it, wait for it and stop it."""

from __future__ import annotations

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from compose.errors import ServerDidNotStartError
from compose.local.ports import listens
from compose.local.processes import Identity, ended_within, is_alive

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

_PROBE_INTERVAL_S = 0.02
PROBE_TIMEOUT_S = 1.0  # for one probe on loopback; a server that takes longer is asked again
_LOG_TAIL_BYTES = 16_384  # enough for the last exception of a JVM
_PORT_TAKEN = re.compile(
    r"address already in use|port \d+ is already in use|' already in use", re.IGNORECASE
)
_COMPLAINT = re.compile(
    r"error|exception|fatal|cannot|failed|unable|refus|invalid|bad ", re.IGNORECASE
)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One server, ready to be started: its configuration is written, its ports are decided."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    ports: tuple[
        int, ...
    ]  # all must be listened on by the process itself before it counts as ready
    answers: Callable[[], bool]  # one round trip in the server's own protocol; may raise OSError
    ready_timeout_s: float
    stop_timeout_s: float  # from SIGTERM to SIGKILL; long enough to write out what it holds


class Server(Protocol):
    """A server that can be planned for any ports."""

    @property
    def name(self) -> str:
        """One word, also the name of its log."""
        ...

    @property
    def wanted_ports(self) -> Mapping[str, int | None]:
        """Option -> the port asked for, or None for a free one."""
        ...

    def plan(self, ports: Mapping[str, int]) -> Plan:
        """Write the configuration for these ports and return what to run."""
        ...


class PortTakenError(Exception):
    """The server ended because another program had taken one of its ports meanwhile."""


def inherited_environment() -> dict[str, str]:
    """Return the environment that servers get; the one place where this package reads it."""
    return dict(os.environ)


def await_ready(name: str, identity: Identity, plan: Plan, *, log: Path) -> None:
    """Return once the process itself listens on all its ports and answers in its protocol.

    Raises:
        PortTakenError: it ended for want of a port.
        ServerDidNotStartError: it ended for another reason, or stayed silent for
            `plan.ready_timeout_s`.
    """
    deadline = time.monotonic() + plan.ready_timeout_s
    while not _is_ready(identity, plan):
        if ended_within(identity, _PROBE_INTERVAL_S):
            tail = _tail(log)
            if _PORT_TAKEN.search(tail):
                raise PortTakenError(name)
            reason = f"it ended at once ({_last_complaint(tail)})"
            raise ServerDidNotStartError(name, reason=reason, log=log)
        if time.monotonic() > deadline:
            reason = f"it was not ready after {plan.ready_timeout_s:g} s"
            raise ServerDidNotStartError(name, reason=reason, log=log)


def _is_ready(identity: Identity, plan: Plan) -> bool:
    if not all(listens(identity.pid, port) for port in plan.ports):
        return False
    try:
        return plan.answers() and is_alive(identity)
    except OSError:  # it accepts connections before it can serve them; the caller asks again
        return False


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _last_complaint(tail: str) -> str:
    """Return the last line that names a fault, or the last line, or a word for an empty log."""
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    faults = [line for line in lines if _COMPLAINT.search(line) and not line.startswith("at ")]
    return (faults or lines or ["its log is empty"])[-1]
