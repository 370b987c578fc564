"""What Feast reads equals what the core's reading function says, value by value."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import pytest
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus

from features.catalogue import Item
from features.redis import CatalogueStore, Pointers
from features.row import decode_row
from features.schema import views
from tests.feast.states import NOW_MS, SMALL, expected_user, make_events, write_user

if TYPE_CHECKING:
    import redis
    from feast import FeatureStore
    from feast.online_response import OnlineResponse

    from tests.feast.conftest import Clock

pytestmark = pytest.mark.servers
USER_VIEWS = ("user_session", "user_recent", "user_mid")
GAP_MS = SMALL.session_gap_ms
DAY_MS = 86_400_000


def refs(*names: str) -> list[str]:
    return [f"{v.name}:{f.name}" for v in views(SMALL) if v.name in names for f in v.features]


def row(response: OnlineResponse, index: int = 0) -> dict[str, Any]:
    return {name: values[index] for name, values in response.to_dict().items()}


def comparable(features: dict[str, Any]) -> dict[str, Any]:
    """Return the features with NaN written as text, because NaN equals nothing."""
    return {
        name: [str(v) if isinstance(v, float) and math.isnan(v) else v for v in value]
        if isinstance(value, list)
        else value
        for name, value in features.items()
    }


@pytest.mark.parametrize("count", [1, 7, 8, 9, 28, 33, 34, 100])
@pytest.mark.parametrize("late_share", [0.0, 0.4])
def test_every_user_feature_equals_the_reading_function(
    feast_store: FeatureStore, client: redis.Redis, count: int, late_share: float
) -> None:
    states = {
        user: write_user(
            client, user, make_events(user, count=count, end_ms=NOW_MS, late_share=late_share)
        )
        for user in (1, 2**62, 3)
    }
    asked = [{"user_id": user} for user in (3, 1, 2**62, 1)]
    response = feast_store.get_online_features(refs(*USER_VIEWS), asked)
    for index, entity in enumerate(asked):
        expected = expected_user(states[entity["user_id"]], NOW_MS) | entity
        assert comparable(row(response, index)) == comparable(expected)


@pytest.mark.parametrize("name", USER_VIEWS)
def test_one_view_alone_equals_the_same_view_among_all(
    feast_store: FeatureStore, client: redis.Redis, name: str
) -> None:
    events = make_events(5, count=90, end_ms=NOW_MS, late_share=0.5)
    state = write_user(client, 5, events)
    assert state.departed, "late events must have left ids behind, or the short read is untested"
    alone = row(feast_store.get_online_features(refs(name), [{"user_id": 5}]))
    expected = expected_user(state, NOW_MS)
    assert comparable(alone) == comparable({k: expected[k] for k in alone if k != "user_id"}) | {
        "user_id": 5
    }


def test_a_feature_service_and_full_names(feast_store: FeatureStore, client: redis.Redis) -> None:
    state = write_user(client, 1, make_events(1, count=40, end_ms=NOW_MS))
    service = feast_store.get_feature_service("gems")
    response = row(
        feast_store.get_online_features(service, [{"user_id": 1}], full_feature_names=True)
    )
    expected = expected_user(state, NOW_MS)
    assert response["user_recent__recent_item_id"] == expected["recent_item_id"]
    assert response["user_mid__mid_domain"] == expected["mid_domain"]
    # Nothing writes a lifelong memory yet: its place is null, not zero.
    places = {"user_lifelong__lifelong_memory", "user_lifelong__lifelong_num_chunks"}
    assert {response[name] for name in places} == {None}
    assert len(response) == len(expected) + len(places) + 1


def test_async_reads_equal_sync_reads_from_any_event_loop(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write_user(client, 1, make_events(1, count=40, end_ms=NOW_MS))
    entities = [{"user_id": 1}, {"user_id": 2}]
    sync = feast_store.get_online_features(refs(*USER_VIEWS), entities).to_dict()
    for _ in range(2):
        response = asyncio.run(
            feast_store.get_online_features_async(refs(*USER_VIEWS), entities)
        ).to_dict()
        assert comparable(row_of(response, 0)) == comparable(row_of(sync, 0))
        assert row_of(response, 1) == row_of(sync, 1)


def row_of(columns: dict[str, list[Any]], index: int) -> dict[str, Any]:
    return {name: values[index] for name, values in columns.items()}


def test_unknown_users_are_null_beside_known_ones(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write_user(client, 1, make_events(1, count=3, end_ms=NOW_MS))
    response = feast_store.get_online_features(
        refs(*USER_VIEWS), [{"user_id": 404}, {"user_id": 1}]
    )
    unknown = row(response, 0)
    assert unknown.pop("user_id") == 404
    assert set(unknown.values()) == {None}
    assert row(response, 1)["session_num_events"] == 3
    statuses = response.proto.results[-1].statuses
    assert list(statuses) == [FieldStatus.NOT_FOUND, FieldStatus.PRESENT]


def test_before_any_worker_every_user_is_unknown(feast_store: FeatureStore) -> None:
    response = feast_store.get_online_features(refs("user_recent"), [{"user_id": 1}])
    assert row(response)["recent_item_id"] is None


def test_values_are_dated_by_the_newest_event(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write_user(client, 1, make_events(1, count=12, end_ms=NOW_MS - 777))
    response = feast_store.get_online_features(refs(*USER_VIEWS), [{"user_id": 1}])
    dated = [
        vector.event_timestamps[0].ToMilliseconds()
        for name, vector in zip(
            response.proto.metadata.feature_names.val, response.proto.results, strict=True
        )
        if name != "user_id"
    ]
    assert set(dated) == {NOW_MS - 777}


def test_an_event_dated_ahead_is_seen_as_scoring_sees_it(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    write_user(client, 1, make_events(1, count=12, end_ms=NOW_MS + 60_000))
    response = row(feast_store.get_online_features(refs("user_recent"), [{"user_id": 1}]))
    assert response["recent_event_time_ms"][-1] == NOW_MS + 60_000


def test_a_session_ends_by_the_readers_clock_alone(
    feast_store: FeatureStore, client: redis.Redis, clock: Clock
) -> None:
    write_user(client, 1, make_events(1, count=5, end_ms=NOW_MS))
    for later_ms, is_open, num_events in ((GAP_MS, True, 5), (GAP_MS + 1, False, 0)):
        clock.ms = NOW_MS + later_ms
        read = row(feast_store.get_online_features(refs("user_session"), [{"user_id": 1}]))
        assert (read["session_is_open"], read["session_num_events"]) == (is_open, num_events)


def test_ttl_holds_for_the_session_and_not_for_streams(
    feast_store: FeatureStore, client: redis.Redis, clock: Clock
) -> None:
    write_user(client, 1, make_events(1, count=5, end_ms=NOW_MS))
    for later_ms, closed in ((DAY_MS, False), (DAY_MS + 1, None)):
        clock.ms = NOW_MS + later_ms
        read = row(
            feast_store.get_online_features(refs("user_session", "user_recent"), [{"user_id": 1}])
        )
        assert read["session_is_open"] is closed
        assert len(read["recent_item_id"]) == 5


def test_readers_follow_the_live_pointer(feast_store: FeatureStore, client: redis.Redis) -> None:
    write_user(client, 1, make_events(1, count=5, end_ms=NOW_MS))
    write_user(client, 1, make_events(1, count=9, end_ms=NOW_MS), generation=2)

    def num_recent() -> int:
        read = feast_store.get_online_features(refs("user_recent"), [{"user_id": 1}])
        return len(row(read)["recent_item_id"])

    assert num_recent() == 5
    CatalogueStore(client).put_pointers(Pointers(None, 2))
    deadline = time.monotonic() + 60
    while num_recent() == 5:
        assert time.monotonic() < deadline, "the promoted generation was never read"
    assert num_recent() == 8


def test_a_pinned_reader_ignores_the_pointer(
    client: redis.Redis, redis_url: str, feast_store: FeatureStore
) -> None:
    from features.definitions import open_store  # noqa: PLC0415 - takes seconds

    write_user(client, 1, make_events(1, count=5, end_ms=NOW_MS))
    write_user(client, 1, make_events(1, count=7, end_ms=NOW_MS), generation=2)
    registry = feast_store.registry._registry_store._filepath
    pinned = open_store(redis_url=redis_url, registry=registry, generation=2)
    read = pinned.get_online_features(refs("user_recent"), [{"user_id": 1}])
    assert len(row(read)["recent_item_id"]) == 7
    pinned._get_provider().online_store._client.close()


def test_the_catalogue(feast_store: FeatureStore, client: redis.Redis) -> None:
    CatalogueStore(client).put_items(
        [
            Item(item_id=7, name="Oat milk", categories=("Drinks", "Milk")),
            Item(item_id=8, name="Gone", available=False),
        ]
    )
    service = feast_store.get_feature_service("catalogue")
    read = feast_store.get_online_features(
        service, [{"item_id": 8}, {"item_id": 404}, {"item_id": 7}]
    ).to_dict()
    assert read == {
        "item_id": [8, 404, 7],
        "item_name": ["Gone", None, "Oat milk"],
        "item_categories": [[], None, ["Drinks", "Milk"]],
        "item_available": [False, None, True],
    }


def test_reading_leaves_the_rows_alone(feast_store: FeatureStore, client: redis.Redis) -> None:
    state = write_user(client, 1, make_events(1, count=50, end_ms=NOW_MS, late_share=0.3))
    feast_store.get_online_features(refs(*USER_VIEWS), [{"user_id": 1}])
    raw = client.get(next(client.scan_iter(match="moveline:*:g1:row:1")))
    assert isinstance(raw, bytes)
    assert decode_row(raw).tail == state.tail
