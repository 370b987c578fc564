"""A Triton in which `recommend` answers, over a Redis that is emptied before every test."""

from __future__ import annotations

import itertools
import time
from typing import TYPE_CHECKING

import pytest

from features.redis import CatalogueStore, Pointers, StateStore, Trending, connect
from features.schema import schema_hash
from scoring.live import REFRESH_S
from scoring.triton import TritonServer
from tests.asking import PatientRecommender
from tests.once import made_once
from tests.small import SMALL
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import redis

    from compose.local.stack import LocalStack
    from scoring.client import Recommender

_MARKS = itertools.count(1_000_000)


@pytest.fixture
def served_redis(triton_stack: LocalStack) -> Iterator[redis.Redis]:
    """The Redis that `recommend` reads, emptied."""
    client = connect(triton_stack.addresses.redis)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def served_store(served_redis: redis.Redis, generation: int) -> StateStore:
    """State under small rules in a generation of the test's own."""
    store = StateStore(served_redis, generation, SMALL)
    store.claim_generation()
    return store


@pytest.fixture
def served_catalogue(served_redis: redis.Redis) -> CatalogueStore:
    """The catalogue that `recommend` reads."""
    return CatalogueStore(served_redis)


@pytest.fixture
def recommender(triton_stack: LocalStack) -> Iterator[Recommender]:
    """A client of the served model, in no hurry."""
    with PatientRecommender(triton_stack.addresses.triton_grpc) as client:
        yield client


@pytest.fixture
def server(triton_stack: LocalStack) -> Iterator[TritonServer]:
    """The operator's view of the same Triton."""
    with TritonServer(triton_stack.addresses.triton_grpc) as one:
        yield one


@pytest.fixture
def go_live(
    recommender: Recommender, served_catalogue: CatalogueStore, served_store: StateStore
) -> Callable[..., None]:
    """Publish pointers and trending items; return once every instance of the model follows.

    Each call marks its trending list with a score of its own, by which followers are told apart.
    """

    def publish(version: int | None, trending: tuple[int, ...] = (7, 8, 9)) -> None:
        mark = next(_MARKS)
        scores = tuple(float(mark + place) for place in range(len(trending)))
        served_catalogue.put_pointers(Pointers(version, served_store.generation))
        served_catalogue.put_trending(Trending(trending, scores))
        published_s = time.monotonic()
        followed_s = published_s

        def followed() -> bool:
            nonlocal followed_s
            answer = recommender.recommend(2**62, k=1, deadline_s=10)
            mine = answer.items and answer.items[0].score == float(mark)
            if not mine or answer.provenance.generation != served_store.generation:
                followed_s = time.monotonic()
            # Every instance looks once per REFRESH_S; which of them answers is Triton's choice.
            now_s = time.monotonic()
            return now_s - published_s > 1.3 * REFRESH_S and now_s - followed_s > 0.2 * REFRESH_S

        until(followed, 20, what="every instance follows")

    return publish


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small trained retrieval model for the small rules, exported."""
    return made_once(tmp_path_factory, "tiny-package", _export_tiny)


def _export_tiny(folder: Path) -> None:
    import torch  # noqa: PLC0415 - seconds, which tests without a model save

    from tests.scoring.tiny import tiny_log, tiny_training  # noqa: PLC0415 - likewise
    from trainer.export import Provenance, export  # noqa: PLC0415 - likewise
    from trainer.train import train  # noqa: PLC0415 - likewise

    torch.set_num_threads(1)
    provenance = Provenance(
        name="gems",
        created_ms=1_763_700_000_000,
        window_from={"0": 0},
        window_to={"0": 1},
        feature_schema_hash=schema_hash(SMALL),
        metrics={"hr10_model": 0.5, "ndcg10_model": 0.25},
    )
    export(train(tiny_log(), tiny_training()), folder, provenance)


@pytest.fixture(scope="session")
def version(package: Path, model_repository: Path, triton_stack: LocalStack) -> int:
    """The small model's first version, published; later ones may come beside it."""
    from trainer.publish import publish  # noqa: PLC0415 - imports torch

    with TritonServer(triton_stack.addresses.triton_grpc) as server:
        return publish(package, model_repository, [server]).version
