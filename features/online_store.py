"""Feast's online store: the worker's packed rows for its views, Feast's own layout for others.

All views of a user asked for in one request come from one read of that user's row, so session,
recent and mid-term stream belong to the same instant. Feast sees what scoring sees: the same
reading function at the same clock.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

from feast import utils
from feast.infra.online_stores.redis import (
    RedisClient,
    RedisOnlineStore,
    RedisOnlineStoreConfig,
    RedisType,
)
from pydantic import field_validator, model_validator

from features.clock import now_ms
from features.config import StateConfig
from features.errors import ReadOnlyViewError
from features.online_values import (
    EPOCH,
    MID,
    MILLISECOND,
    NOT_FOUND,
    Row,
    item_row,
    user_row,
)
from features.redis import CatalogueStore, StateStore, connect
from features.row import decode_newest
from features.schema import views
from features.view import seen_clock_ms, view_user

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import datetime, timedelta

    from feast import Entity, FeatureView, RepoConfig
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    from features.state import UserState
    from features.view import UserView

GroupedRefs = list[tuple["FeatureView", list[str]]]
WriteRow = tuple["EntityKey", "dict[str, Value]", "datetime", "datetime | None"]

URL_DEFAULT: Final = "redis://127.0.0.1:6379/0"
# Before anything was promoted there is no pointer, and the first generation is the live one.
GENERATION_DEFAULT: Final = 1
# How long a promoted generation may go unseen: looking the pointer up for every request would
# double its round trips, and the generation before stays fresh until it is dropped.
POINTER_AGE_S_MAX: Final = 1.0

_VIEWS: Final = {view.name: view for view in views(StateConfig())}
_CATALOGUE: Final = "item_catalogue"


class MovelineOnlineStoreConfig(RedisOnlineStoreConfig):
    """The online_store section of feature_store.yaml.

    Attributes:
        type: this store's import path.
        connection_string: redis://, rediss:// or unix://; a name that the environment does not
            define, which Feast leaves as it stands, means the default.
        generation: read this one; None follows the live pointer.
    """

    # Any, because Feast's own class narrows it to the one word "redis".
    type: Any = "features.online_store.MovelineOnlineStore"
    connection_string: str = URL_DEFAULT
    generation: int | None = None

    @field_validator("connection_string")
    @classmethod
    def _take_default(cls, value: str) -> str:
        url = URL_DEFAULT if value.startswith("$") else value
        if "://" not in url:
            raise ValueError(
                f"connection_string is {url!r}: write redis://HOST:PORT/DB, the same URL "
                "that the worker gets as MOVELINE_REDIS__URL."
            )
        return url

    @model_validator(mode="after")
    def _refuse_other_clients(self) -> Self:
        if self.redis_type != RedisType.redis or self.client != RedisClient.redis:
            raise ValueError(
                f"redis_type {self.redis_type.value!r} with client {self.client.value!r}: the "
                "worker writes to one Redis through redis-py, so leave both at 'redis'."
            )
        return self


def refuse_worker_view(name: str) -> None:
    """Return if Feast may write the view.

    Raises:
        ReadOnlyViewError: the worker owns it.
    """
    view = _VIEWS.get(name)
    if view is None or view.owner != "worker":
        return
    if view.entity == "item":
        raise ReadOnlyViewError(
            f"{name} mirrors the compacted items topic, and a write through Feast would be lost "
            "at its next record: load items with `moveline items load`."
        )
    raise ReadOnlyViewError(
        f"{name} is computed by `moveline worker` from the events in Kafka, and a second writer "
        "would make it differ from its log: publish events (`moveline produce` or "
        "streams.producer.EventProducer), rebuild with a replay, and give `feast materialize` "
        "the views it may write (`--views item_statistics`)."
    )


@dataclass(frozen=True)
class _Asked:
    """One view of a request."""

    table: FeatureView
    features: list[str]
    entity_keys: list[EntityKey]

    @property
    def entity_ids(self) -> list[int]:
        return [key.entity_values[0].int64_val for key in self.entity_keys]

    @property
    def is_user_view(self) -> bool:
        view = _VIEWS.get(self.table.name)
        return view is not None and view.owner == "worker" and view.entity == "user"


class MovelineOnlineStore(RedisOnlineStore):
    """Reads every view; writes only those that Feast owns.

    The asynchronous methods run the synchronous ones in a thread: redis-py's client may be used
    from several, while an asyncio client would bind the store to the event loop that met it first.
    """

    def __init__(self, *, clock: Callable[[], int] = now_ms) -> None:
        self.clock = clock
        self._live: tuple[float, StateStore] | None = None

    def _get_client(self, online_store_config: RedisOnlineStoreConfig) -> Any:  # noqa: ANN401
        """Return one client for both layouts (Any: only features.redis names redis types)."""
        if not self._client:
            self._client = connect(online_store_config.connection_string)
        return self._client

    # Reading

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """Return (event time, values) per entity; (None, None) when unknown or past its ttl."""
        features = requested_features or [feature.name for feature in table.features]
        return self._read(config, [_Asked(table, features, entity_keys)])[0]

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """Return what `online_read` returns."""
        return await asyncio.to_thread(
            self.online_read, config, table, entity_keys, requested_features
        )

    def _read_features_per_fv(
        self,
        config: RepoConfig,
        grouped_refs: GroupedRefs,
        join_key_values: dict[str, list[Value]],
        entity_name_to_join_key_map: dict[str, str],
        online_features_response: GetOnlineFeaturesResponse,
        full_feature_names: bool,  # noqa: FBT001 - likewise
        include_feature_view_version_metadata: bool,  # noqa: FBT001 - likewise
    ) -> None:
        """Fill the response of get_online_features. Feast's Redis store bypasses online_read."""
        asked, places = [], []
        for table, features in grouped_refs:
            entities, indexes, size = utils._get_unique_entities(  # noqa: SLF001 - as Feast's own
                table, join_key_values, entity_name_to_join_key_map
            )
            keys = utils._get_entity_key_protos(entities)  # noqa: SLF001 - likewise
            asked.append(_Asked(table, features, keys))
            places.append((indexes, size))
        for each, rows, (indexes, size) in zip(
            asked, self._read(config, asked), places, strict=True
        ):
            utils._populate_response_from_feature_data(  # noqa: SLF001 - likewise
                each.features,
                rows,
                indexes,
                online_features_response,
                full_feature_names,
                each.table,
                size,
                include_feature_view_version_metadata,
            )

    async def _read_features_per_fv_async(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        await asyncio.to_thread(self._read_features_per_fv, *args, **kwargs)

    def _read(self, config: RepoConfig, asked: Sequence[_Asked]) -> list[list[Row]]:
        clock_ms = self.clock()
        seen = self._view_users(config, asked, clock_ms)
        return [
            [_within_ttl(row, each.table.ttl, clock_ms) for row in self._rows(config, each, seen)]
            for each in asked
        ]

    def _rows(
        self, config: RepoConfig, each: _Asked, seen: Mapping[int, UserView]
    ) -> Iterable[Row]:
        name = each.table.name
        if each.is_user_view:
            return [user_row(name, seen.get(user), each.features) for user in each.entity_ids]
        if name == _CATALOGUE:
            catalogue = CatalogueStore(self._get_client(config.online_store))
            return [item_row(item, each.features) for item in catalogue.get_items(each.entity_ids)]
        # A copy, because the parent appends a name of its own.
        rows = super().online_read(config, each.table, each.entity_keys, list(each.features))
        return [_written(row) for row in rows]

    def _view_users(
        self, config: RepoConfig, asked: Sequence[_Asked], clock_ms: int
    ) -> dict[int, UserView]:
        """Return every user asked for in any view, read once."""
        wanted = [each for each in asked if each.is_user_view]
        user_ids = list(dict.fromkeys(user for each in wanted for user in each.entity_ids))
        store = self._state_store(config.online_store) if user_ids else None
        if store is None:
            return {}
        with_mid = any(each.table.name == MID for each in wanted)
        states = _load_states(store, user_ids, with_mid=with_mid)
        return {
            user: view_user(state, seen_clock_ms(clock_ms, state), store.config)
            for user, state in states.items()
        }

    def _state_store(self, settings: MovelineOnlineStoreConfig) -> StateStore | None:
        """Return the generation to read, None when no worker has claimed it yet."""
        if self._live is not None and time.monotonic() - self._live[0] < POINTER_AGE_S_MAX:
            return self._live[1]
        client = self._get_client(settings)
        catalogue = CatalogueStore(client)
        generation = settings.generation
        if generation is None:
            pointers = catalogue.get_pointers()
            generation = GENERATION_DEFAULT if pointers is None else pointers.generation
        recorded = catalogue.recorded_config(generation)
        if recorded is None:
            return None
        store = StateStore(client, generation, recorded)
        self._live = (time.monotonic(), store)
        return store

    # Writing

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[WriteRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Write rows of a view that Feast owns.

        Raises:
            ReadOnlyViewError: the worker owns it.
        """
        refuse_worker_view(table.name)
        super().online_write_batch(config, table, data, progress)

    async def online_write_batch_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[WriteRow],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Do what `online_write_batch` does."""
        await asyncio.to_thread(self.online_write_batch, config, table, data, progress)

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,  # noqa: FBT001 - the signature is Feast's
    ) -> None:
        """Delete the values of views that left the registry, the worker's excepted."""
        super().update(
            config,
            _feast_owned(tables_to_delete),
            _feast_owned(tables_to_keep),
            entities_to_delete,
            entities_to_keep,
            partial,
        )

    def teardown(
        self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]
    ) -> None:
        """Delete the values of every view that Feast owns; the worker's rows stay."""
        super().teardown(config, _feast_owned(tables), entities)


def _feast_owned(tables: Iterable[FeatureView]) -> list[FeatureView]:
    return [t for t in tables if t.name not in _VIEWS or _VIEWS[t.name].owner == "feast"]


def _load_states(
    store: StateStore, user_ids: Sequence[int], *, with_mid: bool
) -> dict[int, UserState]:
    """Return the known users' states; without the mid-term stream, only the newest records."""
    newest = None if with_mid else store.config.recent
    states: dict[int, UserState] = {}
    short: list[int] = []
    for user, row in zip(user_ids, store.read_rows(user_ids, newest=newest), strict=True):
        if row is None:
            continue
        states[user], num_missing = decode_newest(row)
        # Departed ids share the bytes that were asked for: see features.row.newest_bytes.
        if num_missing and states[user].records.size < store.config.recent:
            short.append(user)
    if short:
        states.update(_load_states(store, short, with_mid=True))
    return states


def _within_ttl(row: Row, ttl: timedelta | None, clock_ms: int) -> Row:
    """Return the row, or not-found when older than its view's ttl; a ttl of 0 is none."""
    event_time = row[0]
    if not ttl or event_time is None:
        return row
    age_ms = clock_ms - (event_time - EPOCH) // MILLISECOND
    return NOT_FOUND if age_ms > ttl // MILLISECOND else row


def _written(row: Row) -> Row:
    """Return the row, or not-found where Feast answers unset values dated 1970."""
    values = row[1] or {}
    return row if any(value.WhichOneof("val") for value in values.values()) else NOT_FOUND
