"""What each run of the trainer was, one JSON file a run under `<models>/runs/`.

A file is replaced as a whole, so that it is read either as it was or as it is. What a run needs on
disk (checkpoint, draft of its package, TensorBoard's event files) lies in a folder of its name
beside it.
"""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from compose.errors import ComposeError

if TYPE_CHECKING:
    from pathlib import Path

RunState = Literal["running", "stopped", "skipped", "failed", "refused", "published"]
Kind = Literal["warm", "full"]
# Runs that are remembered, about 3 kB each: a year of one every six hours fits. The oldest leave,
# with their folders.
RUNS_KEPT_MAX: Final = 2_000
RUNS_FOLDER: Final = "runs"
_ENDING: Final = ".json"


class RunRecordError(ComposeError):
    """A run's record is missing or unreadable."""


class Gate(msgspec.Struct, frozen=True):
    """What a gate found; `says` is empty where it let the version pass."""

    name: str
    value: float | str
    limit: float | str
    says: str = ""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One run, or one time at which there was a reason to train and a reason not to.

    Attributes:
        run: names record and folder; ascending in time.
        why: what woke the trainer: "time", "events" or "asked".
        says: the reason of a run that was skipped, failed, refused or stopped, as a sentence.
        times: how often in a row the same was found; the record then is of the newest time.
        kind_because: why it was a warm start, or one from scratch.
        resumes: the interrupted run that this one went on with.
        token: the fencing token that its publication carries.
        window_from, window_to: first and last offset by `PARTITION` or `SOURCE:PARTITION`.
        num_events: events of the window that the generation's rules accept.
        loss: of the last step.
        seconds: by phase.
        figures: NDCG@10 and HR@10 on the held-out window, by ranking.
        base_version: the version whose weights it began with.
        created_ms: of its package's manifest, by which the package is known again.
        version: the version that it published.
    """

    run: str
    state: RunState
    why: str
    started_ms: int
    ended_ms: int | None = None
    says: str = ""
    times: int = 1
    kind: Kind | None = None
    kind_because: str = ""
    resumes: str | None = None
    token: int | None = None
    window_from: dict[str, int] = {}
    window_to: dict[str, int] = {}
    num_events: int = 0
    num_steps: int = 0
    num_tokens: int = 0
    tokens_per_s: float = 0.0
    loss: float | None = None
    seconds: dict[str, float] = {}
    figures: dict[str, float] = {}
    gates: tuple[Gate, ...] = ()
    base_version: int | None = None
    created_ms: int | None = None
    package: str | None = None
    version: int | None = None

    @property
    def has_trained(self) -> bool:
        """Return whether its window was learned from and judged."""
        return self.state in {"refused", "published"}


def run_name(now_ms: int) -> str:
    """Return the name of a run that begins now.

    >>> run_name(1_763_700_000_123)
    '20251121-044000-123'
    """
    begun = datetime.fromtimestamp(now_ms // 1000, UTC)
    return f"{begun:%Y%m%d-%H%M%S}-{now_ms % 1000:03d}"


def runs_of(models: Path) -> Runs:
    """Return the runs whose packages go into a folder of models."""
    return Runs(models / RUNS_FOLDER)


class Runs:
    """The records in one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder

    def folder(self, run: str) -> Path:
        """Return where a run keeps what it needs on disk."""
        return self.path / run

    def write(self, record: RunRecord) -> RunRecord:
        """Return the record once it is on disk in place of the one before."""
        self.path.mkdir(parents=True, exist_ok=True)
        path = self.path / f"{record.run}{_ENDING}"
        written = path.with_suffix(".new")
        with written.open("wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
        return record

    def write_again(self, record: RunRecord) -> RunRecord:
        """Write a run that never began; one that repeats the newest record takes its place.

        A trainer that finds the same reason every minute leaves one file, not thousands.
        """
        newest = self.newest()
        repeats = (
            newest is not None
            and newest.kind is None
            and (newest.state, newest.says) == (record.state, record.says)
        )
        if repeats and newest is not None:
            record = msgspec.structs.replace(
                record, run=newest.run, started_ms=newest.started_ms, times=newest.times + 1
            )
        return self.write(record)

    def all(self) -> list[RunRecord]:
        """Return every record, oldest first.

        Raises:
            RunRecordError: one cannot be read.
        """
        return [self._read(path) for path in self._paths()]

    def newest(self) -> RunRecord | None:
        """Return the newest record, None before the first; raises as `all` does."""
        paths = self._paths()
        return self._read(paths[-1]) if paths else None

    def find(self, run: str) -> RunRecord:
        """Return the run of that name.

        Raises:
            RunRecordError: there is none, or its record cannot be read.
        """
        path = self.path / f"{run}{_ENDING}"
        if path not in self._paths():
            raise RunRecordError(
                f"no run {run!r} is recorded in {self.path}: list them with "
                "`moveline trainer runs`."
            )
        return self._read(path)

    def remove_old(self) -> None:
        """The newest RUNS_KEPT_MAX records are left, with their folders."""
        for path in self._paths()[:-RUNS_KEPT_MAX]:
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
            path.unlink(missing_ok=True)

    def _paths(self) -> list[Path]:
        return sorted(self.path.glob(f"*{_ENDING}"))

    def _read(self, path: Path) -> RunRecord:
        try:
            return msgspec.json.decode(path.read_bytes(), type=RunRecord)
        except (OSError, msgspec.MsgspecError) as error:
            raise RunRecordError(
                f"{path} cannot be read as a run ({error}): remove it, or restore it."
            ) from error
