"""Goal: an application that knows only Feast gets from the lake what was known at each of its rows.

Method: a lake on disk, the registry applied, everything read through Feast's public API; the
oracle of the point-in-time tests says what a row must hold.
"""

from __future__ import annotations

import math
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, PushSource

from features.definitions import PROJECT, apply, open_store
from features.errors import EntityFrameError, LakeError, ReadOnlyViewError
from features.online_config import URL_DEFAULT
from features.schema import views
from features.state import Accepted, Position
from tests.features.strategies import SMALL
from tests.lake.logs import accepted, known_at, oracle_features, write_logs
from tests.lake.writing import START_MS, TOPIC

if TYPE_CHECKING:
    from pathlib import Path

    from tests.lake.logs import Logs

USER_VIEWS = [view for view in views(SMALL) if view.entity == "user"]
USER_REFS = [f"{view.name}:{one.name}" for view in USER_VIEWS for one in view.features]
DAY_MS = 86_400_000


def at(time_ms: float) -> datetime:
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=time_ms)


def make_logs() -> Logs:
    """Two users, seven clicks each, 6 ms apart, the fifth of them late."""
    return {
        user: [
            Accepted(
                Position(0, 0, n),
                START_MS + 100,
                user + n,
                START_MS + 6 * n - 20 * (n == 4),
                1,
                user * 100 + n,
                n - 1,
                0.5,
                1 + n % 3,
            )
            for n in range(7)
        ]
        for user in (10, 20)
    }


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    """Feast after apply, no Redis anywhere, a lake of two users."""
    write_logs(tmp_path / "lake", make_logs())
    opened = open_store(redis_url=URL_DEFAULT, registry=tmp_path / "registry.db")
    apply(opened, config=SMALL, lake=tmp_path / "lake", topic=TOPIC)
    return opened


FRAME = [
    (20, START_MS + 12, "b"),
    (10, START_MS + 36, "a"),
    (10, START_MS + 36, "again"),
    (99, START_MS + 36, "unknown"),
    (10, START_MS, "first"),
    (10, START_MS + 47, "silence"),
    (20, START_MS + 37 + DAY_MS, "past its ttl"),
]


def frame(rows: list[tuple[int, int, str]] = FRAME) -> pd.DataFrame:
    """Return rows as an application has them."""
    return pd.DataFrame(
        {
            "user_id": [user for user, _, _ in rows],
            "note": [note for _, _, note in rows],
            "event_timestamp": [at(time_ms) for _, time_ms, _ in rows],
        }
    )


def plain(value: Any) -> Any:  # noqa: ANN401 - whatever a frame holds
    """Return lists for arrays and None for what pandas writes in its place."""
    if isinstance(value, (list, np.ndarray)):
        return [plain(one) for one in value]
    if value is None or value is pd.NA or (isinstance(value, float) and math.isnan(value)):
        return None
    return value.item() if isinstance(value, np.generic) else value


def expected(user: int, time_ms: int) -> dict[str, Any]:
    """Return what the oracle says, sessions past their day left out."""
    known = known_at(accepted(make_logs().get(user, []), SMALL), time_ms, None)
    features = oracle_features(known, time_ms, SMALL)
    newest_ms = max((one.event.event_time_ms for one in known.events), default=0)
    if time_ms - newest_ms > DAY_MS:
        features |= {name: None for name in features if name.startswith("session_")}
    return features


def test_every_user_feature_equals_the_oracle(store: FeatureStore) -> None:
    found = store.get_historical_features(frame(), USER_REFS).to_df()
    assert found["note"].tolist() == [note for _, _, note in FRAME]
    for row, (user, time_ms, note) in zip(found.to_dict("records"), FRAME, strict=True):
        for name, value in expected(user, time_ms).items():
            assert plain(row[name]) == plain(value), (note, name)
    assert plain(found["recent_item_id"][1])[-1] == 15
    assert plain(found["session_is_open"][5]) is False
    assert plain(found["session_is_open"][6]) is None
    assert len(found["recent_item_id"][6]) == SMALL.recent


def test_a_service_and_full_names_and_arrow(store: FeatureStore) -> None:
    names = {view.name for view in USER_VIEWS}
    service = next(
        service
        for service in store.list_feature_services()
        if {view.name for view in service.feature_view_projections} <= names
    )
    table = store.get_historical_features(frame(), service, full_feature_names=True).to_arrow()
    named = {
        f"{view.name}__{one.name}"
        for view in service.feature_view_projections
        for one in view.features
    }
    assert set(table.column_names) == named | set(frame().columns)
    assert table.schema.field("user_recent__recent_item_id").type == pa.list_(pa.int64())


def test_an_event_within_the_millisecond_is_known(store: FeatureStore) -> None:
    rows = frame([(10, START_MS + 6, "x")])
    refs = ["user_recent:recent_item_id"]
    assert plain(store.get_historical_features(rows, refs).to_df()["recent_item_id"][0]) == [10]
    rows["event_timestamp"] += pd.Timedelta(1, "us")
    known = store.get_historical_features(rows, refs).to_df()["recent_item_id"][0]
    assert plain(known) == [10, 11]


def test_a_frame_may_say_how_many_events_were_known(store: FeatureStore) -> None:
    rows = frame([(10, START_MS + 40, "x")]).assign(moveline_ordinal=[3])
    found = store.get_historical_features(rows, ["user_recent:recent_item_id"]).to_df()
    assert plain(found["recent_item_id"][0]) == [10, 11, 12]


def test_without_a_frame_every_label_of_a_time_is_a_row(store: FeatureStore) -> None:
    found = store.get_historical_features(
        features=USER_REFS, start_date=at(START_MS + 6), end_date=at(START_MS + 30)
    ).to_df()
    times = [START_MS + 6 * n for n in (1, 2, 3, 5)]
    assert found["user_id"].tolist() == [10] * 4 + [20] * 4
    assert found["event_timestamp"].tolist() == [at(one) for one in times] * 2
    for row in found.to_dict("records"):
        time_ms = int(row["event_timestamp"].timestamp() * 1000)
        for name, value in expected(row["user_id"], time_ms).items():
            assert plain(row[name]) == plain(value), name


def write_statistics(tmp_path: Path) -> None:
    """Item 7 was counted three times, item 8 once."""
    folder = tmp_path / "lake" / "item_statistics"
    folder.mkdir(parents=True, exist_ok=True)
    rows = [(7, 0, 1), (7, DAY_MS, 2), (7, 9 * DAY_MS, 3), (8, 0, 4)]
    table = pa.table(
        {
            "item_id": [item for item, _, _ in rows],
            "item_events_1d": [count for _, _, count in rows],
            "item_events_7d": [10 * count for _, _, count in rows],
            "event_timestamp": pa.array(
                [START_MS + after for _, after, _ in rows], pa.timestamp("ms", "UTC")
            ),
        }
    )
    pq.write_table(table, folder / "all.parquet")


def test_users_and_items_in_one_request(store: FeatureStore, tmp_path: Path) -> None:
    """Rows keep their order, rows that repeat stay, a value past its week is null."""
    write_statistics(tmp_path)
    rows = frame(
        [
            (10, START_MS + DAY_MS + 1, "two"),
            (20, START_MS + 12, "one"),
            (20, START_MS + 12, "one"),
            (20, START_MS + 20, "other item"),
            (10, START_MS + 8 * DAY_MS + 1, "past its ttl"),
            (10, START_MS - 1, "before all"),
        ]
    ).assign(item_id=[7, 7, 7, 8, 7, 7])
    found = store.get_historical_features(
        rows, ["user_recent:recent_item_id", "item_statistics:item_events_7d"]
    ).to_df()
    assert found["note"].tolist() == rows["note"].tolist()
    assert plain(found["item_events_7d"].tolist()) == [20, 10, 10, 40, None, None]
    assert plain(found["recent_item_id"][1]) == plain(found["recent_item_id"][2]) == [20, 21]


def test_item_statistics_alone(store: FeatureStore, tmp_path: Path) -> None:
    write_statistics(tmp_path)
    rows = frame([(1, START_MS + DAY_MS, "x")]).assign(item_id=[7])
    found = store.get_historical_features(rows, ["item_statistics:item_events_1d"]).to_df()
    assert plain(found["item_events_1d"].tolist()) == [2]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (frame().drop(columns="event_timestamp"), "needs event_timestamp"),
        (frame().drop(columns="user_id"), "lacks 'user_id'"),
        ("SELECT 1", "entity_df is str"),
    ],
)
def test_a_frame_that_cannot_be_joined_is_refused(
    store: FeatureStore,
    rows: Any,  # noqa: ANN401 - also what is no frame
    message: str,
) -> None:
    with pytest.raises(EntityFrameError, match=message):
        store.get_historical_features(rows, USER_REFS).to_df()


def test_items_without_files_or_frame_are_refused(store: FeatureStore, tmp_path: Path) -> None:
    refs = ["item_statistics:item_events_1d"]
    with pytest.raises(LakeError, match="item_statistics has no past"):
        store.get_historical_features(frame().assign(item_id=7), refs)
    with pytest.raises(LakeError, match="no Parquet file at"):
        store.materialize(at(START_MS), at(START_MS + DAY_MS), ["item_statistics"])
    write_statistics(tmp_path)
    with pytest.raises(EntityFrameError, match="give an entity_df"):
        store.get_historical_features(features=refs, end_date=at(START_MS))
    with pytest.raises(EntityFrameError, match="lacks 'item_id'"):
        store.get_historical_features(frame(), refs).to_df()


def test_an_absent_lake_is_named(tmp_path: Path) -> None:
    opened = open_store(redis_url=URL_DEFAULT, registry=tmp_path / "registry.db")
    apply(opened, config=SMALL, lake=tmp_path / "lake")
    with pytest.raises(LakeError, match="run `moveline lake` first"):
        opened.get_historical_features(frame(), USER_REFS).to_df()


def test_the_event_log_takes_no_rows_from_feast(store: FeatureStore) -> None:
    """Also rows that look like the log's own, which Feast itself would append to it."""
    view = store.get_feature_view("user_recent")
    assert isinstance(view.stream_source, PushSource)
    provider = store._get_provider()
    assert store.project == PROJECT
    with pytest.raises(ReadOnlyViewError, match="user_recent is computed by"):
        provider.offline_store.offline_write_batch(store.config, view, pa.table({"a": [1]}), None)
