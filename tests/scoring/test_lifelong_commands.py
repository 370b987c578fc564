"""Goal: commands build, verify and retire memories, and the near-line app keeps them.

Method: the commands as processes, on the real compressor; states and a lake hold the same events.
"""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import pytest

from compose.memories import MemoryVersionError, memory_of
from compose.serving import point, pointers_to
from compose.settings import Settings, load_settings
from features.chunks import FIRST_FIELD
from features.errors import GenerationError
from features.events import domain_hash
from features.keys import bucket_of, chunks_key, memories_key
from features.lifelong_store import LifelongStore, get_live_memories, put_live_memories
from features.nearline import markers_key
from features.redis import CatalogueStore, Pointers, execute
from streams.control import read_memories, write_memories, write_pointers
from streams.generations import Installation
from streams.kafka import KafkaConfig, ensure_topics
from streams.lifelong_build import coverage
from streams.nearline import Hint, Nearline, Work, prepare_topics
from streams.nearline_config import NearlineConfig
from streams.topics import Topics
from tests.conftest import NUM_PARTITIONS
from tests.lake.logs import write_logs
from tests.lifelong.test_build import log_of
from tests.small import REPOSITORY, put_states

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.lifelong import LiveMemory
    from features.redis import StateStore

pytestmark = pytest.mark.servers
NUM_USERS = 10


@dataclass
class Place:
    """An installation with states, a lake and a published model."""

    kafka: KafkaConfig
    topics: Topics
    store: StateStore
    memory: LiveMemory
    environment: dict[str, str]

    @property
    def memories(self) -> LifelongStore:
        return LifelongStore.of(self.store)

    def lifelong(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command of the group."""
        return subprocess.run(
            [sys.executable, "-m", "compose.cli", "lifelong", *words],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def live(self) -> Pointers | None:
        """Return what Redis says is live, without the token."""
        found = CatalogueStore(self.store.client).get_pointers()
        return found and msgspec.structs.replace(found, token=0)

    def settings(self, *, lake: Path | None = None) -> Settings:
        """Return what the commands are told."""
        at = self.environment
        return load_settings(
            kafka={"bootstrap": self.kafka.bootstrap, "prefix": self.topics.prefix},
            redis={"url": at["MOVELINE_REDIS__URL"]},
            triton={"grpc": at["MOVELINE_TRITON__GRPC"]},
            lake={"path": lake or at["MOVELINE_LAKE__PATH"]},
            model_repository=at["MOVELINE_MODEL_REPOSITORY"],
        )

    def nearline(self, triton: str) -> Nearline:
        """Return the near-line app without Faust."""
        config = NearlineConfig(
            kafka=self.kafka,
            topics=self.topics,
            redis_url=self.environment["MOVELINE_REDIS__URL"],
            generation=self.store.generation,
            triton=triton,
        )
        return Nearline(config, prepare_topics(config))


@pytest.fixture
def place(
    triton_stack: LocalStack,
    served_store: StateStore,
    version: int,
    model_repository: Path,
    tmp_path: Path,
) -> Place:
    """Users of whom chunks wait, and their log in a lake."""
    addresses = triton_stack.addresses
    kafka, topics = KafkaConfig(addresses.kafka), Topics(f"t{uuid.uuid4().hex[:12]}")
    ensure_topics(kafka, topics.specs(NUM_PARTITIONS))
    sizes = {10 * n: (n, 30 + 15 * n) for n in range(1, NUM_USERS + 1)}
    # A lake has the domain as a text, `write_logs` names it after the number; a state has its hash.
    domain = domain_hash("d0")
    put_states(served_store, {user: log_of(*size, domain=domain) for user, size in sizes.items()})
    logs = {user: log_of(*size) for user, size in sizes.items()}
    write_logs(tmp_path / "lake", logs, topic=topics.events)
    pointers = Pointers(version, served_store.generation)
    CatalogueStore(served_store.client).put_pointers(pointers)
    write_pointers(kafka, topics, pointers)
    memory = memory_of(model_repository, version)
    assert memory is not None
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "COLUMNS": "200",
        "MOVELINE_KAFKA__BOOTSTRAP": addresses.kafka,
        "MOVELINE_KAFKA__PREFIX": topics.prefix,
        "MOVELINE_REDIS__URL": addresses.redis,
        "MOVELINE_TRITON__GRPC": addresses.triton_grpc,
        "MOVELINE_MODEL_REPOSITORY": str(model_repository),
        "MOVELINE_LAKE__PATH": str(tmp_path / "lake"),
        "MOVELINE_RUN_DIR": str(tmp_path),
    }
    return Place(kafka, topics, served_store, memory, environment)


def lose_first_chunk(store: StateStore, user: int) -> None:
    """The cap has come before the fold."""
    chunks = chunks_key(store.generation, user)
    execute(store.client, "HSET", chunks, FIRST_FIELD, 1)
    execute(store.client, "HDEL", chunks, 0)


def test_built_verified_and_retired(place: Place) -> None:
    version = place.memory.memory_version
    none = place.lifelong("verify")
    assert none.returncode == 1
    assert f"no memory of version {version} was compared" in none.stderr
    built = place.lifelong("build")
    assert built.returncode == 0, built.stderr
    assert "100.00% of 10 users with chunks are whole, 10 current" in built.stderr
    assert read_memories(place.kafka, place.topics) == (place.memory,)
    assert get_live_memories(place.store.client) == (place.memory,)
    shown = place.lifelong("status")
    assert shown.returncode == 0
    assert f"{version}" in shown.stdout
    assert "100.00%" in shown.stdout
    verified = place.lifelong("verify", "--users", "5")
    assert verified.returncode == 0, verified.stderr
    assert "5 memories compared, 0 differ" in verified.stderr
    key = memories_key(place.store.generation, 100)
    other = execute(place.store.client, "HGET", memories_key(place.store.generation, 90), version)
    execute(place.store.client, "HSET", key, version, other)
    wrong = place.lifelong("verify")
    assert wrong.returncode == 1
    assert "1 differ" in wrong.stderr
    assert "user 100:" in wrong.stderr
    retired = place.lifelong("retire", version)
    assert retired.returncode == 0, retired.stderr
    assert "10 memories" in retired.stderr
    assert read_memories(place.kafka, place.topics) == ()
    again = place.lifelong("retire", version)
    assert again.returncode == 1
    assert "is not kept up to date" in again.stderr


def test_what_is_live_is_not_retired_and_what_is_unknown_not_built(place: Place) -> None:
    version = place.memory.memory_version
    pointers = Pointers(1, place.store.generation, version)
    CatalogueStore(place.store.client).put_pointers(pointers)
    refused = place.lifelong("retire", version)
    assert refused.returncode == 1
    assert "make another one live first" in refused.stderr
    unknown = place.lifelong("build", "--memory-version", "f" * 16)
    assert unknown.returncode == 1
    assert f"reads memory version {'f' * 16}, there are: {version}" in unknown.stderr


def test_the_near_line_app_folds_what_the_control_topic_says(
    place: Place, triton_stack: LocalStack
) -> None:
    for user in range(10, 10 * NUM_USERS + 1, 10):
        name = markers_key(place.store.generation, bucket_of(user))
        execute(place.store.client, "HSET", name, user, b"4294967295!")
    write_memories(place.kafka, place.topics, [place.memory])
    app = place.nearline(triton_stack.addresses.triton_grpc)
    try:
        app.follow(Hint(Work.POINTERS))
        assert get_live_memories(place.store.client) == (place.memory,)
        app.follow(Hint(Work.COMPACT))
        assert app.last_error is None
    finally:
        app.close()
    verified = place.lifelong("verify")
    assert verified.returncode == 0, verified.stderr
    assert "10 memories compared, 0 differ" in verified.stderr
    (mark,) = place.memories.marks([100], [place.memory.memory_version])
    assert mark is not None
    assert mark.first == mark.num_chunks > 0


def test_without_triton_the_work_waits(place: Place) -> None:
    put_live_memories(place.store.client, [place.memory])
    app = place.nearline("127.0.0.1:9")
    try:
        app.follow(Hint(Work.COMPACT))
        assert app.last_error is not None
        assert "127.0.0.1:9" in app.last_error
    finally:
        app.close()
    (mark,) = place.memories.marks([100], [place.memory.memory_version])
    assert mark is not None
    assert mark.first == mark.folded[place.memory.memory_version] == 0


def test_a_generation_without_memories_is_not_promoted(place: Place) -> None:
    """What has left its chunks' hash is in no memory: the model would miss it."""
    version = place.memory.memory_version
    for user in range(10, 10 * NUM_USERS + 1, 10):
        lose_first_chunk(place.store, user)
    here = Installation(place.kafka, place.topics, place.store.client)
    with pytest.raises(GenerationError, match=f"version {version} for 0.0% of 10 users"):
        here.promote(place.store.generation, model_version=3, memory_version=version)
    assert place.lifelong("build").returncode == 0
    here.promote(place.store.generation, model_version=3, memory_version=version)
    assert place.live() == Pointers(3, place.store.generation, version)


def test_a_model_goes_live_with_its_memories(place: Place, version: int) -> None:
    kafka, topics = place.kafka, place.topics
    settings = place.settings()
    point(settings, kafka, topics, pointers_to(settings, kafka, topics, version, 1))
    assert place.live() == Pointers(version, place.store.generation, place.memory.memory_version)
    found = coverage(place.memories, list(range(10, 101, 10)), place.memory.memory_version)
    assert found.num_folded == found.num_chunks > 0


def test_a_model_whose_memories_cannot_be_made_does_not_go_live(
    place: Place, version: int, tmp_path: Path
) -> None:
    before = CatalogueStore(place.store.client).get_pointers()
    for user in range(10, 10 * NUM_USERS + 1, 10):
        lose_first_chunk(place.store, user)
    short = {10 * n: log_of(n, 5) for n in range(1, NUM_USERS + 1)}
    write_logs(tmp_path / "short", short, topic=place.topics.events)
    settings = place.settings(lake=tmp_path / "short")
    with pytest.raises(MemoryVersionError, match=r"whole for 0\.0% of 10 users"):
        pointers_to(settings, place.kafka, place.topics, version, 1)
    assert CatalogueStore(place.store.client).get_pointers() == before
