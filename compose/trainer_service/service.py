"""The trainer, for as long as it is left running: wake, decide, have one run done, again.

A run is a process of its own. Whatever becomes of it, killed for its memory included, the service
goes on, and what a run took of memory is given back. A trainer whose service is killed is told to
stop by the kernel.
"""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import os
import signal
import time
from typing import TYPE_CHECKING, Final, Literal

from compose.cli.options import kafka_of
from compose.errors import ComposeError
from compose.local.interrupts import interrupts
from compose.local.launch import PR_SET_PDEATHSIG
from compose.trainer_service.heal import heal
from compose.trainer_service.look import look
from compose.trainer_service.records import RunRecord, Runs, run_name
from compose.trainer_service.schedule import (
    Past,
    Run,
    Schedule,
    Seen,
    Skip,
    Wait,
    backoff_ms,
    decide,
    num_new_offsets,
)
from features.clock import now_ms
from features.errors import FeatureError
from features.keys import TRAINER_LEASE_KEY
from features.lake_window import lake_extent
from features.lease import Lease
from features.redis import connect
from streams.errors import StreamError

if TYPE_CHECKING:
    from threading import Event as StopEvent

    from compose.settings import Settings
    from compose.trainer_service.metrics import TrainerMetrics

log = logging.getLogger("moveline.trainer")

# How often the trainer looks at the clock and at the names of the lake's files.
POLL_S: Final = 5.0
# How often it asks whether the run has ended, or is to end.
WATCH_S: Final = 0.2
# A run that is told to stop ends between two steps; after so long it is killed.
STOP_TIMEOUT_S: Final = 20.0
_FAILURES: Final = (ComposeError, FeatureError, StreamError, OSError)


class Service:
    """One trainer; `serve` is all it does."""

    def __init__(self, settings: Settings, runs: Runs, metrics: TrainerMetrics) -> None:
        self._settings = settings
        self._schedule = Schedule.of(settings.training)
        self._runs = runs
        self._metrics = metrics

    def serve(self, stop: StopEvent) -> None:
        """Train whenever it is time, until told to stop."""
        while not stop.is_set():
            action = self.turn()
            self._metrics.looked.set(now_ms() / 1000)
            if isinstance(action, Run):
                self._have_run(action, stop)
            else:
                stop.wait(POLL_S)

    def turn(self) -> Run | Skip | Wait:
        """Look around once and return what is to be done; a reason not to train is recorded."""
        try:
            return self._decide()
        except _FAILURES as error:
            log.warning("the trainer could not look around: %s", error)
            return self._record("failed", "time", str(error))

    def _decide(self) -> Run | Skip | Wait:
        past = Past.of(self._runs.all())
        self._metrics.failures.set(past.failures)
        if past.failures and now_ms() < past.failed_ms + backoff_ms(past.failures):
            return Wait(past.failed_ms + backoff_ms(past.failures))
        client = connect(self._settings.redis.url)
        owner = f"{run_name(now_ms())}:{os.getpid()}"
        lease_s = self._settings.training.lease_s
        lease = Lease.take(client, TRAINER_LEASE_KEY, owner=owner, lease_s=lease_s)
        if lease is None:
            return Wait(now_ms() + round(POLL_S * 1000))
        with lease:
            newest = self._runs.newest()
            if newest is not None and newest.state == "running":
                heal(self._settings, self._runs)
                return Wait(now_ms())
            return self._decide_alone(past)

    def _decide_alone(self, past: Past) -> Run | Skip | Wait:
        """Decide by what costs nothing to look at; ask Kafka only when it is time."""
        _, topics = kafka_of(self._settings)
        extent = lake_extent(self._settings.lake.path, topics.events)
        seen = Seen(now_ms=now_ms(), lake=extent, lag=0)
        self._metrics.new_offsets.set(num_new_offsets(past, seen))
        action = decide(self._schedule, past, seen)
        if isinstance(action, Wait) and self._metrics.served_ms:
            return action
        seen = look(self._settings)
        self._metrics.served_ms = seen.served_ms
        action = decide(self._schedule, past, seen)
        if isinstance(action, Skip):
            self._record("skipped", action.why, action.says)
        return action

    def _record(self, state: Literal["failed", "skipped"], why: str, says: str) -> Wait:
        at_ms = now_ms()
        record = RunRecord(
            run=run_name(at_ms),
            state=state,
            why=why,
            started_ms=at_ms,
            ended_ms=at_ms,
            says=says,
        )
        self._metrics.add(self._runs.write_again(record))
        return Wait(at_ms)

    def _have_run(self, action: Run, stop: StopEvent) -> None:
        """One run has ended once this returns."""
        before = self._runs.newest()
        spawn = multiprocessing.get_context("spawn")
        child = spawn.Process(target=run_child, args=(self._settings, action.why, os.getpid()))
        child.start()
        self._metrics.running.set(1)
        killed_at_s = time.monotonic() + self._settings.training.run_s_max
        told = False
        while child.is_alive():
            child.join(WATCH_S)
            self._metrics.looked.set(now_ms() / 1000)
            if stop.is_set() and not told:
                child.terminate()
                told, killed_at_s = True, time.monotonic() + STOP_TIMEOUT_S
            if time.monotonic() > killed_at_s:
                log.warning("the run does not end and is killed")
                child.kill()
        code = child.exitcode
        child.close()
        self._metrics.running.set(0)
        newest = self._runs.newest()
        if newest == before and code and not told:
            # Nobody else would make the next one wait.
            self._record("failed", action.why, f"a run ended with code {code} before it began")
        elif newest is not None and newest != before and newest.state != "running":
            self._metrics.add(newest)


def run_child(settings: Settings, why: str, parent: int) -> None:
    """Run once as a process that ends with the service that started it."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    # torch takes seconds to import and is needed in this process only.
    from compose.trainer_service.one_run import TrainerBusyError, run_once  # noqa: PLC0415

    with interrupts():
        try:
            run_once(settings, why=why)
        except TrainerBusyError as error:
            log.info("%s", error)
