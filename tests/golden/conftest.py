"""A real valkey-server for the golden write: what the script leaves there is the format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.redis import connect
from tests.servers import local_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis


@pytest.fixture(scope="session")
def golden_redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a server that this session started and ends."""
    with local_stack({"redis"}, run_dir=tmp_path_factory.mktemp("golden-redis")) as stack:
        yield stack.addresses.redis


@pytest.fixture
def golden_client(golden_redis_url: str) -> Iterator[redis.Redis]:
    """An empty Redis."""
    connection = connect(golden_redis_url)
    connection.flushall()
    yield connection
    connection.close()
