"""Feast's side that is not online: the lake as offline store, the registry, materialization.

Users' views are stepped from the event log, as of each row of the entity frame
(`features/historical.py`); other views come from Parquet files through Feast's own store.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
from feast import FileSource, OnDemandFeatureView
from feast.infra.compute_engines.local.compute import LocalComputeEngine
from feast.infra.offline_stores.dask import (
    DaskOfflineStore,
    DaskOfflineStoreConfig,
    DaskRetrievalJob,
)
from feast.infra.offline_stores.offline_store import RetrievalMetadata
from feast.infra.registry.file import FileRegistryStore

from features.config import config_from_json
from features.errors import EntityFrameError, LakeError
from features.historical import (
    TIME_COLUMN,
    AskedView,
    EventLog,
    all_labels,
    as_frame,
    stepped_columns,
)
from features.lake_users import MEMORY_BYTES
from features.online_store import refuse_worker_view

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import pandas as pd
    from feast import FeatureView, RepoConfig
    from feast.data_source import DataSource
    from feast.infra.common.materialization_job import MaterializationTask
    from feast.infra.compute_engines.local.job import LocalMaterializationJob
    from feast.infra.offline_stores.offline_store import RetrievalJob
    from feast.infra.registry.base_registry import BaseRegistry
    from feast.repo_config import RegistryConfig

# Tags of the event log's source: which log, and whose rules step it.
TOPIC_TAG: Final = "moveline_topic"
RULES_TAG: Final = "moveline_rules"
_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
# Beside features/, where the local stack keeps what it writes.
REGISTRY_DEFAULT: Final = Path(".moveline/feast/registry.db")


class MovelineRegistryStore(FileRegistryStore):
    """A registry file with a default place, its folders made when it is first written.

    A relative path starts at the folder that holds `features/`, as the lake's does, not at the
    working directory: Feast's command line changes that one before it opens the registry.
    """

    def __init__(self, registry_config: RegistryConfig, repo_path: Path | None) -> None:
        unset = registry_config.path.startswith("$")
        path = REGISTRY_DEFAULT if unset else Path(registry_config.path)
        del repo_path  # where Feast was started from, if nobody told it better
        root = Path(__file__).resolve().parents[1]
        super().__init__(registry_config.model_copy(update={"path": str(root / path)}), root)

    def _write_registry(self, registry_proto: Any) -> None:  # noqa: ANN401 - generated protobuf
        self._filepath.parent.mkdir(parents=True, exist_ok=True)
        super()._write_registry(registry_proto)


class MovelineComputeEngine(LocalComputeEngine):
    """Feast's local engine, which stops before it reads anything for a view it may not write."""

    def _materialize_one(
        self,
        registry: BaseRegistry,
        task: MaterializationTask,
        **kwargs: Any,  # noqa: ANN401 - passed on as received
    ) -> LocalMaterializationJob:
        refuse_worker_view(task.feature_view.name)
        return super()._materialize_one(registry, task, **kwargs)


class MovelineOfflineStoreConfig(DaskOfflineStoreConfig):
    """The offline_store section of feature_store.yaml.

    Attributes:
        type: this store's import path.
        memory_bytes: of the events and columns held at a time, the result apart.
    """

    type: Any = "features.offline.MovelineOfflineStore"
    memory_bytes: int = MEMORY_BYTES


class MovelineOfflineStore(DaskOfflineStore):
    """Feast's file store, which also steps users' views from the lake."""

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: Any,  # noqa: ANN401 - pandas or dask
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,  # noqa: FBT001, FBT002 - the signature is Feast's
        filter_by_created_timestamp: bool = False,  # noqa: FBT001, FBT002 - likewise
        **kwargs: Any,  # noqa: ANN401 - likewise
    ) -> RetrievalJob:
        """Return a job whose rows are the entity frame's, with features as known at each.

        A row knows what happened before its timestamp; what happened at that very moment is what
        a model predicts. Without an entity frame, the rows are every (user, time) of the event log
        between `start_date` and `end_date`, both included.

        Raises:
            EntityFrameError: the frame lacks a column, or there is none and a view is an item's.
            LakeError: files of a view are not there; when the job runs, also an unreadable lake.
        """
        asked = [_Asked.of(view, feature_refs) for view in feature_views]
        joined = [one for one in asked if RULES_TAG not in one.source.tags]
        stepped = [one.as_view(full=full_feature_names) for one in asked if one not in joined]
        for one in joined:
            _refuse_absent(one.source, one.view.name)
        if entity_df is None and joined:
            raise EntityFrameError(
                f"{joined[0].view.name} has no event log to take rows from: give an entity_df with "
                f"its join keys and {TIME_COLUMN}."
            )
        frame = None if entity_df is None else as_frame(entity_df)
        log = next((one.log(config) for one in asked if one not in joined), None)

        def evaluate() -> pa.Table:
            if frame is None:
                assert log is not None, "views without an event log were refused"
                start_ms, end_ms = _to_ms(kwargs.get("start_date")), _to_ms(kwargs["end_date"])
                return all_labels(log, stepped, start_ms=start_ms, end_ms=end_ms)
            columns = {} if log is None else stepped_columns(log, stepped, frame)
            if not joined:
                return _with_columns(frame, columns)
            keys = _keys_of(joined, frame)
            job = DaskOfflineStore.get_historical_features(
                config,
                [one.view for one in joined],
                [ref for one in joined for ref in one.refs],
                keys.drop_duplicates(),
                registry,
                project,
                full_feature_names,
                filter_by_created_timestamp,
            )
            # Feast's own store sorts by time and drops rows that repeat: the frame's stay.
            found = keys.merge(job.to_df(), how="left", on=list(keys.columns), sort=False)
            files = pa.Table.from_pandas(found.drop(columns=keys.columns), preserve_index=False)
            return _with_columns(
                frame, columns | dict(zip(files.column_names, files.columns, strict=True))
            )

        return _Job(
            evaluate,
            full_feature_names,
            str(config.repo_path),
            OnDemandFeatureView.get_requested_odfvs(feature_refs, project, registry),
            _metadata(feature_refs, frame, kwargs),
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        *args: Any,  # noqa: ANN401 - passed on as received
        **kwargs: Any,  # noqa: ANN401 - likewise
    ) -> RetrievalJob:
        """Return each entity's newest row of a view's files, for `materialize`.

        Raises:
            LakeError: there are no files.
        """
        _refuse_absent(data_source, data_source.name)
        return DaskOfflineStore.pull_latest_from_table_or_query(
            config, data_source, *args, **kwargs
        )

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        *args: Any,  # noqa: ANN401 - passed on as received
        **kwargs: Any,  # noqa: ANN401 - likewise
    ) -> RetrievalJob:
        """Return every row of a view's files.

        Raises:
            LakeError: there are no files.
        """
        _refuse_absent(data_source, data_source.name)
        return DaskOfflineStore.pull_all_from_table_or_query(config, data_source, *args, **kwargs)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig,
        feature_view: FeatureView,
        table: pa.Table,
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Append rows to the files of a view that Feast owns.

        Raises:
            ReadOnlyViewError: the worker owns it.
        """
        refuse_worker_view(feature_view.name)
        DaskOfflineStore.offline_write_batch(config, feature_view, table, progress)


class _Job(DaskRetrievalJob):
    """A job whose result is Arrow's already, not dask's."""

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        del timeout  # nothing here waits for another process
        return self.evaluation_function()


@dataclass(frozen=True)
class _Asked:
    """One view of a request."""

    view: FeatureView
    features: tuple[str, ...]

    @classmethod
    def of(cls, view: FeatureView, refs: Iterable[str]) -> _Asked:
        name = _name_of(view)
        return cls(view, tuple(ref.split(":", 1)[1] for ref in refs if ref.split(":")[0] == name))

    @property
    def refs(self) -> list[str]:
        return [f"{_name_of(self.view)}:{name}" for name in self.features]

    @property
    def source(self) -> FileSource:
        source = self.view.batch_source
        assert isinstance(source, FileSource), "features/definitions.py makes no other"
        return source

    @property
    def join_keys(self) -> list[str]:
        mapped = self.view.projection.join_key_map
        return [mapped.get(column.name, column.name) for column in self.view.entity_columns]

    def as_view(self, *, full: bool) -> AskedView:
        prefix = f"{_name_of(self.view)}__" if full else ""
        (join_key,) = self.join_keys
        ttl = self.view.ttl
        return AskedView(
            name=self.view.name,
            features=self.features,
            columns=tuple(prefix + name for name in self.features),
            join_key=join_key,
            ttl_ms=ttl // timedelta(milliseconds=1) if ttl else 0,
        )

    def log(self, config: RepoConfig) -> EventLog:
        tags = self.source.tags
        return EventLog(
            root=Path(self.source.path),
            topic=tags[TOPIC_TAG],
            config=config_from_json(tags[RULES_TAG].encode()),
            memory_bytes=config.offline_store.memory_bytes,
        )


def _name_of(view: FeatureView) -> str:
    projection: Any = view.projection  # Feast leaves the method without types
    name: str = projection.name_to_use()
    return name


def _refuse_absent(source: DataSource, name: str) -> None:
    """Return if the source's files are there."""
    if isinstance(source, FileSource) and "://" not in source.path:
        path = Path(source.path)
        if not (path.is_file() or (path.is_dir() and any(path.iterdir()))):
            raise LakeError(
                f"{name} has no past: there is no Parquet file at {path}. Write files with its "
                f"entity's id, its features and {source.timestamp_field} there, one row for each "
                "time a value changed."
            )


def _to_ms(time: datetime | None) -> int:
    """Return a moment as UTC epoch milliseconds; the epoch itself for none."""
    if time is None:
        return 0
    aware = time if time.tzinfo else time.replace(tzinfo=UTC)
    return (aware - _EPOCH) // timedelta(milliseconds=1)


def _with_columns(frame: pd.DataFrame, columns: dict[str, pa.ChunkedArray]) -> pa.Table:
    table = pa.Table.from_pandas(frame, preserve_index=False)
    for name, column in columns.items():
        table = table.append_column(name, column)
    return table


def _keys_of(joined: Sequence[_Asked], frame: pd.DataFrame) -> pd.DataFrame:
    """Return the entity and time of each row that the views of files are asked for."""
    keys = [*dict.fromkeys(key for one in joined for key in one.join_keys), TIME_COLUMN]
    absent = [key for key in keys if key not in frame.columns]
    if absent:
        raise EntityFrameError(
            f"entity_df lacks {absent[0]!r}, which {joined[0].view.name} is joined by."
        )
    return frame[keys]


def _metadata(
    refs: list[str], frame: pd.DataFrame | None, kwargs: dict[str, Any]
) -> RetrievalMetadata:
    if frame is None:
        return RetrievalMetadata(refs, [], kwargs.get("start_date"), kwargs.get("end_date"))
    times = frame[TIME_COLUMN]
    keys = [column for column in frame.columns if column != TIME_COLUMN]
    return RetrievalMetadata(refs, keys, times.min(), times.max())
