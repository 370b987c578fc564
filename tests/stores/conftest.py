"""A real Redis Cluster of three nodes, and stores on it as on any other Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.redis import CatalogueStore, RedisClient, StateStore, connect
from tests.servers import RedisCluster, redis_cluster
from tests.small import SMALL
from tests.waiting import TIMEOUT_S

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    """Three primaries."""
    with redis_cluster(tmp_path_factory.mktemp("cluster")) as running:
        yield running


@pytest.fixture
def client(cluster: RedisCluster) -> Iterator[RedisClient]:
    """A connection to the whole of it, empty."""
    for node in cluster.nodes:
        node.flushall()
    client = connect(cluster.url, timeout_s=TIMEOUT_S)
    yield client
    client.close()


@pytest.fixture
def store(client: RedisClient, generation: int) -> StateStore:
    """State of a new generation under small rules."""
    return StateStore(client, generation, SMALL)


@pytest.fixture
def catalogue(client: RedisClient) -> CatalogueStore:
    """The catalogue in the same cluster."""
    return CatalogueStore(client)
