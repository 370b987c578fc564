"""Having every Triton answer: load what they serve, and make a proven version the live one."""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Final

from compose.errors import ComposeError
from compose.memories import make_ready, memory_of
from features.errors import StaleTokenError
from features.redis import CatalogueStore, Pointers, connect
from scoring.client import Recommender
from scoring.live import REFRESH_S
from scoring.signature import LIFELONG_MODEL, RECOMMEND_MODEL, RETRIEVAL_MODEL
from scoring.triton import TritonServer
from streams.control import read_pointers, write_pointers
from trainer.publish import Step, log_step
from trainer.repository import versions_on_disk

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compose.settings import Settings
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# From when `recommend` is loaded on; a busy machine refreshes late.
FLIP_TIMEOUT_S: Final = 60.0
# Answers name the live version only: one that is tried has been seen by all after so long.
_TRIED_S: Final = 4 * REFRESH_S
_POLL_S: Final = 0.1


class FlipNotSeenError(ComposeError):
    """The pointers were moved and the recommend model did not follow."""


@contextmanager
def open_servers(settings: Settings) -> Iterator[list[TritonServer]]:
    """Yield a connection to each Triton."""
    with ExitStack() as opened:
        yield [opened.enter_context(TritonServer(one)) for one in settings.triton.addresses]


def load_served_models(settings: Settings) -> list[str]:
    """Load `recommend`, and the models that have a version; return what was loaded."""
    folders = [settings.model_repository / model for model in (LIFELONG_MODEL, RETRIEVAL_MODEL)]
    models = [folder.name for folder in folders if versions_on_disk(folder)]
    models.append(RECOMMEND_MODEL)
    with open_servers(settings) as servers:
        for server in servers:
            for model in models:
                server.load(model)
    return models


def pointers_to(
    settings: Settings, kafka: KafkaConfig, topics: Topics, version: int, token: int
) -> Pointers:
    """Return what would make a version the live one, once the memories it reads are whole.

    Raises:
        MemoryVersionError: too many users lack memories of the version that it reads.
        StaleTokenError: somebody with a later token moved the pointers meanwhile.
    """
    recorded = read_pointers(kafka, topics)
    if recorded is not None and recorded.token > token:
        # That one has cleared up, too: the version may be gone.
        raise StaleTokenError(token, recorded.token)
    generation = recorded.generation if recorded else settings.generation_number
    memory = memory_of(settings.model_repository, version)
    if memory is None:
        return Pointers(version, generation, None, token)
    make_ready(settings, kafka, topics, generation, memory)
    return Pointers(version, generation, memory.memory_version, token)


def point(
    settings: Settings,
    kafka: KafkaConfig,
    topics: Topics,
    pointers: Pointers,
    *,
    on_step: Callable[[Step], None] = log_step,
) -> float:
    """Make these the live pointers; return the seconds until the answers of every Triton follow.

    Raises:
        StaleTokenError: somebody with a later token moved the pointers meanwhile.
        FlipNotSeenError: answers did not carry the version within FLIP_TIMEOUT_S.
    """
    started = time.monotonic()
    # The first command that reaches Redis must not be the one that cannot be taken back.
    catalogue = CatalogueStore(connect(settings.redis.url))
    catalogue.get_pointers()
    write_pointers(kafka, topics, pointers)
    on_step(Step.RECORDED)
    catalogue.put_pointers(pointers)
    on_step(Step.FLIPPED)
    settle_s = _TRIED_S if pointers.canary else 2 * REFRESH_S
    for address in settings.triton.addresses:
        _await_version(address, pointers.model_version or 0, settle_s)
    on_step(Step.FOLLOWED)
    return time.monotonic() - started


def _await_version(address: str, version: int, settle_s: float) -> None:
    with TritonServer(address) as server:
        if not server.is_ready(RECOMMEND_MODEL):
            server.load(RECOMMEND_MODEL)
    with Recommender(address) as recommender:
        seen, started = -1, time.monotonic()
        since = started
        while time.monotonic() - started < FLIP_TIMEOUT_S:
            # Every instance refreshes on its own: all have followed once no answer of a whole
            # refresh period named another version.
            seen = recommender.recommend(0, deadline_s=FLIP_TIMEOUT_S).provenance.live_version
            if seen != version:
                since = time.monotonic()
            elif time.monotonic() - since > settle_s:
                return
            time.sleep(_POLL_S)
    raise FlipNotSeenError(
        f"the pointers name version {version}, but `{RECOMMEND_MODEL}` at {address} still follows "
        f"{seen or 'none'} after {FLIP_TIMEOUT_S:g} s: does it read the same Redis "
        "(MOVELINE_REDIS__URL of tritonserver)? Compare with `moveline status`."
    )
