"""What a killed run left behind, put right by the next one: called by who holds the lease."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Final

import msgspec

from compose.trainer_service.look import find_served
from features.clock import now_ms

if TYPE_CHECKING:
    from compose.settings import Settings
    from compose.trainer_service.records import RunRecord, Runs

# In the folder of a run.
CHECKPOINT_FOLDER: Final = "checkpoint"
DRAFT_FOLDER: Final = "package"
# What the record of a run says that could not say it itself.
KILLED: Final = "its process ended without a word"


def heal(settings: Settings, runs: Runs) -> None:
    """No record says "running" any more, and of earlier runs no draft of a package is left.

    A run that died after its version went live is one that published. The checkpoint of the newest
    run stays, to be gone on from.
    """
    records = runs.all()
    for record in records:
        if record.state == "running":
            runs.write(_ended(settings, record))
        shutil.rmtree(runs.folder(record.run) / DRAFT_FOLDER, ignore_errors=True)
    for record in records[:-1]:
        shutil.rmtree(runs.folder(record.run) / CHECKPOINT_FOLDER, ignore_errors=True)
    runs.remove_old()


def interrupted(runs: Runs) -> RunRecord | None:
    """Return the newest run if it was interrupted and left a checkpoint to go on from.

    One that was killed after it had gone on from another is not tried a third time: what killed it
    may be in its checkpoint.
    """
    newest = runs.newest()
    if newest is None or not newest.window_to or newest.has_trained:
        return None
    was_killed = newest.state == "failed" and newest.says == KILLED
    may_go_on = newest.state == "stopped" or (was_killed and newest.resumes is None)
    folder = runs.folder(newest.run) / CHECKPOINT_FOLDER
    return newest if may_go_on and folder.is_dir() and any(folder.iterdir()) else None


def _ended(settings: Settings, record: RunRecord) -> RunRecord:
    served = find_served(settings)
    if served is not None and served.is_of(record.created_ms):
        return msgspec.structs.replace(
            record,
            state="published",
            version=served.version,
            ended_ms=now_ms(),
            says="its process ended after the version went live",
        )
    return msgspec.structs.replace(record, state="failed", ended_ms=now_ms(), says=KILLED)
