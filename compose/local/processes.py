"""Start and stop processes so that neither a crash nor a recycled pid can go wrong.

A process is named by its pid *and* its start time, and it is signalled through a pidfd: a pid that
the kernel has given to somebody else since is never touched. Each one leads a session of its own,
so that Ctrl-C in a terminal reaches only us, and so that what it left behind can be found by the
session's number.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

GO_FD = 3  # where launch.py waits for the word
_LAUNCHER = Path(__file__).with_name("launch.py")
_KILL_TIMEOUT_S = 10.0  # the kernel ends a killed process at once unless it waits for a disk
_GONE_STATES = "ZX"  # a zombie is dead for us; who reaps it depends on who started it


@dataclass(frozen=True, kw_only=True)
class Identity:
    """One process for as long as the machine is up; two processes never share it."""

    pid: int
    start_ticks: int


@dataclass(frozen=True, kw_only=True)
class _Stat:
    state: str
    session: int
    start_ticks: int


@dataclass(frozen=True, kw_only=True)
class Launch:
    """What to run: no shell is involved, and nothing is inherited but the environment given."""

    argv: Sequence[str]
    environment: Mapping[str, str]
    log: Path
    tied: bool  # the kernel sends SIGTERM when the starting thread ends, even by SIGKILL


def start(launch: Launch, *, record: Callable[[Identity], None]) -> Identity:
    """Return the running process; `record` has been called before its first instruction.

    Where `record` raises, or this process dies in the middle, the command is never run.
    """
    death_signal = signal.SIGTERM if launch.tied else 0
    launcher = [sys.executable, "-I", "-S", str(_LAUNCHER)]
    read_end, write_end = os.pipe()
    log = os.open(launch.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    try:
        # Not subprocess.Popen: its object warns when it is forgotten, and a detached stack outlives
        # us on purpose.
        pid = os.posix_spawn(
            sys.executable,
            [*launcher, str(os.getpid()), f"{death_signal:d}", *launch.argv],
            dict(launch.environment),
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                (os.POSIX_SPAWN_DUP2, read_end, GO_FD),
                (os.POSIX_SPAWN_DUP2, log, 1),
                (os.POSIX_SPAWN_DUP2, log, 2),
            ],
            setsid=True,
        )
        identity = _identify(pid)
        record(identity)
        os.write(write_end, b"g")
    finally:
        for descriptor in (read_end, write_end, log):
            os.close(descriptor)
    return identity


def is_alive(identity: Identity) -> bool:
    """Whether that very process still runs; a zombie does not."""
    stat = _read_stat(identity.pid)
    return (
        stat is not None
        and stat.start_ticks == identity.start_ticks
        and stat.state not in _GONE_STATES
    )


def current() -> Identity:
    """Return the identity of the calling process."""
    return _identify(os.getpid())


def ended_within(identity: Identity, timeout_s: float) -> bool:
    """Whether the process is gone, after waiting for that at most so long."""
    with _opened(identity) as handles:
        return all(_ended(pidfd, timeout_s) for pidfd in handles)


def stop(identities: Iterable[Identity], *, timeout_s: float) -> list[Identity]:
    """Leave none of them nor their descendants running; return those that outlived SIGKILL.

    All get SIGTERM at once and `timeout_s` together to obey it.
    """
    asked = list(identities)
    deadline = time.monotonic() + timeout_s
    for identity in asked:
        _send(identity, signal.SIGTERM)
    for identity in asked:
        if not ended_within(identity, max(0.0, deadline - time.monotonic())):
            _send(identity, signal.SIGKILL)
    left = [identity for identity in asked if not ended_within(identity, _KILL_TIMEOUT_S)]
    for identity in asked:
        left += _kill_stragglers(identity)
        _reap(identity)
    return left


def _kill_stragglers(leader: Identity) -> list[Identity]:
    """End what a dead leader left in its session (Triton's model processes); return the rest."""
    stragglers = list(_session_members(leader))
    for identity in stragglers:
        _send(identity, signal.SIGKILL)
    return [identity for identity in stragglers if not ended_within(identity, _KILL_TIMEOUT_S)]


def _session_members(leader: Identity) -> Iterator[Identity]:
    # The kernel gives out no pid that still numbers a session. If the pid belongs to a younger
    # process now, then the session had no member left, and those found under the number are
    # strangers.
    now = _read_stat(leader.pid)
    if now is not None and now.start_ticks != leader.start_ticks:
        return
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal() or int(entry.name) == leader.pid:
            continue
        stat = _read_stat(int(entry.name))
        if stat is not None and stat.session == leader.pid and stat.state not in _GONE_STATES:
            yield Identity(pid=int(entry.name), start_ticks=stat.start_ticks)


def _identify(pid: int) -> Identity:
    # For a child of ours, which is not reaped yet: the entry exists even if it has ended already.
    stat = _read_stat(pid)
    assert stat is not None, f"the running process or unreaped child {pid} has no entry in /proc"
    return Identity(pid=pid, start_ticks=stat.start_ticks)


def _reap(identity: Identity) -> None:
    """Give a dead child's entry back to the kernel; whoever else started it does so himself."""
    stat = _read_stat(identity.pid)
    if stat is None or stat.start_ticks != identity.start_ticks:
        return
    try:
        os.waitpid(identity.pid, os.WNOHANG)
    except ChildProcessError:
        return


def _read_stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The second field is the command in parentheses and may hold anything; proc(5) numbers fields
    # from 1.
    fields = text.rpartition(")")[2].split()
    return _Stat(state=fields[0], session=int(fields[3]), start_ticks=int(fields[19]))


def _send(identity: Identity, number: signal.Signals) -> None:
    with _opened(identity) as handles:
        for pidfd in handles:
            try:
                signal.pidfd_send_signal(pidfd, number)
            except ProcessLookupError:  # it ended by itself; that is what the signal was for
                return


def _ended(pidfd: int, timeout_s: float) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(timeout_s * 1000))


@contextmanager
def _opened(identity: Identity) -> Iterator[list[int]]:
    """Yield the pidfd of the process in a list, or an empty list where it is gone."""
    try:
        pidfd = os.pidfd_open(identity.pid)
    except ProcessLookupError:
        yield []
        return
    try:
        # Looked at after opening: from here on the handle cannot slide to another process. A zombie
        # counts, because its other threads may be on their way out; only the pidfd tells when all
        # are.
        stat = _read_stat(identity.pid)
        yield [pidfd] if stat is not None and stat.start_ticks == identity.start_ticks else []
    finally:
        os.close(pidfd)
