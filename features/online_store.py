"""Feast's online store: the worker's packed rows for its views, Feast's own layout for others.

All views of a user asked for in one request come from one read of that user's row, so session,
recent and mid-term stream belong to the same instant. Feast sees what scoring sees: the same
reading function at the same clock.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from feast import utils
from feast.infra.online_stores.redis import RedisOnlineStore, _versioned_fv_name

from features.clock import now_ms
from features.config import StateConfig
from features.errors import GenerationError, ReadOnlyViewError
from features.online_config import RedisAddressConfig
from features.online_response import add_view
from features.online_values import (
    EPOCH,
    MID,
    MILLISECOND,
    NOT_FOUND,
    Row,
    UserColumns,
    item_row,
    user_columns,
)
from features.online_write import write_rows
from features.redis import CatalogueStore
from features.redis_client import connect_to, pipelined
from features.schema import views
from features.store import open_state, read_users

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from datetime import timedelta

    from feast import Entity, FeatureView, RepoConfig
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    from features.online_write import WriteRow
    from features.redis import StateStore
    from features.user_batch import UserBatch

GroupedRefs = list[tuple["FeatureView", list[str]]]
# How long a promoted generation may go unseen: looking the pointer up for every request would
# double its round trips, and the generation before stays fresh until it is dropped.
POINTER_AGE_S_MAX: Final = 1.0

_VIEWS: Final = {view.name: view for view in views(StateConfig())}
_CATALOGUE: Final = "item_catalogue"


class MovelineOnlineStoreConfig(RedisAddressConfig):
    """The online_store section of feature_store.yaml; Feast looks for the store beside it.

    Attributes:
        type: this store's import path.
        generation: read this one; None follows the live pointer.
    """

    # Any, because Feast's own class narrows it to the one word "redis".
    type: Any = "features.online_store.MovelineOnlineStore"
    generation: int | None = None


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

    @property
    def is_feasts(self) -> bool:
        return not self.is_user_view and self.table.name != _CATALOGUE


@dataclass(frozen=True)
class _Read:
    """What one request has read, in as few round trips as there are kinds of owners."""

    clock_ms: int
    users: UserBatch | None
    index_of: Mapping[int, int]
    rows: Mapping[int, list[Row]]  # by place of the view in the request, users' views excepted

    def columns(self, each: _Asked) -> tuple[UserColumns, list[int]]:
        """Return a user view's values and which of them belongs to each entity key."""
        found = user_columns(each.table.name, each.features, self.users, len(self.index_of))
        ttl_ms = each.table.ttl // MILLISECOND if each.table.ttl else None
        if ttl_ms is not None:
            oldest_ms = self.clock_ms - ttl_ms
            newest_ms = [at if at >= oldest_ms else -1 for at in found.newest_ms]
            found = found._replace(newest_ms=newest_ms)
        return found, [self.index_of[user] for user in each.entity_ids]


class MovelineOnlineStore(RedisOnlineStore):
    """Reads every view; writes only those that Feast owns.

    The asynchronous methods run the synchronous ones in a thread: redis-py's client may be used
    from several, while an asyncio client would bind the store to the event loop that met it first.
    """

    def __init__(self, *, clock: Callable[[], int] = now_ms) -> None:
        self.clock = clock
        self._live: tuple[float, StateStore] | None = None

    def _get_client(self, online_store_config: Any) -> Any:  # noqa: ANN401
        """Return one client for both layouts."""
        if not self._client:
            self._client = connect_to(online_store_config.address())
        return self._client

    # Reading

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[Row]:
        """Return (event time, values) per entity; (None, None) when unknown or past its ttl.

        Raises:
            StoreError: Redis did not answer.
            CorruptRowError: a user's row is damaged.
        """
        features = requested_features or [feature.name for feature in table.features]
        asked = _Asked(table, features, entity_keys)
        read = self._read(config, [asked])
        if not asked.is_user_view:
            return read.rows[0]
        columns, places = read.columns(asked)
        return [columns.row(index) for index in places]

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
        read = self._read(config, asked)
        for which, (each, (indexes, size)) in enumerate(zip(asked, places, strict=True)):
            if each.is_user_view:
                columns, users = read.columns(each)
                of_row = [0] * size
                for user, rows in zip(users, indexes, strict=True):
                    for row in rows:
                        of_row[row] = user
                add_view(
                    online_features_response,
                    each.table,
                    columns,
                    of_row,
                    full_names=full_feature_names,
                    with_version=include_feature_view_version_metadata,
                )
                continue
            utils._populate_response_from_feature_data(  # noqa: SLF001 - likewise
                each.features,
                read.rows[which],
                indexes,
                online_features_response,
                full_feature_names,
                each.table,
                size,
                include_feature_view_version_metadata,
            )

    async def _read_features_per_fv_async(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        await asyncio.to_thread(self._read_features_per_fv, *args, **kwargs)

    def _read(self, config: RepoConfig, asked: Sequence[_Asked]) -> _Read:
        """Read every user and every row once, whatever views they are asked for in."""
        clock_ms = self.clock()
        wanted = [each for each in asked if each.is_user_view]
        user_ids = list(dict.fromkeys(user for each in wanted for user in each.entity_ids))
        users = None
        if user_ids and (store := self._state_store(config.online_store)) is not None:
            with_mid = any(each.table.name == MID for each in wanted)
            newest = None if with_mid else store.config.recent
            users = read_users(store, user_ids, now_ms=clock_ms, newest=newest)
        rows = self._feast_rows(config, asked)
        for place, each in enumerate(asked):
            if each.table.name == _CATALOGUE:
                catalogue = CatalogueStore(self._get_client(config.online_store))
                items = catalogue.get_items(each.entity_ids)
                rows[place] = [item_row(item, each.features) for item in items]
            if place in rows:
                ttl = each.table.ttl
                rows[place] = [_within_ttl(row, ttl, clock_ms) for row in rows[place]]
        return _Read(clock_ms, users, {user: i for i, user in enumerate(user_ids)}, rows)

    def _feast_rows(self, config: RepoConfig, asked: Sequence[_Asked]) -> dict[int, list[Row]]:
        """Return the rows of the views that Feast owns, by place, all read in one pipeline."""
        of_feast = [place for place, each in enumerate(asked) if each.is_feasts]
        commands: list[tuple[Any, ...]] = []
        for each in (asked[place] for place in of_feast):
            # A copy, because the parent appends a name of its own.
            _, fields = self._generate_hset_keys_for_features(
                each.table, list(each.features), _versioned_fv_name(each.table, config)
            )
            keys = self._generate_redis_keys_for_entities(config, each.entity_keys)
            commands += [("HMGET", key, *fields) for key in keys]
        if not commands:
            return {place: [] for place in of_feast}
        client = self._get_client(config.online_store)
        replies = iter(pipelined(client, commands, "reading rows that Feast owns"))
        return {
            place: [self._feast_row(config, asked[place], next(replies)) for _ in keys]
            for place, keys in ((place, asked[place].entity_keys) for place in of_feast)
        }

    def _feast_row(self, config: RepoConfig, each: _Asked, stored: Sequence[bytes | None]) -> Row:
        name = _versioned_fv_name(each.table, config)
        row: Row = self._get_features_for_entity(stored, name, [*each.features, f"_ts:{name}"])
        return _written(row)

    def _state_store(self, settings: MovelineOnlineStoreConfig) -> StateStore | None:
        """Return the generation to read, None when no worker has claimed it yet."""
        if self._live is not None and time.monotonic() - self._live[0] < POINTER_AGE_S_MAX:
            return self._live[1]
        try:
            store = open_state(self._get_client(settings), generation=settings.generation)
        except GenerationError:
            return None  # every user is unknown until then
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
        """Write rows of a view that Feast owns; one that is not newer than what is there is left.

        Raises:
            ReadOnlyViewError: the worker owns it.
            StoreError: Redis did not answer, or is full; some rows may be written.
        """
        refuse_worker_view(table.name)
        write_rows(self._get_client(config.online_store), config, table, data)
        if progress:
            progress(len(data))

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
