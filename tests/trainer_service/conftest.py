"""An installation over real servers: Kafka, Redis and a Triton that answers."""

from __future__ import annotations

import shutil
import uuid
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from compose.settings import Settings, load_settings
from features.redis import StateStore, connect
from scoring.signature import RECOMMEND_MODEL
from scoring.triton import TritonServer
from streams.kafka import KafkaConfig, ensure_topics
from streams.topics import Topics
from tests.servers import local_stack
from tests.small import REPOSITORY, SMALL
from tests.trainer_service.installation import small

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compose.local.stack import LocalStack


@pytest.fixture
def installation(stack: LocalStack, generation: int, tmp_path: Path) -> Callable[..., Settings]:
    """Makes settings over Kafka and Redis, with an empty lake; keywords are of `training`."""
    return lambda **training: _settings(
        stack, generation, tmp_path, tmp_path / "model_repo", training
    )


@pytest.fixture(scope="module")
def own_repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model repository without versions."""
    return shutil.copytree(
        REPOSITORY / "model_repo",
        tmp_path_factory.mktemp("trainer") / "model_repo",
        ignore=lambda folder, names: [
            name for name in names if name.isdecimal() and Path(folder).name != RECOMMEND_MODEL
        ],
    )


@pytest.fixture(scope="module")
def own_stack(own_repository: Path) -> Iterator[LocalStack]:
    """Servers of this area's own: publishing clears up versions that are not live, whose ever."""
    with local_stack(
        run_dir=own_repository.parent,
        model_repository=own_repository,
        triton_environment={
            "MOVELINE_REDIS__URL": "{redis}",
            "MOVELINE_KAFKA__BOOTSTRAP": "{kafka}",
        },
    ) as running:
        with TritonServer(running.addresses.triton_grpc) as server:
            server.load(RECOMMEND_MODEL)
        yield running


@pytest.fixture
def served(
    own_stack: LocalStack, own_repository: Path, generation: int, tmp_path: Path
) -> Callable[..., Settings]:
    """Makes the same with a Triton that answers."""
    return lambda **training: _settings(own_stack, generation, tmp_path, own_repository, training)


def _settings(
    stack: LocalStack,
    generation: int,
    folder: Path,
    repository: Path,
    training: dict[str, object],
) -> Settings:
    prefix = f"t{uuid.uuid4().hex[:12]}"
    ensure_topics(KafkaConfig(stack.addresses.kafka), Topics(prefix).specs(1))
    client = connect(stack.addresses.redis)
    client.flushall()
    StateStore(client, generation, SMALL).claim_generation()
    client.close()
    defaults = {
        "events_min": 1,
        "every_s": 3_600,
        "budget_s": 60,
        "epochs": 1,
        "held_out_share": 0.15,
        "quality_margin": 1,
        "latency_ms": 10_000,
        "lease_s": 60,
        "metrics_port": 0,
        "checkpoint_every_steps": 2,
    }
    return load_settings(
        kafka={"bootstrap": stack.addresses.kafka, "prefix": prefix, "partitions": 1},
        redis={"url": stack.addresses.redis},
        triton={"grpc": stack.addresses.triton_grpc} if stack.addresses.triton_grpc else None,
        generation=f"g{generation}",
        run_dir=folder / "run",
        model_repository=repository,
        training={**defaults, **training},
    )


@pytest.fixture
def small_runs() -> Iterator[None]:
    """Runs of this process train models of the tests' sizes; see installation.py."""
    with ExitStack() as entered:
        for one in small():
            entered.enter_context(one)
        yield
