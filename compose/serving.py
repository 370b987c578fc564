"""Having a Triton answer: load what it serves, and make a published version the live one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from compose.errors import ComposeError
from compose.memories import make_ready, memory_of
from features.redis import CatalogueStore, Pointers, connect
from scoring.client import Recommender
from scoring.live import REFRESH_S
from scoring.signature import LIFELONG_MODEL, RECOMMEND_MODEL, RETRIEVAL_MODEL
from scoring.triton import TritonServer
from streams.control import read_pointers, write_pointers

if TYPE_CHECKING:
    from pathlib import Path

    from compose.settings import Settings
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

FLIP_TIMEOUT_S: Final = 15.0
_POLL_S: Final = 0.1


class FlipNotSeenError(ComposeError):
    """The pointers were moved and the recommend model did not follow."""


def load_served_models(settings: Settings) -> list[str]:
    """Load `recommend`, and the models that have a version; return what was loaded."""
    with TritonServer(settings.triton.grpc) as server:
        loaded = []
        for model in (LIFELONG_MODEL, RETRIEVAL_MODEL):
            if has_version(settings.model_repository / model):
                server.load(model)
                loaded.append(model)
        server.load(RECOMMEND_MODEL)
        return [*loaded, RECOMMEND_MODEL]


def has_version(model_folder: Path) -> bool:
    """Return whether a model's folder holds any version."""
    return model_folder.is_dir() and any(p.name.isdecimal() for p in model_folder.iterdir())


def flip(settings: Settings, kafka: KafkaConfig, topics: Topics, version: int) -> float:
    """Make a ready version the live one; return the seconds until answers carry it.

    Raises:
        MemoryVersionError: too many users lack memories of the version that it reads.
        FlipNotSeenError: answers did not carry the version within FLIP_TIMEOUT_S.
    """
    recorded = read_pointers(kafka, topics)
    generation = recorded.generation if recorded else settings.generation_number
    memory = memory_of(settings.model_repository, version)
    if memory is not None:
        make_ready(settings, kafka, topics, generation, memory)
    pointers = Pointers(version, generation, memory.memory_version if memory else None)
    return point(settings, kafka, topics, pointers)


def point(settings: Settings, kafka: KafkaConfig, topics: Topics, pointers: Pointers) -> float:
    """Make these the live pointers; return the seconds until answers follow.

    First the control topic, the record of truth, then Redis, which every answer follows.

    Raises:
        FlipNotSeenError: answers did not carry the version within FLIP_TIMEOUT_S.
    """
    started = time.monotonic()
    write_pointers(kafka, topics, pointers)
    CatalogueStore(connect(settings.redis.url)).put_pointers(pointers)
    _await_version(settings.triton.grpc, pointers.model_version or 0, started)
    return time.monotonic() - started


def _await_version(address: str, version: int, started: float) -> None:
    with TritonServer(address) as server:
        if not server.is_ready(RECOMMEND_MODEL):
            server.load(RECOMMEND_MODEL)
    with Recommender(address) as recommender:
        seen, since = -1, time.monotonic()
        while time.monotonic() - started < FLIP_TIMEOUT_S:
            # Every instance refreshes on its own: all have followed once no answer of a whole
            # refresh period named another version.
            seen = recommender.recommend(0, deadline_s=FLIP_TIMEOUT_S).provenance.live_version
            if seen != version:
                since = time.monotonic()
            elif time.monotonic() - since > 2 * REFRESH_S:
                return
            time.sleep(_POLL_S)
    raise FlipNotSeenError(
        f"the pointers name version {version}, but `{RECOMMEND_MODEL}` at {address} still follows "
        f"{seen or 'none'} after {FLIP_TIMEOUT_S:g} s: does it read the same Redis "
        "(MOVELINE_REDIS__URL of tritonserver)? Compare with `moveline status`."
    )
