"""What `moveline models` says of every version."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from compose.cli.options import kafka_of
from compose.memories import memory_coverage
from compose.rollback import schema_holders
from compose.versions import Versions
from features.clock import now_ms
from streams.lifelong_build import COVERAGE_DEFAULT
from trainer.manifest import facts_of
from trainer.repository import size_bytes

if TYPE_CHECKING:
    from compose.settings import Settings


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """One version of the retrieval model.

    Attributes:
        state: live, canary, previous, kept (was live), or unproven (never live).
        coverage: share of users whose memories are whole; None for a model that reads none, or
            where they are kept up to date no more.
        quality: HR@10 and NDCG@10 of its training's held-out window.
        back: None if `moveline rollback` can make it live, else why not.
    """

    version: int
    state: str
    is_loaded: bool
    memory_version: str | None
    coverage: float | None
    created_ms: int
    age_s: float
    num_bytes: int
    quality: dict[str, float]
    back: str | None


def list_models(settings: Settings) -> list[ModelInfo]:
    """Return every version on disk, the newest first. Looks at every user's memories."""
    versions = Versions.read(settings.model_repository, *kafka_of(settings))
    coverages = _coverages(settings, versions)
    return [_info(settings, versions, one, coverages) for one in reversed(versions.folders)]


def _coverages(settings: Settings, versions: Versions) -> dict[str, float]:
    if versions.pointers is None:
        return {}
    generation, read = versions.pointers.generation, versions.memories_read()
    return {
        one.memory_version: memory_coverage(settings, generation, one.memory_version).share
        for one in versions.folding
        if one.memory_version in read
    }


def _info(
    settings: Settings, versions: Versions, version: int, coverages: dict[str, float]
) -> ModelInfo:
    folder = versions.folders[version]
    facts = facts_of(folder)
    memory_version, created_ms = facts.get("memory_version"), int(facts.get("created_ms", 0))
    metrics: dict[str, float] = facts.get("metrics", {})
    return ModelInfo(
        version=version,
        state=_state(versions, version),
        is_loaded=folder.parent == versions.gems,
        memory_version=memory_version,
        coverage=coverages.get(memory_version or ""),
        created_ms=created_ms,
        age_s=(now_ms() - created_ms) / 1000,
        num_bytes=size_bytes(folder),
        quality={name: metrics[name] for name in ("hr10_model", "ndcg10_model") if name in metrics},
        back=_why_not(settings, versions, version, facts, coverages),
    )


def _state(versions: Versions, version: int) -> str:
    named = {versions.live: "live", versions.canary: "canary", versions.previous: "previous"}
    return named.get(version, "kept" if version in versions.lived else "unproven")


def _why_not(
    settings: Settings,
    versions: Versions,
    version: int,
    facts: dict[str, Any],
    coverages: dict[str, float],
) -> str | None:
    """Return why there is no going back to a version, None if there is."""
    if version == versions.live:
        return "it is live"
    if version not in versions.lived or versions.pointers is None:
        return "it was never live"
    held = schema_holders(settings, facts.get("feature_schema_hash"))
    if versions.pointers.generation not in held:
        return f"g{versions.pointers.generation} has other features"
    return _why_no_memories(facts.get("memory_version"), coverages)


def _why_no_memories(memory_version: str | None, coverages: dict[str, float]) -> str | None:
    if memory_version is None:
        return None
    if memory_version not in coverages:
        return "its memories are kept up to date no more"
    if coverages[memory_version] < COVERAGE_DEFAULT:
        return f"its memories are whole for {coverages[memory_version]:.1%} of the users"
    return None
