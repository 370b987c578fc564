"""Real servers shared by a whole test run, and a fresh corner of them for every test.

An area that needs servers of its own (streams, feast, local_stack) has fixtures of its own, which
then hide those of the same name here.
"""

from __future__ import annotations

import itertools
import os
import shutil
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

from features.redis import CatalogueStore, StateStore, connect
from scoring.signature import RECOMMEND_MODEL
from scoring.triton import TritonServer
from streams.kafka import KafkaConfig, ensure_topics
from streams.topics import Topics
from tests.servers import local_stack
from tests.small import REPOSITORY, SMALL, UNCOMPILED
from tests.waiting import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator

    import redis

    from compose.local.stack import LocalStack

NUM_PARTITIONS = 3
# A consumer group is named after its generation, and one that was killed in a test lives on in
# the broker for a while: no two tests share a number.
_GENERATIONS = itertools.count(1)
_TRITON_FOLDER = pytest.StashKey[Path]()
_LOG_LINES = 40
# Files that take minutes, and stay in one process: begun last, they would keep the others waiting.
_LONG = (
    "end_to_end/test_demo.py",
    "scoring/test_machine_code.py",
    "trainer_service/test_runs.py",
    "repartition/test_repartition.py",
    "publishing/test_versions.py",
    "publishing/test_faults.py",
)

os.environ.update(UNCOMPILED)

settings.register_profile("laptop", deadline=None, max_examples=50)
settings.register_profile("ci", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI", "").lower() in {"1", "true"} else "laptop")


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """Kafka and Redis; with KAFKA_HOME that Apache Kafka, else the embedded broker."""
    home = os.environ.get("KAFKA_HOME")
    with local_stack(
        {"kafka", "redis"},
        run_dir=tmp_path_factory.mktemp("stack"),
        kafka_home=Path(home) if home else None,
    ) as running:
        yield running


@pytest.fixture(scope="session")
def triton_stack(
    tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config
) -> Iterator[LocalStack]:
    """Kafka, Redis and a Triton in which `recommend` is loaded; its repository is a copy."""
    run_dir = tmp_path_factory.mktemp("triton")
    pytestconfig.stash[_TRITON_FOLDER] = run_dir
    shutil.copytree(
        REPOSITORY / "model_repo",
        run_dir / "model_repo",
        # Versions of `gems` that somebody published here are no part of the test.
        ignore=lambda folder, names: [
            name for name in names if name.isdecimal() and Path(folder).name != RECOMMEND_MODEL
        ],
    )
    with local_stack(
        run_dir=run_dir,
        model_repository=run_dir / "model_repo",
        # Every answer is logged: what logging could break, every test of `recommend` would see.
        triton_environment={
            "MOVELINE_REDIS__URL": "{redis}",
            "MOVELINE_KAFKA__BOOTSTRAP": "{kafka}",
            "MOVELINE_FEATURE_LOG__SHARE": "1.0",
        },
    ) as running:
        with TritonServer(running.addresses.triton_grpc) as server:
            server.load(RECOMMEND_MODEL)
        yield running


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the long files, the others in their order."""

    def place(item: pytest.Item) -> int:
        name = item.path.relative_to(REPOSITORY / "tests").as_posix()
        return _LONG.index(name) if name in _LONG else len(_LONG)

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Show the last words of Triton with a failure: a server that died says why only there."""
    report = yield
    folder = item.config.stash.get(_TRITON_FOLDER, None)
    if report.failed and folder is not None and "triton_stack" in getattr(item, "fixturenames", ()):
        lines = (folder / "logs" / "triton.log").read_text(encoding="utf-8").splitlines()
        report.sections.append(("triton.log", "\n".join(lines[-_LOG_LINES:])))
    return report


@pytest.fixture(scope="session")
def model_repository(triton_stack: LocalStack, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `triton_stack` serves."""
    del triton_stack
    return next(tmp_path_factory.getbasetemp().glob("triton*/model_repo"))


@pytest.fixture
def kafka(stack: LocalStack) -> KafkaConfig:
    """The broker as the code under test takes it."""
    return KafkaConfig(stack.addresses.kafka)


@pytest.fixture
def topics(kafka: KafkaConfig) -> Topics:
    """Topics nobody else uses, created as an installation has them."""
    fresh = Topics(f"t{uuid.uuid4().hex[:12]}")
    ensure_topics(kafka, fresh.specs(NUM_PARTITIONS))
    return fresh


@pytest.fixture
def redis_client(stack: LocalStack) -> Iterator[redis.Redis]:
    """An empty Redis."""
    client = connect(stack.addresses.redis, timeout_s=TIMEOUT_S)
    client.flushall()
    yield client
    client.close()


@pytest.fixture
def generation() -> int:
    """A generation no other test has used."""
    return next(_GENERATIONS)


@pytest.fixture
def store(redis_client: redis.Redis, generation: int) -> StateStore:
    """State of a new generation under small rules."""
    return StateStore(redis_client, generation, SMALL)


@pytest.fixture
def catalogue(redis_client: redis.Redis) -> CatalogueStore:
    """The catalogue in the same Redis."""
    return CatalogueStore(redis_client)
