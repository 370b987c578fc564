"""Which memory versions are kept up to date: what models read them, and the record that says so."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from compose.errors import ComposeError
from features.generations import Generations
from features.lake_users import stream_users
from features.lifelong import LiveMemory, check_version
from features.lifelong_store import LifelongStore, put_live_memories
from features.redis import connect
from features.store import open_state
from scoring.signature import RETRIEVAL_MODEL
from scoring.triton import TritonServer
from streams.control import read_memories, write_memories
from streams.fold import TritonFold
from streams.lifelong_build import COVERAGE_DEFAULT, MemoryBuilder, coverage
from streams.progress import progress_bar
from streams.topics import Topics

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from compose.settings import Settings
    from streams.kafka import KafkaConfig
    from streams.lifelong_build import BuildReport, Coverage

MANIFEST: Final = "manifest.json"


class MemoryVersionError(ComposeError):
    """A memory version is not one that can be built, or is still needed."""


class _Manifest(msgspec.Struct):
    """The part of a model's manifest that says which memory it reads."""

    memory_version: str | None = None
    lifelong_model_version: int | None = None


def memory_of(repository: Path, model_version: int) -> LiveMemory | None:
    """Return the memory that a published version of `gems` reads; None if it reads none.

    Raises:
        MemoryVersionError: its manifest cannot be read.
    """
    path = repository / RETRIEVAL_MODEL / str(model_version) / MANIFEST
    try:
        found = msgspec.json.decode(path.read_bytes(), type=_Manifest)
    except (OSError, msgspec.MsgspecError) as error:
        raise MemoryVersionError(
            f"{path} cannot be read ({error}): publish the model again."
        ) from error
    if found.memory_version is None or found.lifelong_model_version is None:
        return None
    return LiveMemory(check_version(found.memory_version), found.lifelong_model_version)


def find_memory(repository: Path, memory_version: str | None) -> LiveMemory:
    """Return a memory version that a published model reads; the newest model's if none is named.

    Raises:
        MemoryVersionError: no published model reads it.
    """
    folder = repository / RETRIEVAL_MODEL
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    versions = sorted((int(name) for name in names if name.isdecimal()), reverse=True)
    known = [memory for version in versions if (memory := memory_of(repository, version))]
    for memory in known:
        if memory_version in {None, memory.memory_version}:
            return memory
    have = ", ".join(dict.fromkeys(one.memory_version for one in known)) or "none"
    raise MemoryVersionError(
        f"no model under {folder} reads memory version {memory_version or '(any)'}, there are: "
        f"{have}. Publish the model first: moveline publish"
    )


def keep_live(
    settings: Settings, kafka: KafkaConfig, topics: Topics, memory: LiveMemory
) -> tuple[LiveMemory, ...]:
    """Have the near-line app fold this version too; return all that are kept up to date.

    First the control topic, the record of truth, then Redis, which the app reads.
    """
    others = [
        one for one in read_memories(kafka, topics) if one.memory_version != memory.memory_version
    ]
    return _record(settings, kafka, topics, (*others, memory))


def build_memories(
    settings: Settings,
    generation: int,
    memory: LiveMemory,
    *,
    rate: float | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> tuple[BuildReport, Coverage]:
    """Fold what the lake has and a generation's memories lack; return what that came to.

    Raises:
        LakeError: there is no lake, or it cannot be read.
        StoreError, ScoringError: Redis or the compressor is away; what was written stays.
    """
    memories = LifelongStore.of(open_state(connect(settings.redis.url), generation=generation))
    users = Generations(memories.client).users(generation, lambda _: True)
    events = Topics(settings.kafka.prefix).events
    with (
        TritonServer(settings.triton.address) as server,
        progress_bar("memories", total=len(users), unit="users") as advance,
    ):
        builder = MemoryBuilder(
            memories,
            memory,
            TritonFold(server),
            rate=rate,
            advance=advance,
            should_stop=should_stop,
        )
        report = builder.run(stream_users(settings.lake.path, events, memories.config))
    return report, coverage(memories, users, memory.memory_version)


def memory_coverage(settings: Settings, generation: int, memory_version: str) -> Coverage:
    """Return for how many users of a generation a memory version is whole; looks at every user."""
    memories = LifelongStore.of(open_state(connect(settings.redis.url), generation=generation))
    users = Generations(memories.client).users(generation, lambda _: True)
    return coverage(memories, users, memory_version)


def _is_kept_up(found: Coverage) -> bool:
    """Return whether nothing is missing but what the near-line app has not come to yet."""
    is_folded = found.num_folded >= COVERAGE_DEFAULT * found.num_chunks
    return is_folded and found.share >= COVERAGE_DEFAULT


def make_ready(
    settings: Settings, kafka: KafkaConfig, topics: Topics, generation: int, memory: LiveMemory
) -> None:
    """Have a model's memories kept up to date, and make those that are missing.

    Raises:
        MemoryVersionError: too many users still lack something.
    """
    keep_live(settings, kafka, topics, memory)
    # A memory version that was folded all along is whole: the lake need not be read for it.
    found = memory_coverage(settings, generation, memory.memory_version)
    if not _is_kept_up(found):
        _, found = build_memories(settings, generation, memory)
    if found.share < COVERAGE_DEFAULT:
        raise MemoryVersionError(
            f"memories of version {memory.memory_version} are whole for {found.share:.1%} of "
            f"{found.num_users:,} users, {COVERAGE_DEFAULT:.0%} are needed; what was live still "
            "is. Let the lake catch up (moveline lake --until-end), then moveline publish again"
        )


def retire(
    settings: Settings, kafka: KafkaConfig, topics: Topics, memory_version: str
) -> tuple[LiveMemory, ...]:
    """Have a version folded no more; return those that are left.

    Raises:
        MemoryVersionError: it is not among them.
    """
    before = read_memories(kafka, topics)
    left = tuple(one for one in before if one.memory_version != memory_version)
    if left == before:
        have = ", ".join(one.memory_version for one in before) or "none"
        raise MemoryVersionError(
            f"memory version {memory_version} is not kept up to date, these are: {have}. "
            "See `moveline lifelong status`."
        )
    return _record(settings, kafka, topics, left)


def _record(
    settings: Settings, kafka: KafkaConfig, topics: Topics, live: tuple[LiveMemory, ...]
) -> tuple[LiveMemory, ...]:
    write_memories(kafka, topics, live)
    put_live_memories(connect(settings.redis.url), live)
    return live
