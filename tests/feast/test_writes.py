"""Rows of Feast's own views: the newest event time stays, whoever writes in whatever order."""

from __future__ import annotations

import asyncio
import itertools
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from features.errors import StoreUnavailableError
from tests.feast.test_ownership import NOW, read_statistics, statistics

if TYPE_CHECKING:
    from pathlib import Path

    import redis
    from feast import FeatureStore

pytestmark = pytest.mark.servers


def row(item: int, count: int, at: datetime) -> Any:  # noqa: ANN401 - as Feast's stores take them
    key = EntityKey(join_keys=["item_id"], entity_values=[Value(int64_val=item)])
    names = ("item_events_1d", "item_events_7d")
    return (key, {name: Value(int64_val=count) for name in names}, at, None)


def write(store: FeatureStore, *rows: Any) -> int:  # noqa: ANN401 - likewise
    """Write rows of item_statistics; return how many Feast was told of."""
    told: list[int] = []
    view = store.get_feature_view("item_statistics")
    store._get_provider().online_write_batch(store.config, view, list(rows), told.append)
    return sum(told)


TIMES = [
    datetime(1, 1, 1, tzinfo=UTC),
    datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC),
    datetime(1970, 1, 1, tzinfo=UTC),
    NOW,
    NOW + timedelta(microseconds=1),
    NOW + timedelta(seconds=1),
    datetime(9999, 12, 31, tzinfo=UTC),
]


@pytest.mark.parametrize(("older", "newer"), list(itertools.pairwise(TIMES)))
def test_the_newer_row_stays_in_either_order(
    feast_store: FeatureStore, client: redis.Redis, older: datetime, newer: datetime
) -> None:
    del client
    assert write(feast_store, row(1, 10, newer), row(1, 9, older)) == 2
    assert write(feast_store, row(2, 9, older), row(2, 10, newer)) == 2
    view, provider = feast_store.get_feature_view("item_statistics"), feast_store._get_provider()
    for item in (1, 2):
        (found,) = RedisOnlineStore.online_read(
            provider.online_store, feast_store.config, view, [row(item, 0, NOW)[0]], None
        )
        assert found[1]["item_events_1d"].int64_val == 10


def test_an_equal_time_changes_nothing(feast_store: FeatureStore) -> None:
    write(feast_store, row(7, 1, NOW))
    write(feast_store, row(7, 2, NOW))
    assert read_statistics(feast_store) == (1, 1)


def test_writers_at_once_leave_the_newest(feast_store: FeatureStore, redis_url: str) -> None:
    """Feast's own store reads, compares and writes: the threads below make it lose updates."""
    del redis_url
    count = 40
    rows = [row(7, n, NOW + timedelta(milliseconds=n)) for n in range(1, 4 * count + 1)]
    start = threading.Barrier(4)

    def writer(which: int) -> None:
        start.wait()
        for n in range(which, len(rows), 4):
            write(feast_store, rows[n])

    threads = [threading.Thread(target=writer, args=(which,)) for which in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert read_statistics(feast_store) == (4 * count, 4 * count)


def test_feasts_own_store_reads_what_ours_wrote(feast_store: FeatureStore, redis_url: str) -> None:
    """The layout is Feast's: its other readers, in whatever language, go on working."""
    write(feast_store, row(7, 5, NOW))
    address = redis_url.removeprefix("redis://").partition("/")[0]
    config = feast_store.config.model_copy()
    config.online_config = {"type": "redis", "connection_string": address}
    config._online_store = RedisOnlineStoreConfig(connection_string=address)
    stock, view = RedisOnlineStore(), feast_store.get_feature_view("item_statistics")
    (found,) = stock.online_read(config, view, [row(7, 0, NOW)[0]], None)
    assert found[0] == NOW
    assert found[1]["item_events_7d"].int64_val == 5
    stock.online_write_batch(config, view, [row(7, 6, NOW + timedelta(seconds=1))], None)
    write(feast_store, row(7, 4, NOW))
    assert read_statistics(feast_store) == (6, 6)
    stock._client.close()


def test_materialize_incremental_and_write_to_online_store(
    feast_store: FeatureStore, tmp_path: Path
) -> None:
    folder = tmp_path / "lake" / "item_statistics"
    folder.mkdir(parents=True)
    recent = datetime.now(tz=UTC) - timedelta(minutes=5)
    statistics(day=5, week=50, at=recent).to_parquet(folder / "day.parquet")
    feast_store._get_provider().online_store.clock = lambda: int(recent.timestamp() * 1000)
    feast_store.materialize_incremental(datetime.now(tz=UTC), ["item_statistics"])
    assert read_statistics(feast_store) == (5, 50)
    later = statistics(day=6, week=60, at=recent + timedelta(seconds=1))
    feast_store.write_to_online_store("item_statistics", later)
    assert read_statistics(feast_store) == (6, 60)
    latest = statistics(day=7, week=70, at=recent + timedelta(seconds=2))
    asyncio.run(feast_store.write_to_online_store_async("item_statistics", latest))
    assert read_statistics(feast_store) == (7, 70)


def test_key_ttl_seconds_and_skip_dedup_mean_what_they_mean_in_feasts_store(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    settings = feast_store.config.online_store
    settings.key_ttl_seconds = 1_000
    write(feast_store, row(7, 1, NOW))
    (key,) = client.keys("*item_id*")
    assert 990 <= client.ttl(key) <= 1_000
    settings.skip_dedup = True
    write(feast_store, row(7, 2, NOW - timedelta(days=1)))
    assert read_statistics(feast_store) == (2, 2)


def test_scripts_that_redis_forgot_are_loaded_again(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write(feast_store, row(7, 1, NOW))
    client.script_flush()
    write(feast_store, row(7, 2, NOW + timedelta(seconds=1)), row(8, 3, NOW))
    assert read_statistics(feast_store) == (2, 2)
    assert read_statistics(feast_store, 8) == (3, 3)


def test_redis_away_is_an_error_of_ours_for_readers_and_writers(
    feast_store: FeatureStore,
) -> None:
    from features.redis import connect  # noqa: PLC0415 - beside Feast

    online_store = feast_store._get_provider().online_store
    online_store._client = connect("redis://127.0.0.1:1", timeout_s=0.5)
    with pytest.raises(StoreUnavailableError, match="writing rows of item_statistics"):
        write(feast_store, row(7, 1, NOW))
    with pytest.raises(StoreUnavailableError, match="rows that Feast owns"):
        read_statistics(feast_store)
    with pytest.raises(StoreUnavailableError, match="reading pointers"):
        feast_store.get_online_features(["user_recent:recent_item_id"], [{"user_id": 1}])
