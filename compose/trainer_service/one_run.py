"""One run of the trainer, from the lake to a version that answers.

Each phase is noted in the run's record before the next one begins, so that whoever finds the
record of a killed run knows how far it was.
"""

from __future__ import annotations

import logging
import os
import shutil
import socket
import time
import uuid
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import msgspec

from compose.cli.options import kafka_of
from compose.errors import ComposeError
from compose.memories import MemoryVersionError
from compose.publishing import publish_package
from compose.trainer_service.heal import (
    CHECKPOINT_FOLDER,
    DRAFT_FOLDER,
    heal,
    interrupted,
)
from compose.trainer_service.learn import Draft, Learned, draft, figures_of, judge, learn
from compose.trainer_service.look import find_served, look
from compose.trainer_service.records import Gate, RunRecord, run_name, runs_of
from compose.trainer_service.schedule import Past, Run, Schedule, Skip, decide
from features.clock import now_ms
from features.errors import FeatureError, SchemaMismatchError, StaleTokenError
from features.keys import TRAINER_LEASE_KEY
from features.lake_window import LakeWindow, newest_window
from features.lease import Lease, holder
from features.redis import connect
from scoring.errors import ScoringError
from scoring.signature import RETRIEVAL_MODEL
from streams.control import claim_token, read_pointers
from streams.errors import StreamError
from trainer.errors import GateError, NotFiniteError, ParityError, TrainerError
from trainer.gates import passages

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compose.settings import Settings
    from compose.trainer_service.records import Runs, RunState

log = logging.getLogger("moveline.trainer")

DAY_MS: Final = 86_400_000
# A service that has nothing to do holds the lease while it looks around, and for no longer.
LOOK_S_MAX: Final = 10.0
# What refuses a version. Whatever else goes wrong is a failure, which is tried again sooner.
_REFUSALS: Final = (
    GateError,
    NotFiniteError,
    ParityError,
    SchemaMismatchError,
    MemoryVersionError,
    StaleTokenError,
)
_FAILURES: Final = (
    ComposeError,
    FeatureError,
    StreamError,
    ScoringError,
    TrainerError,
    OSError,
    MemoryError,
)


class TrainerBusyError(ComposeError):
    """Another trainer is at work."""


def run_once(settings: Settings, *, why: str = "asked", full: bool = False) -> RunRecord:
    """Train once, now, if there is something to learn; return what became of it.

    Nothing is raised for a run that failed or was refused: its record says so.

    Args:
        settings: of the installation.
        why: what the record says woke the trainer.
        full: train from scratch, whatever could be gone on from.

    Raises:
        TrainerBusyError: another trainer holds the lease.
        StoreError: Redis, where the lease is, did not answer.
        RunRecordError: a record of an earlier run cannot be read.
    """
    runs = runs_of(settings.models)
    client = connect(settings.redis.url)
    owner = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:8]}"
    lease_s = settings.training.lease_s
    lease = Lease.take(client, TRAINER_LEASE_KEY, owner=owner, lease_s=lease_s, wait_s=LOOK_S_MAX)
    if lease is None:
        raise TrainerBusyError(
            f"another trainer ({holder(client, TRAINER_LEASE_KEY) or 'just ended'}) is at work. "
            f"Wait for it (`moveline trainer runs`), or, if it was killed, {lease_s:g} s."
        )
    with lease:
        return _under_lease(settings, runs, lease, why=why, full=full)


def _under_lease(
    settings: Settings, runs: Runs, lease: Lease, *, why: str, full: bool
) -> RunRecord:
    started_ms = now_ms()
    record = RunRecord(run=run_name(started_ms), state="running", why=why, started_ms=started_ms)
    try:
        heal(settings, runs)
        schedule = Schedule.of(settings.training)
        action = decide(schedule, Past.of(runs.all()), look(settings), asked=True)
    except _FAILURES as error:
        log.exception("the trainer could not look at what there is to learn")
        return runs.write_again(_ended(record, "failed", str(error)))
    if isinstance(action, Skip):
        return runs.write_again(_ended(record, "skipped", action.says))
    assert isinstance(action, Run), "a run that is asked for never waits"
    before = None if full else interrupted(runs)
    kind, because = ("full", "it was asked for") if full else (action.kind, action.because)
    if before is not None:
        kind, because = before.kind or kind, before.kind_because
    record = msgspec.structs.replace(
        record, kind=kind, kind_because=because, resumes=before.run if before else None
    )
    return _Attempt(settings, runs, lease, record).carry_out(before)


def _ended(record: RunRecord, state: RunState, says: str) -> RunRecord:
    return msgspec.structs.replace(record, state=state, says=says, ended_ms=now_ms())


class _Attempt:
    """A run that has begun; `record` says how far it is, on disk too."""

    def __init__(self, settings: Settings, runs: Runs, lease: Lease, record: RunRecord) -> None:
        self._settings = settings
        self._runs = runs
        self._lease = lease
        self._folder = runs.folder(record.run)
        self.record = runs.write(record)

    def carry_out(self, before: RunRecord | None) -> RunRecord:
        """Return the record of the end, good or bad; only what nobody foresaw is raised."""
        try:
            self._run(before)
        except _FAILURES as error:
            # Publishing says in its own words what the refusal was that it met.
            is_refused = isinstance(error, _REFUSALS) or isinstance(error.__cause__, _REFUSALS)
            log.log(logging.WARNING, "the run ends: %s", error, exc_info=not is_refused)
            self._end("refused" if is_refused else "failed", str(error))
        except (KeyboardInterrupt, SystemExit):
            self._end("stopped", "it was told to stop; the next run goes on from its checkpoint")
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        return self.record

    def _run(self, before: RunRecord | None) -> None:
        settings = self._settings
        kafka, topics = kafka_of(settings)
        window = self._window(before)
        self._note(
            window_from=window.first,
            window_to=window.last,
            token=claim_token(kafka, topics, f"trainer {self.record.run}"),
        )
        if before is not None:
            self._take_over(before)
        with self._phase("train"):
            learned = learn(
                settings,
                window,
                kind=self.record.kind or "full",
                checkpoint=self._folder / CHECKPOINT_FOLDER,
                tensorboard=self._tensorboard(),
                resume=before is not None,
            )
        self._note_training(learned)
        self._lease.check()
        with self._phase("export"):
            made = draft(settings, learned, window, self._folder / DRAFT_FOLDER)
        self._note(created_ms=made.created_ms)
        self._judge(learned, made)
        self._lease.check()
        with self._phase("publish"):
            self._publish(made)
        self._end("published", self.record.says)

    def _window(self, before: RunRecord | None) -> LakeWindow:
        if before is not None:
            return LakeWindow(before.window_from, before.window_to)
        _, topics = kafka_of(self._settings)
        window_ms = round(self._settings.training.window_days * DAY_MS)
        return newest_window(self._settings.lake.path, topics.events, window_ms=window_ms)

    def _take_over(self, before: RunRecord) -> None:
        """The checkpoint of the interrupted run is this one's."""
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._runs.folder(before.run) / CHECKPOINT_FOLDER).rename(self._folder / CHECKPOINT_FOLDER)

    def _tensorboard(self) -> Any:  # noqa: ANN401 - a path
        chosen = self._settings.training.tensorboard
        return chosen / self.record.run if chosen else self._folder / "tensorboard"

    def _note_training(self, learned: Learned) -> None:
        fitted = learned.trained.fitted
        self._note(
            kind=learned.kind,
            kind_because=learned.because or self.record.kind_because,
            base_version=learned.base_version,
            num_events=learned.trained.source.log.num_events,
            num_steps=len(fitted.losses),
            num_tokens=fitted.num_tokens,
            tokens_per_s=round(fitted.num_tokens / max(fitted.seconds, 1e-9), 1),
            loss=fitted.losses[-1],
        )

    def _judge(self, learned: Learned, made: Draft) -> None:
        """Raise the refusal of the first gate that does not let the package pass."""
        training = self._settings.training
        with self._phase("judge"):
            judged = judge(self._settings, learned, made, find_served(self._settings))
        qualities = dict(judged.quality)
        if judged.served is not None and judged.served.quality is not None:
            qualities["served"] = judged.served.quality
        self._note(figures=figures_of(qualities))
        with self._phase("gates"):
            found = list(
                passages(
                    judged,
                    quality_margin=training.quality_margin,
                    latency_ms=training.latency_ms,
                )
            )
        gates = tuple(Gate(one.name, one.value, one.limit, str(one.refusal or "")) for one in found)
        self._note(gates=gates)
        for one in found:
            if one.refusal is not None:
                raise one.refusal

    def _publish(self, made: Draft) -> None:
        token = self.record.token
        assert token is not None, "claimed at the beginning of the run"
        pointers = read_pointers(*kafka_of(self._settings))
        if pointers is not None and pointers.token > token:
            raise StaleTokenError(token, pointers.token)
        package = self._settings.models / f"{RETRIEVAL_MODEL}-{made.created_ms}"
        made.folder.rename(package)
        self._note(package=str(package))
        try:
            version, says = publish_package(self._settings, package, token=token).version, ""
        except BaseException as error:
            served = find_served(self._settings)
            if served is None or not served.is_of(made.created_ms):
                # Not a package that `moveline publish` would find as the newest.
                package.rename(made.folder)
                self._note(package=str(made.folder))
                raise
            if not isinstance(error, _FAILURES):
                raise
            # The record of truth names it already, so it is live, or will be in a moment.
            log.warning("version %s is live, but: %s", served.version, error)
            version, says = served.version, str(error)
        self._note(version=version, says=says)

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        log.info("run %s: %s", self.record.run, name)
        started = time.monotonic()
        try:
            yield
        finally:
            seconds = round(time.monotonic() - started, 3)
            self._note(seconds={**self.record.seconds, name: seconds})

    def _note(self, **changes: Any) -> None:  # noqa: ANN401 - of any field
        self.record = self._runs.write(msgspec.structs.replace(self.record, **changes))

    def _end(self, state: RunState, says: str) -> None:
        if state in {"published", "refused"}:
            shutil.rmtree(self._folder / CHECKPOINT_FOLDER, ignore_errors=True)
        self._note(state=state, says=says, ended_ms=now_ms())
