"""Users' views as of the rows of a data frame, stepped from the lake: Feast's history of them.

`features/offline.py` is the plug-in that calls this; nothing here knows Feast.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import EntityFrameError
from features.point_in_time import Entities, training_rows

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from features.config import StateConfig

TIME_COLUMN: Final = "event_timestamp"
# A frame may say how many events were known, as an answer's provenance does.
ORDINAL_COLUMN: Final = "moveline_ordinal"
_NS_PER_MS: Final = 1_000_000


@dataclass(frozen=True)
class EventLog:
    """Where users' views come from, and how they are stepped."""

    root: Path
    topic: str
    config: StateConfig
    memory_bytes: int


@dataclass(frozen=True)
class AskedView:
    """One view of a request.

    Attributes:
        name: the view's.
        features: those asked for.
        columns: what each of them is called in the answer.
        join_key: the frame's column with the user's id.
        ttl_ms: how old the newest event may be; 0 is no limit.
    """

    name: str
    features: tuple[str, ...]
    columns: tuple[str, ...]
    join_key: str
    ttl_ms: int


def as_frame(entity_df: Any) -> pd.DataFrame:  # noqa: ANN401 - pandas or dask
    """Return the entity frame in memory, its timestamps UTC.

    Raises:
        EntityFrameError: it is no frame, or has no timestamps.
    """
    if hasattr(entity_df, "compute"):
        entity_df = entity_df.compute()
    if not isinstance(entity_df, pd.DataFrame):
        raise EntityFrameError(
            f"entity_df is {type(entity_df).__name__}: give a pandas or dask DataFrame."
        )
    if TIME_COLUMN not in entity_df.columns:
        raise EntityFrameError(
            f"entity_df has the columns {', '.join(map(str, entity_df.columns))}; it needs "
            f"{TIME_COLUMN}, before which everything is known."
        )
    times = pd.to_datetime(entity_df[TIME_COLUMN], utc=True)
    return entity_df.assign(**{TIME_COLUMN: times}).reset_index(drop=True)


def stepped_columns(
    log: EventLog, views: Sequence[AskedView], frame: pd.DataFrame
) -> dict[str, pa.ChunkedArray]:
    """Return the features of users' views as they were known at each row of the frame.

    Raises:
        EntityFrameError: the frame lacks a view's join key.
        LakeError: no lake, or an unreadable one.
    """
    columns: dict[str, pa.ChunkedArray] = {}
    for join_key, some in itertools.groupby(views, lambda view: view.join_key):
        asked = list(some)
        tables = list(_tables(log, asked, _entities(asked[0], join_key, frame)))
        if tables:
            found = pa.concat_tables(tables).sort_by("row").drop_columns(["row"])
            columns |= dict(zip(found.column_names, found.columns, strict=True))
        else:
            columns |= {name: pa.nulls(0) for view in asked for name in view.columns}
    return columns


def all_labels(
    log: EventLog, views: Sequence[AskedView], *, start_ms: int, end_ms: int
) -> pa.Table:
    """Return every (user, time) of the log within a time, both ends included, as rows.

    Raises:
        LakeError: no lake, or an unreadable one.
    """
    key = views[0].join_key
    inside = (pc.field(TIME_COLUMN) >= start_ms) & (pc.field(TIME_COLUMN) <= end_ms)
    tables = [table.filter(inside) for table in _tables(log, views, None)]
    found = pa.concat_tables(tables).sort_by([(key, "ascending"), (TIME_COLUMN, "ascending")])
    at = found.column_names.index(TIME_COLUMN)
    return found.set_column(at, TIME_COLUMN, found[TIME_COLUMN].cast(pa.timestamp("ms", "UTC")))


def _entities(view: AskedView, join_key: str, frame: pd.DataFrame) -> Entities:
    if join_key not in frame.columns:
        raise EntityFrameError(f"entity_df lacks {join_key!r}, which {view.name} is joined by.")
    nanoseconds = frame[TIME_COLUMN].dt.as_unit("ns").astype("int64").to_numpy()
    ordinal = frame[ORDINAL_COLUMN] if ORDINAL_COLUMN in frame.columns else None
    return Entities(
        frame[join_key].to_numpy(np.int64),
        # Up to the next whole millisecond: an event within the last one is known.
        -(-nanoseconds // _NS_PER_MS),
        None if ordinal is None else ordinal.to_numpy(np.int64),
    )


def _tables(
    log: EventLog, views: Sequence[AskedView], entities: Entities | None
) -> Iterator[pa.Table]:
    """Yield the columns of the answer, and what says which row each belongs to."""
    names = list(dict.fromkeys(name for view in views for name in view.features))
    rows = training_rows(
        log.root,
        log.topic,
        log.config,
        entities=entities,
        features=names,
        memory_bytes=log.memory_bytes,
    )
    for table in rows:
        if entities is None:
            made = {views[0].join_key: table["user_id"], TIME_COLUMN: table["event_time_ms"]}
        else:
            made = {"row": table["row"]}
        for view in views:
            fresh = _is_fresh(table, view.ttl_ms)
            for name, column in zip(view.features, view.columns, strict=True):
                null = pa.scalar(None, table[name].type)
                made[column] = pc.if_else(fresh, table[name], null)
        yield pa.table(made)


def _is_fresh(table: pa.Table, ttl_ms: int) -> pa.ChunkedArray | pa.Scalar:
    """Return whether the newest event known is within the view's ttl, as online readers judge."""
    if not ttl_ms:
        return pa.scalar(True)
    age_ms = pc.subtract(table["event_time_ms"], table["newest_event_time_ms"])
    return pc.less_equal(age_ms, ttl_ms)
