"""The Feast repository: entities, views and services, rendered from features.schema.

`feast -c features apply` imports this file and registers what stands at its top level. Importing
Feast takes seconds, so no other module of Moveline imports this one at its own top.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

from feast import (
    Entity,
    FeatureService,
    FeatureStore,
    FeatureView,
    Field,
    FileSource,
    PushSource,
    RepoConfig,
    ValueType,
)
from feast.types import Array, Bool, Float32, Int64, String

from features.config import StateConfig
from features.offline import RULES_TAG, TOPIC_TAG
from features.schema import SERVICES, views

if TYPE_CHECKING:
    from collections.abc import Mapping

    from features.schema import Feature, View

PROJECT: Final = "moveline"
PREFIX_DEFAULT: Final = "moveline"
EVENTS_TOPIC_DEFAULT: Final = f"{PREFIX_DEFAULT}.events"
LAKE_DEFAULT: Final = Path(".moveline/lake")
_FOLDER: Final = Path(__file__).resolve().parent
_DTYPES: Final = {"int64": Int64, "float32": Float32, "bool": Bool, "string": String}


class Repository(NamedTuple):
    """Everything that `feast apply` registers."""

    entities: tuple[Entity, ...]
    views: tuple[FeatureView, ...]
    services: tuple[FeatureService, ...]


def lake_folder(environment: Mapping[str, str]) -> Path:
    """Return the lake's folder; a relative one starts beside `features/`."""
    return _FOLDER.parent / environment.get("MOVELINE_LAKE__PATH", LAKE_DEFAULT)


def events_topic(environment: Mapping[str, str]) -> str:
    """Return the topic whose events the lake holds for these views."""
    return f"{environment.get('MOVELINE_KAFKA__PREFIX', PREFIX_DEFAULT)}.events"


def render(config: StateConfig, lake: Path, topic: str = EVENTS_TOPIC_DEFAULT) -> Repository:
    """Return the Feast objects of a generation's schema.

    Args:
        config: the rules whose views are rendered, and which step the event log.
        lake: folder of the event log; it may be empty or absent.
        topic: the topic that the event log holds.
    """
    entities = {
        name: Entity(name=name, join_keys=[f"{name}_id"], value_type=ValueType.INT64)
        for name in ("user", "item")
    }
    # One object for the three views it feeds: Feast refuses two sources of one name.
    event_log = FileSource(
        name="event_log",
        path=str(lake),
        timestamp_field="event_time_ms",
        tags={TOPIC_TAG: topic, RULES_TAG: config.to_json().decode()},
    )
    rendered = {
        view.name: _feature_view(view, entities[view.entity], _source(view, event_log, lake))
        for view in views(config)
    }
    services = tuple(
        FeatureService(name=name, features=[rendered[view] for view in of_service])
        for name, of_service in SERVICES.items()
    )
    return Repository(tuple(entities.values()), tuple(rendered.values()), services)


def _feature_view(view: View, entity: Entity, source: PushSource) -> FeatureView:
    key = Field(name=entity.join_key, dtype=Int64)
    return FeatureView(
        name=view.name,
        entities=[entity],
        ttl=timedelta(seconds=view.ttl_s),
        schema=[key, *(_field(feature) for feature in view.features)],
        source=source,
        description=view.about,
        owner=view.owner,
        tags={"owner": view.owner},
    )


def _field(feature: Feature) -> Field:
    scalar = _DTYPES[feature.dtype]
    return Field(
        name=feature.name,
        dtype=Array(scalar) if feature.length else scalar,
        description=feature.about,
        tags={
            "unit": feature.unit,
            "shape": "x".join(map(str, feature.shape)),
            "default": "null" if feature.default is None else str(feature.default),
        },
    )


def _source(view: View, event_log: FileSource, lake: Path) -> PushSource:
    """Return the view's push source and the files behind it.

    Views of the worker have one too: Feast asks for it before it asks our store, which then
    refuses with the reason. Users' views come from the event log, items' views from a folder of
    the view's name, which may stay absent: nothing but `feast materialize` reads it.
    """
    files = event_log
    if view.entity == "item":
        files = FileSource(
            name=f"{view.name}_files", path=str(lake / view.name), timestamp_field="event_timestamp"
        )
    return PushSource(name=f"{view.name}_push", batch_source=files, owner=view.owner)


def open_store(*, redis_url: str, registry: Path, generation: int | None = None) -> FeatureStore:
    """Return Feast's store over that Redis; what feature_store.yaml says, without a file.

    Args:
        redis_url: as docs/bring_your_own.md has them.
        registry: the registry's file.
        generation: read this one; None follows the live pointer.
    """
    config = RepoConfig(
        project=PROJECT,
        provider="local",
        registry={
            "registry_store_type": "features.offline.MovelineRegistryStore",
            "path": str(registry.resolve()),
            "cache_ttl_seconds": 60,
        },
        online_store={
            "type": "features.online_store.MovelineOnlineStore",
            "connection_string": redis_url,
            "generation": generation,
        },
        offline_store={"type": "features.offline.MovelineOfflineStore"},
        batch_engine="features.offline.MovelineComputeEngine",
        entity_key_serialization_version=3,
        repo_path=_FOLDER,
    )
    return FeatureStore(config=config)


def apply(
    store: FeatureStore, *, config: StateConfig, lake: Path, topic: str = EVENTS_TOPIC_DEFAULT
) -> None:
    """Register the views of those rules, as `feast -c features apply` does."""
    repository = render(config, lake.resolve(), topic)
    store.apply([*repository.entities, *repository.views, *repository.services])


_REPOSITORY: Final = render(StateConfig(), lake_folder(os.environ), events_topic(os.environ))
# Feast registers what has a name here. A view added to the schema fails this line until it has one.
user, item = _REPOSITORY.entities
(
    user_session,
    user_recent,
    user_mid,
    user_interest_flow,
    user_lifelong,
    item_catalogue,
    item_statistics,
) = _REPOSITORY.views
gems, hpgr, amen, recommend, catalogue = _REPOSITORY.services
