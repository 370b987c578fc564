"""Kafka, Redis and Triton on one machine: up, attach, spawn, down; nothing is ever left running.

This is the detached form: the servers outlive the command that started them, and `down` finds them
through stack.json. `compose.local.foreground` ties them to a block instead.
"""

from __future__ import annotations

import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from compose.errors import (
    InvalidStackOptionsError,
    PortInUseError,
    ProcessDidNotStopError,
    ProcessNameTakenError,
    ServerDidNotStartError,
    StackAlreadyUpError,
    StackNotUpError,
    UnknownProcessError,
)
from compose.local import host, processes, triton
from compose.local.interrupts import interrupts
from compose.local.options import DEFAULT_RUN_DIR, SERVICES, StackOptions, difference, request_of
from compose.local.ports import is_free
from compose.local.processes import Launch
from compose.local.server import Plan, PortTakenError, Server, await_ready, inherited_environment
from compose.local.servers import addresses_of, choose_ports, data_dir, servers
from compose.local.state import (
    STATE_VERSION,
    Addresses,
    ProcessRecord,
    StackState,
    boot_id,
    locked,
    read_state,
    remove_state,
    write_state,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from compose.local.interrupts import Interrupts

__all__ = ["SERVICES", "Addresses", "LocalStack", "Running", "StackOptions"]

PROCESS_STOP_TIMEOUT_S = 30.0  # a worker finishes its micro-batch and commits within seconds
_PORT_ATTEMPTS = 5  # a free port is lost to another program now and then, five in a row never
_LOCK_WAIT_S = 5.0
_STOP_LOCK_WAIT_S = 180.0  # another command's `up` or `down` ends within its own time-outs
_NAME = re.compile(r"[a-z][a-z0-9-]{0,39}")  # it becomes a file name


class Running(NamedTuple):
    """One process of the stack, as it is now."""

    name: str
    pid: int
    alive: bool
    log: Path


class LocalStack:
    """The servers of one folder, and the processes that were spawned beside them."""

    def __init__(self, run_dir: Path = DEFAULT_RUN_DIR, *, tied: bool = False) -> None:
        """Nothing is started, read or created yet.

        Args:
            run_dir: the folder of stack.json, logs and data.
            tied: whether children get SIGTERM when the thread that started them ends.
        """
        self._run_dir = run_dir.absolute()
        self._tied = tied
        self._started = False

    @property
    def is_started_here(self) -> bool:
        """Whether this object started what the folder records, so that it may stop it unasked."""
        return self._started

    @classmethod
    def attach(cls, run_dir: Path = DEFAULT_RUN_DIR) -> LocalStack:
        """Return the stack that is recorded in the folder, dead or alive.

        Raises:
            StackNotUpError: none is.
        """
        stack = cls(run_dir)
        stack._recorded()
        return stack

    @property
    def addresses(self) -> Addresses:
        """Where the servers answer."""
        return self._recorded().addresses

    def up(
        self, options: StackOptions, *, report: Callable[[str], None] | None = None
    ) -> Addresses:
        """Have every server answer, or leave none running and raise.

        A stack that is up already and is the one asked for is returned as it is. One of which a
        server has died is stopped and started anew. A signal in the middle stops what was started.

        Args:
            options: what to start; its run_dir replaces the constructor's.
            report: called with one line for each step.

        Raises:
            ComposeError: any refusal of compose.errors, before anything was started or after it was
                stopped again.
        """
        self._run_dir = options.run_dir.absolute()
        was_started = self._started
        try:
            with interrupts() as guard, locked(self._run_dir, wait_s=_LOCK_WAIT_S):
                return self._same_stack(options) or self._up_anew(options, guard, report)
        except (KeyboardInterrupt, SystemExit):
            # A signal that came when all was up already: the guard held it back until here.
            if self._started and not was_started:
                self.down()
            raise

    def down(self) -> None:
        """Leave nothing of the stack running; where nothing runs, nothing happens.

        Raises:
            ProcessDidNotStopError: a process outlived SIGKILL.
        """
        if not self._run_dir.exists():
            return
        with interrupts(held=True), locked(self._run_dir, wait_s=_STOP_LOCK_WAIT_S):
            self._stop_recorded()

    def running(self) -> list[Running]:
        """Return every recorded process in the order of start; none where the stack is down."""
        state = read_state(self._run_dir)
        return [
            Running(record.name, record.pid, processes.is_alive(record.identity), Path(record.log))
            for record in (state.processes if state else ())
        ]

    def spawn(
        self,
        name: str,
        argv: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        stop_timeout_s: float = PROCESS_STOP_TIMEOUT_S,
    ) -> Running:
        """Run one of the project's own processes; `down` stops it before any server.

        In the foreground form call it from the main thread: the kernel ties the child to the thread
        that started it.

        Args:
            name: lower-case word, also the name of its log.
            argv: the command; no shell reads it.
            env: added to this process's environment.
            stop_timeout_s: from SIGTERM to SIGKILL.

        Raises:
            ProcessNameTakenError: a living process has the name.
        """
        if not _NAME.fullmatch(name) or name in SERVICES:
            raise InvalidStackOptionsError(
                f"{name!r} is no name for a process of the stack",
                next_step=f"Use up to 40 of a-z, 0-9 and -, and none of {', '.join(SERVICES)}",
            )
        with locked(self._run_dir, wait_s=_LOCK_WAIT_S):
            state = self._recorded()
            for record in state.processes:
                if record.name == name and processes.is_alive(record.identity):
                    raise ProcessNameTakenError(name, pid=record.pid)
            self._forget({name})
            launch = Launch(
                argv=argv,
                environment=inherited_environment() | dict(env or {}),
                log=self._fresh_log(name),
                tied=self._tied,
            )
            identity = self._launch(name, launch, stop_timeout_s=stop_timeout_s, is_server=False)
        return Running(name, identity.pid, alive=True, log=launch.log)

    def stop(self, name: str) -> None:
        """Stop one process or server by name and strike it off; the rest goes on.

        Raises:
            UnknownProcessError: none is recorded under the name.
        """
        with locked(self._run_dir, wait_s=_STOP_LOCK_WAIT_S):
            records = {record.name: record for record in self._recorded().processes}
            if name not in records:
                raise UnknownProcessError(name, known=list(records))
            self._stop([records[name]])

    # Starting

    def _up_anew(
        self, options: StackOptions, guard: Interrupts, report: Callable[[str], None] | None
    ) -> Addresses:
        self._refuse_early(options)
        self._stop_recorded()
        complete = False
        try:
            try:
                self._start_all(options, report or _say_nothing)
                complete = True
            finally:
                # From here signals are held back, or one has raised and none will again: either way
                # the stopping below is not interrupted.
                guard.hold()
        finally:
            if not complete:
                self._stop_recorded()
        return self.addresses

    def _refuse_early(self, options: StackOptions) -> None:
        """Raise every refusal that can be known before anything is stopped, started or written."""
        host.require_linux()
        unknown = options.services - set(SERVICES)
        if unknown or not options.services:
            raise InvalidStackOptionsError(
                f"services is {sorted(options.services)}",
                next_step=f"Choose some of {', '.join(SERVICES)}",
            )
        if "triton" in options.services:
            triton.locate(options.triton_home.absolute())
            triton.require_repository(options.model_repository)
        recorded = {record.name for record in _living(read_state(self._run_dir))}
        addresses = Addresses()
        for server in servers(options, lambda: addresses, run_dir=self._run_dir, shm_prefix=""):
            for option, port in server.wanted_ports.items():
                # A remnant of our own stack may hold it: it is stopped before the servers start.
                if port is not None and server.name not in recorded and not is_free(port):
                    raise PortInUseError(port, server=server.name, option=option)

    def _start_all(self, options: StackOptions, tell: Callable[[str], None]) -> None:
        if not options.persist:
            shutil.rmtree(data_dir(options, run_dir=self._run_dir), ignore_errors=True)
        (self._run_dir / "logs").mkdir(parents=True, exist_ok=True)
        owner = processes.current() if self._tied else None
        state = StackState(
            version=STATE_VERSION,
            boot_id=boot_id(),
            request=request_of(options),
            owner_pid=owner.pid if owner else None,
            owner_start_ticks=owner.start_ticks if owner else None,
            shm_prefix=f"moveline_{secrets.token_hex(4)}_",
        )
        self._started = True
        write_state(self._run_dir, state)
        for server in servers(
            options, lambda: self.addresses, run_dir=self._run_dir, shm_prefix=state.shm_prefix
        ):
            tell(f"{server.name} is starting")
            began = time.monotonic()
            ports = self._start(server)
            self._record_addresses(addresses_of(server.name, ports))
            tell(f"{server.name} is ready after {time.monotonic() - began:.1f} s")

    def _start(self, server: Server) -> Mapping[str, int]:
        """Return the ports of a server that answers."""
        for _ in range(_PORT_ATTEMPTS):
            ports = choose_ports(server)
            log = self._fresh_log(server.name)
            plan = server.plan(ports)
            try:
                self._await(server.name, plan, log)
            except PortTakenError:
                self._stop([r for r in self._recorded().processes if r.name == server.name])
            else:
                return ports
        reason = f"{_PORT_ATTEMPTS} times another program took a port just chosen for it"
        raise ServerDidNotStartError(server.name, reason=reason, log=log)

    def _await(self, name: str, plan: Plan, log: Path) -> None:
        launch = Launch(argv=plan.argv, environment=plan.environment, log=log, tied=self._tied)
        identity = self._launch(name, launch, stop_timeout_s=plan.stop_timeout_s, is_server=True)
        await_ready(name, identity, plan, log=log)

    def _launch(
        self, name: str, launch: Launch, *, stop_timeout_s: float, is_server: bool
    ) -> processes.Identity:
        def record(identity: processes.Identity) -> None:
            entry = ProcessRecord(
                name=name,
                pid=identity.pid,
                start_ticks=identity.start_ticks,
                log=str(launch.log),
                stop_timeout_s=stop_timeout_s,
                is_server=is_server,
            )
            state = self._recorded()
            processes_now = (*state.processes, entry)
            write_state(self._run_dir, msgspec.structs.replace(state, processes=processes_now))

        return processes.start(launch, record=record)

    # Stopping

    def _stop_recorded(self) -> None:
        """Stop everything in stack.json, whoever started it, and then the file itself goes."""
        state = read_state(self._run_dir)
        if state is not None:
            each_server = [[record] for record in state.processes if record.is_server]
            others = [record for record in state.processes if not record.is_server]
            self._stop(others, *reversed(each_server))
            triton.remove_shared_memory(state.shm_prefix)
        remove_state(self._run_dir)
        self._started = False

    def _stop(self, *groups: list[ProcessRecord]) -> None:
        """Stop the groups one after the other, all of them even where one resists."""
        resisting = []
        for group in groups:
            timeout_s = max((record.stop_timeout_s for record in group), default=0.0)
            left = processes.stop([record.identity for record in group], timeout_s=timeout_s)
            if left:
                names = ", ".join(record.name for record in group)
                resisting.append(f"{names} (pid {', '.join(str(one.pid) for one in left)})")
            else:
                self._forget({record.name for record in group})
        if resisting:
            raise ProcessDidNotStopError(resisting, run_dir=self._run_dir)

    # The record

    def _recorded(self) -> StackState:
        state = read_state(self._run_dir)
        if state is None:
            raise StackNotUpError(self._run_dir)
        return state

    def _forget(self, names: set[str]) -> None:
        state = read_state(self._run_dir)
        if state is None:  # removed by hand meanwhile; then there is nothing to strike off
            return
        kept = tuple(record for record in state.processes if record.name not in names)
        write_state(self._run_dir, msgspec.structs.replace(state, processes=kept))

    def _record_addresses(self, found: Mapping[str, str]) -> None:
        state = self._recorded()
        addresses = msgspec.structs.replace(state.addresses, **found)
        write_state(self._run_dir, msgspec.structs.replace(state, addresses=addresses))

    def _same_stack(self, options: StackOptions) -> Addresses | None:
        """Return the addresses of the whole stack asked for; None where one must be started.

        Raises:
            StackAlreadyUpError: what runs is another's, or another stack.
        """
        state = read_state(self._run_dir)
        living = _living(state)
        if state is None or not living:
            return None
        if state.is_owned():
            reason = f"it belongs to the command with pid {state.owner_pid}"
            raise StackAlreadyUpError(self._run_dir, reason=reason)
        if {record.name for record in living if record.is_server} != set(state.request.services):
            return None
        if self._tied:
            reason = "this command would stop it at its end"
            raise StackAlreadyUpError(self._run_dir, reason=reason)
        reason = difference(state, options)
        if reason:
            raise StackAlreadyUpError(self._run_dir, reason=reason)
        return state.addresses

    def _fresh_log(self, name: str) -> Path:
        """Return the path of an empty log; the one of the run before stays beside it."""
        log = self._run_dir / "logs" / f"{name}.log"
        if log.exists():
            log.replace(log.with_suffix(".previous.log"))
        log.touch()
        return log


def _say_nothing(_line: str) -> None:
    return


def _living(state: StackState | None) -> list[ProcessRecord]:
    if state is None:
        return []
    return [record for record in state.processes if processes.is_alive(record.identity)]
