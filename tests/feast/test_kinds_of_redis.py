"""The whole online store on a Redis Cluster and behind a Sentinel, as on one server."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import TYPE_CHECKING

import pytest

from features.catalogue import Item
from features.definitions import apply, open_store
from features.redis import CatalogueStore, connect
from tests.feast.states import NOW_MS, SMALL, expected_user, make_events, write_user
from tests.feast.test_online_store import comparable, refs, row, row_of
from tests.feast.test_ownership import NOW, read_statistics, statistics
from tests.servers import SENTINEL_MASTER, redis_cluster, redis_sentinel

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from feast import FeatureStore

pytestmark = pytest.mark.servers
VIEWS = ("user_session", "user_recent", "user_mid")
USERS = range(1, 21)


@pytest.fixture(params=["cluster", "sentinel"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Each kind in turn."""
    kind = redis_cluster if request.param == "cluster" else redis_sentinel
    with kind(tmp_path / "servers") as servers:
        yield servers.url


def opened(url: str, tmp_path: Path) -> FeatureStore:
    store = open_store(redis_url=url, registry=tmp_path / "registry.db")
    apply(store, config=SMALL, lake=tmp_path / "lake")
    store._get_provider().online_store.clock = lambda: NOW_MS
    return store


def test_reads_writes_and_teardown(url: str, tmp_path: Path) -> None:
    client, store = connect(url), opened(url, tmp_path)
    states = {
        user: write_user(client, user, make_events(user, count=40, end_ms=NOW_MS, late_share=0.2))
        for user in USERS
    }
    CatalogueStore(client).put_items([Item(item_id=i, name=f"item {i}") for i in USERS])
    asked = [{"user_id": user} for user in [*USERS, 404]]
    answer = store.get_online_features(refs(*VIEWS), asked)
    for index, user in enumerate(USERS):
        expected = expected_user(states[user], NOW_MS) | {"user_id": user}
        assert comparable(row(answer, index)) == comparable(expected)
    later = asyncio.run(store.get_online_features_async(refs(*VIEWS), asked)).to_dict()
    assert comparable(row_of(later, 3)) == comparable(row(answer, 3))
    for item in USERS:
        store.push("item_statistics_push", statistics(item_id=item, day=item))
    old = statistics(item_id=3, day=99, at=NOW - timedelta(seconds=1))
    store.push("item_statistics_push", old)
    assert [read_statistics(store, item)[0] for item in USERS] == list(USERS)
    names = store.get_online_features(["item_catalogue:item_name"], [{"item_id": 7}]).to_dict()
    assert names["item_name"] == ["item 7"]
    online_store = store._get_provider().online_store
    online_store.delete_table(store.config, store.get_feature_view("item_statistics"))
    assert read_statistics(store) == (None, None)
    store.push("item_statistics_push", statistics())
    store.teardown()
    assert read_statistics(opened(url, tmp_path / "again")) == (None, None)
    assert connect(url).get("moveline:generation:g1") is not None
    online_store._client.close()
    client.close()


def test_feasts_spelling_reaches_the_same_servers(tmp_path: Path) -> None:
    from features.online_store import MovelineOnlineStoreConfig  # noqa: PLC0415 - beside Feast
    from features.redis_client import connect_to  # noqa: PLC0415 - likewise

    with redis_cluster(tmp_path / "cluster") as cluster:
        config = MovelineOnlineStoreConfig(
            redis_type="redis_cluster",
            connection_string=f"127.0.0.1:{cluster.ports[0]},127.0.0.1:{cluster.ports[1]}",
        )
        client = connect_to(config.address())
        client.set("a", "1")
        assert connect(cluster.url).get("a") == b"1"
    with redis_sentinel(tmp_path / "sentinel") as sentinel:
        config = MovelineOnlineStoreConfig(
            redis_type="redis_sentinel",
            sentinel_master=SENTINEL_MASTER,
            connection_string=f"127.0.0.1:{sentinel.port}",
        )
        connect_to(config.address()).set("a", "2")
        assert sentinel.servers[0].get("a") == b"2"
