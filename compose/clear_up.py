"""Removing what nothing can go back to: old versions, their memories, their packages."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from compose.cli.options import kafka_of
from compose.memories import retire
from compose.serving import open_servers
from compose.versions import Versions, dead_folders, is_of_unknown_age, remove, remove_dead
from features.generations import Generations
from features.lifelong_store import LifelongStore
from features.redis import StateStore, connect
from streams.control import forget_live
from trainer.manifest import MANIFEST_FILE, MODEL_FILE, facts_of
from trainer.repository import size_bytes

if TYPE_CHECKING:
    from pathlib import Path

    from compose.settings import Settings

# Versions besides the live one that a rollback can reach. Each keeps its files on disk and has its
# memories folded; one that shares its compressor with the live one costs its files alone.
KEEP_DEFAULT: Final = 5


@dataclass(frozen=True)
class Removal:
    """What clearing up removes, or would.

    Attributes:
        unproven: folders of versions that never went live and never can.
        versions: that were live, with their folders.
        memory_versions: that no version reads any more.
        packages: from which none of the remaining versions was published.
        num_bytes: of all folders.
    """

    unproven: list[Path]
    versions: dict[int, Path]
    memory_versions: list[str]
    packages: list[Path]
    num_bytes: int = field(default=0)


def clear_up(settings: Settings, *, keep: int = KEEP_DEFAULT, dry_run: bool = False) -> Removal:
    """Remove what a rollback to one of the newest `keep` versions does not need.

    Interrupted anywhere, the same command goes on: what is not gone yet is found again.
    """
    kafka, topics = kafka_of(settings)
    versions = Versions.read(settings.model_repository, kafka, topics)
    removal = plan(settings, versions, keep=keep)
    if dry_run:
        return removal
    # First the record: from here on nobody goes back to them.
    forget_live(kafka, topics, sorted(removal.versions))
    with open_servers(settings) as servers:
        remove(versions, list(removal.versions.values()), servers)
        # The near-line app has to stop folding before the compressor goes.
        for memory_version in removal.memory_versions:
            retire(settings, kafka, topics, memory_version)
            _discard_memories(settings, memory_version)
        remove_dead(Versions.read(settings.model_repository, kafka, topics), servers)
    for package in removal.packages:
        shutil.rmtree(package)
    return removal


def plan(settings: Settings, versions: Versions, *, keep: int) -> Removal:
    """Return what clearing up would remove; changes nothing."""
    stay = _staying(versions, keep)
    unproven = dead_folders(versions)
    old = {
        one: folder
        for one, folder in versions.folders.items()
        if one not in stay and folder not in unproven
    }
    left = [versions.folders[one] for one in stay]
    read = {facts_of(folder).get("memory_version") for folder in left}
    if versions.pointers is not None:
        read.add(versions.pointers.memory_version)
    unread = [one.memory_version for one in versions.folding if one.memory_version not in read]
    packages = _packages(settings.models, versions, left)
    removed = [*unproven, *old.values(), *packages]
    return Removal(unproven, old, unread, packages, sum(map(size_bytes, removed)))


def _staying(versions: Versions, keep: int) -> set[int]:
    """Return the versions that stay: live, canary, one a rollback reaches, and not yet live."""
    was_live = [one for one in versions.folders if one in versions.lived and one != versions.live]
    # From before there were tokens: they may have been live, so they count as if they had been.
    unknown = [one for one in versions.never_live() if is_of_unknown_age(versions, one)]
    newest = sorted([*was_live, *unknown])[-keep:] if keep else []
    named = {versions.live, versions.canary, versions.previous, *newest}
    dead = {int(folder.name) for folder in dead_folders(versions)}
    waiting = set(versions.never_live()) - dead - set(unknown)
    return {one for one in versions.folders if one in named or one in waiting}


def _packages(models: Path, versions: Versions, left: list[Path]) -> list[Path]:
    """Return the packages that are older than the live version and of none that stays."""
    if versions.live is None or versions.live not in versions.folders:
        return []
    needed = {facts_of(folder).get("files", {}).get(MODEL_FILE) for folder in left}
    before_ms = facts_of(versions.folders[versions.live]).get("created_ms", 0)
    found = sorted(path.parent for path in models.glob(f"*/{MANIFEST_FILE}"))
    facts = {package: facts_of(package) for package in found}
    return [
        package
        for package, known in facts.items()
        if known.get("files", {}).get(MODEL_FILE) not in needed
        and known.get("created_ms", before_ms) < before_ms
    ]


def _discard_memories(settings: Settings, memory_version: str) -> None:
    client = connect(settings.redis.url)
    for number, config in Generations(client).recorded().items():
        LifelongStore.of(StateStore(client, number, config)).discard_version(memory_version)
