"""A real valkey-server, and a Feast store over it with a clock that the tests set."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.redis import connect
from tests.feast.states import NOW_MS, SMALL
from tests.servers import local_stack
from tests.waiting import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import redis
    from feast import FeatureStore


class Clock:
    """Milliseconds that stand still until a test moves them."""

    def __init__(self) -> None:
        self.ms = NOW_MS

    def __call__(self) -> int:
        """Return the time as it stands."""
        return self.ms


@pytest.fixture(scope="session")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that this session started and ends."""
    with local_stack({"redis"}, run_dir=tmp_path_factory.mktemp("redis")) as stack:
        yield stack.addresses.redis


@pytest.fixture
def client(redis_url: str) -> Iterator[redis.Redis]:
    """An empty Redis."""
    connection = connect(redis_url, timeout_s=TIMEOUT_S)
    connection.flushall()
    yield connection
    connection.close()


@pytest.fixture
def clock() -> Clock:
    """The clock that `feast_store` reads."""
    return Clock()


@pytest.fixture
def feast_store(
    client: redis.Redis, redis_url: str, tmp_path: Path, clock: Clock
) -> Iterator[FeatureStore]:
    """Feast after apply, registry and lake in a temporary folder."""
    del client
    from features.definitions import apply, open_store  # noqa: PLC0415 - takes seconds

    store = open_store(redis_url=redis_url, registry=tmp_path / "run" / "feast" / "registry.db")
    apply(store, config=SMALL, lake=tmp_path / "lake")
    online_store = store._get_provider().online_store
    online_store.clock = clock
    yield store
    if online_store._client is not None:
        online_store._client.close()
