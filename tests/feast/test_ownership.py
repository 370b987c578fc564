"""Feast writes what it owns and is refused what the worker owns, by every way in."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureView, Field, FileSource, PushSource
from feast.data_source import PushMode
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Float32, Int64

from features.catalogue import Item
from features.errors import ReadOnlyViewError
from features.redis import CatalogueStore
from features.schema import views
from tests.feast.states import NOW_MS, SMALL, make_events, write_user

if TYPE_CHECKING:
    from pathlib import Path

    import redis
    from feast import FeatureStore

    from tests.feast.conftest import Clock

pytestmark = pytest.mark.servers
NOW = datetime.fromtimestamp(NOW_MS / 1000, tz=UTC)
WEEK_MS = 7 * 86_400_000
STATISTICS = ["item_statistics:item_events_1d", "item_statistics:item_events_7d"]
WORKER_VIEWS = [view for view in views(SMALL) if view.owner == "worker"]
SCALARS: dict[str, Any] = {"int64": 1, "bool": True, "string": "x", "float32": 0.5}


def statistics(*, item_id: int = 7, day: int = 3, week: int = 20, at: datetime = NOW) -> Any:  # noqa: ANN401 - pandas has no types
    return pd.DataFrame(
        {
            "item_id": [item_id],
            "item_events_1d": [day],
            "item_events_7d": [week],
            "event_timestamp": [at],
        }
    )


def forged(name: str) -> Any:  # noqa: ANN401 - pandas has no types
    """Return a frame that Feast would accept for the view."""
    view = next(view for view in WORKER_VIEWS if view.name == name)
    time_column = "event_time_ms" if view.entity == "user" else "event_timestamp"
    columns: dict[str, Any] = {f"{view.entity}_id": [1], time_column: [NOW]}
    for feature in view.features:
        value = SCALARS[feature.dtype]
        columns[feature.name] = [[value]] if feature.length else [value]
    return pd.DataFrame(columns)


def snapshot(client: redis.Redis) -> dict[bytes, bytes | None]:
    """Return every key and its bytes."""
    return {key: client.dump(key) for key in client.scan_iter()}


def read_statistics(store: FeatureStore, item_id: int = 7) -> tuple[Any, Any]:
    read = store.get_online_features(STATISTICS, [{"item_id": item_id}]).to_dict()
    return read["item_events_1d"][0], read["item_events_7d"][0]


def test_item_statistics_are_pushed_and_read(feast_store: FeatureStore) -> None:
    feast_store.push("item_statistics_push", statistics())
    assert read_statistics(feast_store) == (3, 20)
    assert read_statistics(feast_store, 404) == (None, None)


def test_item_statistics_are_pushed_and_read_async(feast_store: FeatureStore) -> None:
    async def push_and_read() -> dict[str, Any]:
        await feast_store.push_async("item_statistics_push", statistics())
        response = await feast_store.get_online_features_async(STATISTICS, [{"item_id": 7}])
        read: dict[str, Any] = response.to_dict()
        return read

    assert asyncio.run(push_and_read())["item_events_7d"] == [20]


def test_one_request_mixes_both_owners(feast_store: FeatureStore, client: redis.Redis) -> None:
    CatalogueStore(client).put_items([Item(item_id=7, name="Oat milk")])
    feast_store.push("item_statistics_push", statistics())
    read = feast_store.get_online_features(
        [*STATISTICS, "item_catalogue:item_name"], [{"item_id": 7}]
    ).to_dict()
    assert (read["item_events_1d"], read["item_name"]) == ([3], ["Oat milk"])


def test_ttl_holds_for_views_that_feast_owns(feast_store: FeatureStore, clock: Clock) -> None:
    feast_store.push("item_statistics_push", statistics())
    clock.ms = NOW_MS + WEEK_MS
    assert read_statistics(feast_store) == (3, 20)
    clock.ms += 1
    assert read_statistics(feast_store) == (None, None)


def test_item_statistics_are_materialized_from_files(
    feast_store: FeatureStore, tmp_path: Path
) -> None:
    (tmp_path / "lake" / "item_statistics").mkdir(parents=True)
    files = tmp_path / "lake" / "item_statistics" / "day.parquet"
    pq.write_table(pa.Table.from_pandas(statistics(day=5, week=50)), files)
    feast_store.materialize(NOW - timedelta(days=1), NOW + timedelta(days=1), ["item_statistics"])
    assert read_statistics(feast_store) == (5, 50)


@pytest.mark.parametrize("name", [view.name for view in WORKER_VIEWS])
def test_writing_a_worker_view_is_refused(
    feast_store: FeatureStore, client: redis.Redis, name: str
) -> None:
    write_user(client, 1, make_events(1, count=30, end_ms=NOW_MS))
    before = snapshot(client)
    with pytest.raises(ReadOnlyViewError, match=f"{name} .*`moveline (items load|produce)`"):
        feast_store.write_to_online_store(name, forged(name))
    with pytest.raises(ReadOnlyViewError, match=name):
        asyncio.run(feast_store.write_to_online_store_async(name, forged(name)))
    assert snapshot(client) == before


@pytest.mark.parametrize("name", [view.name for view in WORKER_VIEWS])
def test_pushing_to_a_worker_view_is_refused(
    feast_store: FeatureStore, client: redis.Redis, name: str
) -> None:
    with pytest.raises(ReadOnlyViewError, match=name):
        feast_store.push(f"{name}_push", forged(name))
    with pytest.raises(ReadOnlyViewError, match=name):
        asyncio.run(feast_store.push_async(f"{name}_push", forged(name)))
    assert snapshot(client) == {}


@pytest.mark.parametrize("name", [view.name for view in WORKER_VIEWS])
def test_materializing_a_worker_view_is_refused(feast_store: FeatureStore, name: str) -> None:
    with pytest.raises(ReadOnlyViewError, match=name):
        feast_store.materialize(NOW - timedelta(days=1), NOW, [name])
    with pytest.raises(ReadOnlyViewError, match=name):
        feast_store.materialize_incremental(NOW, [name])


def test_an_offline_push_cannot_touch_the_event_log(
    feast_store: FeatureStore, tmp_path: Path
) -> None:
    partition = tmp_path / "lake" / "events" / "partition=0"
    partition.mkdir(parents=True)
    log = partition / "00000000000000000000-00000000000000000000.parquet"
    pq.write_table(pa.table({"event_time_ms": [1], "user_id": [1]}), log)
    before = log.read_bytes()
    with pytest.raises(Exception, match="columns"):
        feast_store.push("user_recent_push", forged("user_recent"), to=PushMode.OFFLINE)
    assert log.read_bytes() == before
    assert [path for path in (tmp_path / "lake").rglob("*") if path.is_file()] == [log]


def test_teardown_deletes_what_feast_owns_and_no_row(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write_user(client, 1, make_events(1, count=50, end_ms=NOW_MS))
    CatalogueStore(client).put_items([Item(item_id=7, name="Oat milk")])
    of_the_worker = snapshot(client)
    feast_store.push("item_statistics_push", statistics())
    assert snapshot(client) != of_the_worker
    feast_store.teardown()
    assert snapshot(client) == of_the_worker


def test_dropping_every_view_from_the_registry_deletes_no_row(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write_user(client, 1, make_events(1, count=50, end_ms=NOW_MS))
    of_the_worker = snapshot(client)
    feast_store.push("item_statistics_push", statistics())
    everything = [*feast_store.list_feature_services(), *feast_store.list_feature_views()]
    feast_store.apply([], objects_to_delete=everything, partial=False)
    assert feast_store.list_feature_views() == []
    assert snapshot(client) == of_the_worker


def num_scans(client: redis.Redis) -> int:
    statistics: dict[str, Any] = client.info("commandstats")
    return int(statistics.get("cmdstat_scan", {}).get("calls", 0))


def test_dropping_worker_views_does_not_walk_the_keyspace(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    worker_views = [feast_store.get_feature_view(view.name) for view in WORKER_VIEWS]
    before = num_scans(client)
    services = feast_store.list_feature_services()
    feast_store.apply([], objects_to_delete=[*services, *worker_views], partial=False)
    online_store = feast_store._get_provider().online_store
    online_store.teardown(feast_store.config, worker_views, [])
    assert num_scans(client) == before
    feast_store.teardown()
    assert num_scans(client) > before


def test_a_view_of_ones_own_beside_a_worker_view(
    feast_store: FeatureStore, client: redis.Redis, tmp_path: Path
) -> None:
    files = FileSource(path=str(tmp_path / "score"), timestamp_field="event_timestamp")
    own = FeatureView(
        name="user_score",
        entities=[feast_store.get_entity("user")],
        schema=[Field(name="user_id", dtype=Int64), Field(name="score", dtype=Float32)],
        source=PushSource(name="user_score_push", batch_source=files),
        ttl=timedelta(0),
    )
    feast_store.apply(own)
    write_user(client, 1, make_events(1, count=4, end_ms=NOW_MS))
    old = NOW - timedelta(days=3650)
    score = pd.DataFrame({"user_id": [1], "score": [0.5], "event_timestamp": [old]})
    feast_store.push("user_score_push", score)
    response = feast_store.get_online_features(
        ["user_score:score", "user_session:session_num_events"], [{"user_id": 1}, {"user_id": 2}]
    )
    read = response.to_dict()
    assert (read["score"], read["session_num_events"]) == ([0.5, None], [4, None])
    for vector in response.proto.results[1:]:
        assert list(vector.statuses) == [FieldStatus.PRESENT, FieldStatus.NOT_FOUND]


def test_reading_one_view_directly_leaves_the_arguments_alone(feast_store: FeatureStore) -> None:
    feast_store.push("item_statistics_push", statistics())
    view = feast_store.get_feature_view("item_statistics")
    key = EntityKey(join_keys=["item_id"], entity_values=[Value(int64_val=7)])
    features = ["item_events_7d"]
    provider = feast_store._get_provider()
    rows = provider.online_read(feast_store.config, view, [key], features)
    assert features == ["item_events_7d"]
    assert rows[0][1]["item_events_7d"].int64_val == 20
    awaited = provider.online_read_async(feast_store.config, view, [key], features)
    assert asyncio.run(awaited) == rows
