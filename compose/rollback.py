"""Going back to a version that was live: in seconds, because nothing of it was given up.

Its files are in the repository, its memories were folded all along, and the state it reads is the
live generation's. What is not so is refused before anything is moved.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compose.cli.options import kafka_of
from compose.errors import ComposeError
from compose.memories import memory_coverage
from compose.serving import open_servers, point
from compose.versions import Versions, tidy
from features.generations import Generations
from features.redis import Pointers, connect
from features.schema import schema_hash
from scoring.errors import ScoringError
from streams.control import claim_token
from streams.lifelong_build import COVERAGE_DEFAULT
from trainer.errors import TrainerError
from trainer.manifest import verify_published
from trainer.publish import check_parity, load_version, reload
from trainer.repository import keep, kept_folder, restore

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compose.settings import Settings
    from scoring.triton import TritonServer


class RollbackError(ComposeError):
    """A version cannot be gone back to; what is live stays live."""


@dataclass(frozen=True)
class RolledBack:
    """What a rollback did.

    Attributes:
        seconds: until every answer was the version's; clearing up comes after that.
    """

    version: int
    before: int
    seconds: float


def roll_back(settings: Settings, *, to: int | None = None) -> RolledBack:
    """Return once every answer is one of the version before the live one, or of `to`.

    Raises:
        RollbackError: there is no such version, or something that it needs is gone.
        StaleTokenError: somebody moved the pointers meanwhile.
        FlipNotSeenError: answers did not follow the pointers.
    """
    started = time.monotonic()
    kafka, topics = kafka_of(settings)
    token = claim_token(kafka, topics, "rollback")
    versions = Versions.read(settings.model_repository, kafka, topics)
    version = _target(versions, to)
    folder = versions.folders[version]
    manifest = _verified(folder)
    generation = _require_schema(settings, versions, version, manifest)
    memory_version = _require_memories(settings, versions, version, generation)
    with open_servers(settings) as servers:
        _load(versions, version, servers)
        before = versions.live or 0
        point(settings, kafka, topics, Pointers(version, generation, memory_version, token))
        seconds = time.monotonic() - started
        tidy(Versions.read(settings.model_repository, kafka, topics), servers)
    return RolledBack(version, before, seconds)


def _target(versions: Versions, to: int | None) -> int:
    version = versions.previous if to is None else to
    can_be = sorted(set(versions.lived) & set(versions.folders) - {versions.live})
    if version is None or version not in can_be:
        name = "an earlier version" if version is None else f"version {version}"
        have = ", ".join(map(str, can_be)) or "none"
        raise RollbackError(
            f"there is no going back from version {versions.live} to {name}: it has to have been "
            f"live and to be on disk, which these are: {have}. See `moveline models`."
        )
    return version


def _verified(folder: Path) -> Mapping[str, object]:
    try:
        return verify_published(folder)
    except TrainerError as error:
        raise RollbackError(f"version {folder.name} is damaged: {error}") from error


def schema_holders(settings: Settings, wanted: object) -> list[int]:
    """Return the generations whose features a model with this schema hash reads."""
    recorded = Generations(connect(settings.redis.url)).recorded()
    return [number for number, config in recorded.items() if schema_hash(config) == wanted]


def _require_schema(
    settings: Settings, versions: Versions, version: int, manifest: Mapping[str, object]
) -> int:
    assert versions.pointers is not None
    generation = versions.pointers.generation
    holders = schema_holders(settings, manifest["feature_schema_hash"])
    if generation in holders:
        return generation
    if not holders:
        raise RollbackError(
            f"version {version} reads features that no generation has any more (live: "
            f"g{generation}): train a model on what there is with `moveline train`."
        )
    names = ", ".join(f"g{number}" for number in holders)
    raise RollbackError(
        f"version {version} reads features as {names} has them, live is g{generation}: go back to "
        f"that generation together with its model: moveline promote g{holders[-1]} "
        f"--model-version {version} (moveline demote, if that was the last promotion)."
    )


def _require_memories(
    settings: Settings, versions: Versions, version: int, generation: int
) -> str | None:
    memory_version = versions.lived[version].memory_version
    if memory_version is None:
        return None
    folding = {one.memory_version for one in versions.folding}
    if memory_version not in folding:
        raise RollbackError(
            f"version {version} reads memory version {memory_version}, which is kept up to date no "
            f"more: moveline lifelong build --memory-version {memory_version}, then again."
        )
    found = memory_coverage(settings, generation, memory_version)
    if found.share < COVERAGE_DEFAULT:
        raise RollbackError(
            f"version {version} reads memory version {memory_version}, whole for "
            f"{found.share:.1%} of {found.num_users:,} users, {COVERAGE_DEFAULT:.0%} are needed: "
            f"moveline lifelong build --memory-version {memory_version}, then again."
        )
    return memory_version


def _load(versions: Versions, version: int, servers: list[TritonServer]) -> None:
    """Return once every Triton answers with the version as its package does."""
    was_kept = (kept_folder(versions.gems) / str(version)).is_dir()
    folder = restore(versions.gems, version)
    try:
        if not all(server.is_ready(versions.gems.name, version) for server in servers):
            load_version(folder, servers)
        for server in servers:
            check_parity(folder, server, version)
    except (ScoringError, TrainerError) as error:
        if was_kept:
            keep(versions.gems, version)
            reload(versions.gems, servers)
        raise RollbackError(f"version {version} does not answer: {error}") from error
