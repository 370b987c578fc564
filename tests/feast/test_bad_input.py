"""What readers are told when something is wrong: never a zero that nobody stored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from feast.errors import FeatureViewNotFoundException

from features.config import StateConfig
from features.errors import CorruptRowError, GenerationError, SchemaMismatchError
from features.keys import row_key
from features.redis import CatalogueStore, Pointers, StateStore, connect
from features.schema import schema_hash
from features.store import open_state, read_users
from features.view import PADDING_ITEM
from tests.feast.states import NOW_MS, SMALL, make_events, write_user

if TYPE_CHECKING:
    import redis
    from feast import FeatureStore

pytestmark = pytest.mark.servers


def test_a_damaged_row_is_named(feast_store: FeatureStore, client: redis.Redis) -> None:
    for user in (1, 2):
        write_user(client, user, make_events(user, count=12, end_ms=NOW_MS))
    key = row_key(1, 2)
    row = client.get(key)
    assert isinstance(row, bytes)
    store = open_state(client)
    for damaged in (row[:-30] + b"!" + row[-29:], row[40:], row[:-1]):
        client.set(key, damaged)
        with pytest.raises(CorruptRowError):
            read_users(store, [1, 2], now_ms=NOW_MS)
        with pytest.raises(CorruptRowError):
            feast_store.get_online_features(["user_mid:mid_item_id"], [{"user_id": 2}])
        read = feast_store.get_online_features(["user_mid:mid_item_id"], [{"user_id": 1}])
        assert read.to_dict()["mid_item_id"] != [None]


def test_an_unknown_user_is_padding_and_not_a_user_without_events(client: redis.Redis) -> None:
    write_user(client, 1, make_events(1, count=3, end_ms=NOW_MS))
    batch = read_users(open_state(client), [404, 1], now_ms=NOW_MS)
    assert batch.known_B.tolist() == [False, True]
    assert set(batch.records_BN["item_id"][0].tolist()) == {PADDING_ITEM}
    assert batch.newest_ms_B.tolist() == [-1, NOW_MS]


def test_a_reader_made_for_other_features_is_refused(client: redis.Redis) -> None:
    write_user(client, 1, make_events(1, count=3, end_ms=NOW_MS))
    assert open_state(client, expected_hash=schema_hash(SMALL)).config == SMALL
    other = schema_hash(StateConfig())
    with pytest.raises(SchemaMismatchError, match=f"{schema_hash(SMALL)}.*{other}"):
        open_state(client, expected_hash=other)


def test_a_generation_that_is_not_there_is_refused(client: redis.Redis) -> None:
    with pytest.raises(GenerationError, match="g1 does not exist"):
        open_state(client)
    write_user(client, 1, make_events(1, count=3, end_ms=NOW_MS), generation=3)
    CatalogueStore(client).put_pointers(Pointers(None, 3))
    assert open_state(client).generation == 3
    with pytest.raises(GenerationError, match="g2"):
        open_state(client, generation=2)


def test_an_unknown_view_or_feature_is_refused_by_feast(feast_store: FeatureStore) -> None:
    for features, error in (
        (["user_dreams:colour"], FeatureViewNotFoundException),
        (["user_session:colour"], KeyError),
    ):
        with pytest.raises(error):
            feast_store.get_online_features(features, [{"user_id": 1}])
        with pytest.raises(error):
            asyncio.run(feast_store.get_online_features_async(features, [{"user_id": 1}]))


def test_a_registry_of_another_build_is_refused(
    feast_store: FeatureStore, client: redis.Redis
) -> None:
    """It names a feature that this build does not compute: no default stands in for it."""
    write_user(client, 1, make_events(1, count=3, end_ms=NOW_MS))
    view = feast_store.get_feature_view("user_session")
    online_store = feast_store._get_provider().online_store
    with pytest.raises(SchemaMismatchError, match="feast -c features apply"):
        online_store.online_read(feast_store.config, view, [], ["session_mood"])


def test_a_replaced_type_of_key_is_an_error_of_ours(client: redis.Redis, redis_url: str) -> None:
    from features.errors import StoreError  # noqa: PLC0415 - beside its only use

    client.hset(row_key(1, 5), "a", "b")
    store = StateStore(connect(redis_url), 1, SMALL)
    with pytest.raises(StoreError, match="WRONGTYPE"):
        read_users(store, [5], now_ms=NOW_MS)
    store.client.close()
