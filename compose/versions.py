"""Which versions of the retrieval model there are, which are live or were, and clearing up.

A version is in the model's folder, where Triton loads it, or in `.kept`, from where a rollback
brings it back. What was live is known from the control topic. A version that never was, made under
a token smaller than that of the live pointers, can never go live: whoever made it would be refused.
So it can be removed, without asking whether that process is still alive.
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from compose.memories import MANIFEST
from scoring.signature import LIFELONG_MODEL, RETRIEVAL_MODEL
from streams.control import MEMORIES_KEY, decode_memories, newest_pointers, read_records, were_live
from trainer.errors import TrainerError
from trainer.manifest import facts_of, verify_published
from trainer.publish import reload
from trainer.repository import (
    UNKNOWN_TOKEN,
    discard_drafts,
    every_version,
    keep,
    publish_token,
    restore,
    versions_on_disk,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from features.lifelong import LiveMemory
    from features.redis import Pointers
    from scoring.triton import TritonServer
    from streams.kafka import KafkaConfig
    from streams.topics import Topics


log = logging.getLogger("moveline.publish")


def canary_version(pointers: Pointers | None) -> int | None:
    """Return the version that is being tried beside the live one."""
    return None if pointers is None or pointers.canary is None else pointers.canary.version


@dataclass(frozen=True)
class Versions:
    """One look at the repository and at the control topic.

    Attributes:
        pointers: what is live, None before the first publication.
        lived: by version, the last pointers that named one which was replaced.
        folding: the memory versions that are kept up to date.
    """

    repository: Path
    pointers: Pointers | None
    lived: dict[int, Pointers]
    folding: tuple[LiveMemory, ...]

    @classmethod
    def read(cls, repository: Path, kafka: KafkaConfig, topics: Topics) -> Versions:
        """Look now; raises as `streams.control.read_pointers` does."""
        records = read_records(kafka, topics)
        raw = records.get(MEMORIES_KEY)
        return cls(
            repository,
            newest_pointers(records),
            were_live(records),
            decode_memories(raw) if raw else (),
        )

    @property
    def gems(self) -> Path:
        """The folder of the retrieval model."""
        return self.repository / RETRIEVAL_MODEL

    @property
    def lifelong(self) -> Path:
        """The folder of the model that folds memories."""
        return self.repository / LIFELONG_MODEL

    @cached_property
    def folders(self) -> dict[int, Path]:
        """Every version of the retrieval model that is on disk, ascending."""
        return every_version(self.gems)

    @property
    def live(self) -> int | None:
        """The version that answers."""
        return None if self.pointers is None else self.pointers.model_version

    @property
    def canary(self) -> int | None:
        """The version that is being tried."""
        return canary_version(self.pointers)

    @property
    def previous(self) -> int | None:
        """What a rollback goes back to: the newest before the live one that was live."""
        earlier = [
            version for version in self.lived if version in self.folders and self.is_before(version)
        ]
        return max(earlier, default=None)

    def is_before(self, version: int) -> bool:
        """Return whether a version was published before the live one."""
        return self.live is not None and version < self.live

    def is_dead(self, folder: Path) -> bool:
        """Return whether a version that never was live can never be."""
        token = publish_token(folder)
        newest = 0 if self.pointers is None else self.pointers.token
        return UNKNOWN_TOKEN < token < newest

    def never_live(self) -> list[int]:
        """Return the versions that no pointers have named."""
        named = {self.live, self.canary, *self.lived}
        return [version for version in self.folders if version not in named]

    def memories_read(self) -> set[str]:
        """Return the memory versions that a version on disk reads."""
        found = (facts_of(folder).get("memory_version") for folder in self.folders.values())
        return {str(one) for one in found if one}

    def folders_folding(self) -> set[int]:
        """Return the versions of `lifelong` that are folded with, or read by a version on disk."""
        found = (facts_of(one).get("lifelong_model_version") for one in self.folders.values())
        return {int(one) for one in found if one} | {
            one.lifelong_model_version for one in self.folding
        }


def tidy(versions: Versions, servers: Sequence[TritonServer]) -> list[Path]:
    """Leave in the model's folder what has to be loaded, and nothing half-made anywhere.

    Returns what was removed. Whoever does this has moved the pointers: an earlier publication that
    still runs is refused at its end, whether or not its version is still there.
    """
    stay = {versions.live, versions.previous, versions.canary}
    removed = remove_dead(versions, servers)
    moved = False
    for version in versions_on_disk(versions.gems):
        is_waiting = version in versions.never_live() and not is_of_unknown_age(versions, version)
        if version not in stay and not is_waiting:
            keep(versions.gems, version)
            moved = True
    if _restore_previous(versions) or moved:
        reload(versions.gems, servers)
    return removed


def _restore_previous(versions: Versions) -> bool:
    """Put what a rollback goes back to where Triton loads it; return whether that was to be done.

    After a rollback it is one further back: so the next rollback is as quick.
    """
    previous = versions.previous
    if previous is None or previous in versions_on_disk(versions.gems):
        return False
    try:
        verify_published(versions.folders[previous])
    except TrainerError as error:
        # In the model's folder it would fail every load.
        log.warning("version %d is left where it is: %s", previous, error)
        return False
    restore(versions.gems, previous)
    return True


def is_of_unknown_age(versions: Versions, version: int) -> bool:
    """Return whether a version was made without a token, so that it may have been live."""
    return publish_token(versions.folders[version]) == UNKNOWN_TOKEN


def dead_folders(versions: Versions) -> list[Path]:
    """Return the versions of both models that can never be of use."""
    gems = [versions.folders[one] for one in versions.never_live()]
    needed = versions.folders_folding()
    folding = every_version(versions.lifelong)
    unread = [folder for version, folder in folding.items() if version not in needed]
    return [folder for folder in (*gems, *unread) if versions.is_dead(folder)]


def remove_dead(versions: Versions, servers: Sequence[TritonServer]) -> list[Path]:
    """Remove what a publication that ended early has left; return what that was."""
    token = 0 if versions.pointers is None else versions.pointers.token
    drafts = discard_drafts(versions.repository, before=token)
    return drafts + remove(versions, dead_folders(versions), servers)


def remove(
    versions: Versions, folders: Sequence[Path], servers: Sequence[TritonServer]
) -> list[Path]:
    """Remove versions' folders and have every Triton forget them; return them."""
    for folder in folders:
        # First what makes it a version: a half-removed one is none.
        (folder / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(folder)
    for model_folder in (versions.gems, versions.lifelong):
        if any(folder.parent == model_folder for folder in folders):
            reload(model_folder, servers)
    versions.__dict__.pop("folders", None)
    return list(folders)
