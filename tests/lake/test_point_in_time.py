"""Goal: a training row holds what was known at its label, all of it, and nothing later.

Method: any users' logs (late events, repeats, holes) are written as a lake; every label is compared
with an oracle that looks at the whole log again for each of them, and with the real step and the
function that online readers use.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from features import point_in_time
from features.errors import LakeError, SchemaMismatchError
from features.lake import list_files, read_accepted
from features.lake_users import stream_users
from features.point_in_time import Entities, feature_names, training_rows
from features.schema import Feature, View, views
from features.state import EMPTY_STATE, Accepted, Position, step
from features.view import view_user
from tests.features.strategies import SMALL
from tests.lake.logs import accepted, known_at, oracle_features, users_logs, write_logs
from tests.lake.writing import TOPIC
from tests.small import REPOSITORY

if TYPE_CHECKING:
    from tests.lake.logs import Logs

# So little that every bucket with a user is a part of its own, and every label a table.
TINY_BYTES = 1_000


def rows_at(logs: Logs, entities: Entities | None = None, **options: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Return the training rows of a lake with these logs."""
    with TemporaryDirectory() as folder:
        write_logs(Path(folder), logs)
        tables = training_rows(Path(folder), TOPIC, SMALL, entities=entities, **options)
        return [row for table in tables for row in table.to_pylist()]


def expected_row(logs: Logs, user: int, time_ms: int, ordinal: int | None) -> dict[str, Any]:
    """Return what the oracle says, the label's own items apart."""
    known = known_at(accepted(logs.get(user, []), SMALL), time_ms, ordinal)
    times = [one.event.event_time_ms for one in known.events]
    return {
        "user_id": user,
        "event_time_ms": time_ms,
        "ordinal": known.ordinal,
        "newest_event_time_ms": max(times, default=None),
        **oracle_features(known, time_ms, SMALL),
    }


@given(users_logs(), st.sampled_from([TINY_BYTES, 50_000, 2**24]))
@settings(max_examples=50, deadline=None)
def test_every_label_equals_the_oracle(logs: Logs, memory_bytes: int) -> None:
    labels: dict[tuple[int, int], list[int]] = {}
    for user, events in logs.items():
        for one in accepted(events, SMALL):
            labels.setdefault((user, one.event.event_time_ms), []).append(one.event.item_id)
    rows = rows_at(logs, memory_bytes=memory_bytes)
    assert len(rows) == len(labels)
    for row in rows:
        user, time_ms = row["user_id"], row["event_time_ms"]
        assert row.pop("label_item_id") == labels[user, time_ms]
        assert row == expected_row(logs, user, time_ms, None)


@st.composite
def logs_and_frames(draw: st.DrawFn) -> tuple[Logs, list[tuple[int, int, int]]]:
    """Return logs, and labels at, right before and right after the times of their events."""
    logs = draw(users_logs())
    times = [event.event_time_ms for events in logs.values() for event in events] or [1_000]
    label = st.tuples(
        st.sampled_from([*logs, 50]),  # 50 is in no log
        st.sampled_from(times).flatmap(lambda time_ms: st.integers(time_ms - 1, time_ms + 1)),
        st.integers(0, 40),
    )
    return logs, draw(st.lists(label, min_size=1, max_size=30))


@given(logs_and_frames(), st.sampled_from(["ordinals", ""]), st.sampled_from([TINY_BYTES, 2**24]))
@settings(max_examples=40, deadline=None)
def test_any_frame_equals_the_oracle(
    drawn: tuple[Logs, list[tuple[int, int, int]]], with_ordinals: str, memory_bytes: int
) -> None:
    logs, frame = drawn
    user_id, time_ms, ordinal = (np.array(column, np.int64) for column in zip(*frame, strict=True))
    entities = Entities(user_id, time_ms, ordinal if with_ordinals else None)
    rows = rows_at(logs, entities, memory_bytes=memory_bytes)
    assert sorted(row["row"] for row in rows) == list(range(len(frame)))
    for row in rows:
        user, at_ms, arrived = frame[row.pop("row")]
        del row["label_item_id"]
        assert row == expected_row(logs, user, at_ms, arrived if with_ordinals else None)


@given(users_logs())
@settings(max_examples=40, deadline=None)
def test_a_row_equals_what_a_reader_saw_then(logs: Logs) -> None:
    """At each ordinal, with a clock behind all that had arrived: as online readers have it."""
    frame, seen = [], []
    for user, events in logs.items():
        state = EMPTY_STATE
        forgets = [n for n, event in enumerate(events) if event.is_forget]
        for n, event in enumerate(events):
            if event.action == SMALL.codes["impression"]:
                continue
            state = step(state, (event,), SMALL).state
            if n <= max(forgets, default=-1):
                continue  # what was seen before a forget is in no lake
            clock_ms = int(state.records["event_time_ms"][-1]) + 1
            frame.append((user, clock_ms, state.next_ordinal))
            seen.append(view_user(state, clock_ms, SMALL))
    if not frame:
        return
    entities = Entities(*(np.array(column, np.int64) for column in zip(*frame, strict=True)))
    for row in rows_at(logs, entities):
        view = seen[row["row"]]
        for stream, records in (("recent", view.recent), ("mid", view.mid)):
            for name in ("item_id", "event_time_ms", "action", "dwell_ms", "value"):
                assert row[f"{stream}_{name}"] == records[name].tolist()
        for name in ("is_open", "start_ms", "last_ms", "num_events", "dwell_ms", "distinct_items"):
            assert row[f"session_{name}"] == getattr(view.user_session, name), name
        assert row["session_id"] == view.user_session.session_id
        assert row["session_action_counts"] == list(view.user_session.action_counts)
        assert row["session_last_items"] == list(view.user_session.last_items)


PLANTED_ITEM = 10**6


def planted(event_time_ms: int, number: int) -> Accepted:
    """Return an event that any row would show by its item, its dwell time or its number."""
    place = Position(0, 0, 10**6 + number)
    return Accepted(
        place, 10**7, PLANTED_ITEM + number, event_time_ms, 7, 10**6 + number, 10**6, 0.5, 2
    )


@given(users_logs(max_size=25), st.data())
@settings(max_examples=60, deadline=None)
def test_no_planted_future_is_in_any_row(logs: Logs, data: st.DataObject) -> None:
    """Events dated at or after a moment arrive anywhere in the log, also long before it."""
    cut_ms = data.draw(st.integers(900, 2_000))
    future = {user: list(events) for user, events in logs.items()}
    for user, events in future.items():
        for number in range(data.draw(st.integers(1, 4))):
            late_ms = data.draw(st.integers(cut_ms, cut_ms + 50))
            at = data.draw(st.integers(0, len(events)))
            events.insert(at, planted(late_ms, 100 * user + number))
    frame = [(user, data.draw(st.integers(cut_ms - 60, cut_ms))) for user in logs]
    entities = Entities(*(np.array(column, np.int64) for column in zip(*frame, strict=True)))
    for row in [*rows_at(future, entities), *rows_at(future)]:
        label_ms = row["event_time_ms"]
        if label_ms > cut_ms or row["recent_item_id"] is None:
            continue
        times = row["recent_event_time_ms"] + row["mid_event_time_ms"]
        assert max(times) == row["newest_event_time_ms"] < label_ms
        items = row["recent_item_id"] + row["mid_item_id"] + row["session_last_items"]
        assert max(items) < PLANTED_ITEM
        assert row["session_last_ms"] < label_ms
        assert row["session_dwell_ms"] < 10**6


@given(users_logs(max_size=25), st.data())
@settings(max_examples=40, deadline=None)
def test_what_arrives_later_changes_no_row(logs: Logs, data: st.DataObject) -> None:
    """Whatever its date: rows of labels that arrived before it stay as they are, value by value."""
    longer = {user: list(events) for user, events in logs.items()}
    for user, events in longer.items():
        for number in range(data.draw(st.integers(0, 3))):
            events.append(planted(data.draw(st.integers(0, 3_000)), 100 * user + number))
    before = {(row["user_id"], row["event_time_ms"]): row for row in rows_at(logs)}
    after = {(row["user_id"], row["event_time_ms"]): row for row in rows_at(longer)}
    assert before.keys() <= after.keys()
    for label, row in before.items():
        grown = after[label]
        assert grown["label_item_id"][: len(row["label_item_id"])] == row["label_item_id"]
        assert grown | {"label_item_id": row["label_item_id"]} == row


def busy_logs(num_users: int, num_events: int) -> Logs:
    """Return users with as many events each, all in order."""
    return {
        10 * user: [
            Accepted(Position(0, 0, n), 10**6 + n, n, 10**6 + n, 1, user * 10**6 + n, 5, 1.0, 1)
            for n in range(num_events)
        ]
        for user in range(1, num_users + 1)
    }


def test_parts_hold_whole_users_and_all_of_them(tmp_path: Path) -> None:
    write_logs(tmp_path, busy_logs(30, 20))
    whole = read_accepted(tmp_path, TOPIC, SMALL)
    parts = list(stream_users(tmp_path, TOPIC, SMALL, memory_bytes=TINY_BYTES, scratch=tmp_path))
    assert len(parts) > 20
    users = [set(part["user_id"].tolist()) for part in parts]
    assert sum(map(len, users)) == len(set.union(*users)) == 30
    joined = {name: np.concatenate([part[name] for part in parts]) for name in whole}
    order = np.argsort(joined["user_id"], kind="stable")
    for name, column in whole.items():
        np.testing.assert_array_equal(joined[name][order], column, err_msg=name)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("moveline-lake-")]


def test_scratch_goes_when_a_reader_stops_early(tmp_path: Path) -> None:
    write_logs(tmp_path, busy_logs(30, 20))
    parts = stream_users(tmp_path, TOPIC, SMALL, memory_bytes=TINY_BYTES, scratch=tmp_path)
    next(parts)
    assert any(path.name.startswith("moveline-lake-") for path in tmp_path.iterdir())
    parts.close()
    assert not any(path.name.startswith("moveline-lake-") for path in tmp_path.iterdir())


# A process of its own: only what the rows need is imported and traced there.
PEAK = """
import sys, tracemalloc
from pathlib import Path
from features.point_in_time import training_rows
from tests.features.strategies import SMALL
from tests.lake.writing import TOPIC
def num_rows():
    tables = training_rows(Path(sys.argv[1]), TOPIC, SMALL, memory_bytes=int(sys.argv[2]))
    return sum(table.num_rows for table in tables)
num_rows()  # what libraries import when they are first used is not counted
tracemalloc.start()
print(num_rows(), tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_lake(tmp_path: Path) -> None:
    """NumPy's allocations are traced. Files hold 1,000 events, so that parts count."""
    peaks = []
    memory_bytes = 400_000
    for num_users in (100, 400):
        root = tmp_path / str(num_users)
        write_logs(root, busy_logs(num_users, 100), file_rows=1_000)
        command = [sys.executable, "-c", PEAK, str(root), str(memory_bytes)]
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
        num_rows, peak = map(int, done.stdout.split())
        peaks.append(peak)
        assert num_rows == num_users * 100
    # Four times the events: 40,000 records alone would be 2 MB, their rows 40 MB.
    assert peaks[1] < 1.5 * peaks[0]
    assert peaks[1] < 4 * memory_bytes


def test_a_log_that_goes_on_in_another_topic_is_read_on(tmp_path: Path) -> None:
    logs = busy_logs(3, 20)
    write_logs(tmp_path / "whole", logs)
    write_logs(tmp_path, {user: events[:8] for user, events in logs.items()})
    write_logs(tmp_path, {user: events[8:] for user, events in logs.items()}, topic=f"{TOPIC}-1")
    split, whole = (
        pa.concat_tables(training_rows(root, TOPIC, SMALL))
        for root in (tmp_path, tmp_path / "whole")
    )
    assert split.num_rows == 60
    assert split.to_pylist() == whole.to_pylist()


def test_only_the_features_asked_for_are_made(tmp_path: Path) -> None:
    write_logs(tmp_path, busy_logs(2, 5))
    names = ["session_id", "recent_item_id"]
    (table,) = training_rows(tmp_path, TOPIC, SMALL, features=names)
    assert table.column_names[-2:] == names
    assert table.schema.field("recent_item_id").type == pa.list_(pa.int64())
    with pytest.raises(SchemaMismatchError, match="no feature 'session_mood'"):
        next(training_rows(tmp_path, TOPIC, SMALL, features=["session_mood"]))


def test_every_feature_of_the_users_views_is_made(tmp_path: Path) -> None:
    write_logs(tmp_path, busy_logs(1, 3))
    (table,) = training_rows(tmp_path, TOPIC, SMALL)
    assert table.column_names[5:] == feature_names(SMALL)
    unknown = Entities(np.array([5]), np.array([10**7]))
    (nothing,) = training_rows(tmp_path, TOPIC, SMALL, entities=unknown)
    # A user of whom nothing is known has columns of the same types.
    assert nothing.drop_columns(["row"]).schema.types == table.schema.types


def test_a_users_feature_that_no_event_gives_is_null(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A view that only a model could fill: no real schema has one that this build knows."""
    foreseen = View(
        "user_mood", "user", 0, "worker", (Feature("mood", "float32", "none", default=None),), ""
    )
    monkeypatch.setattr(point_in_time, "views", lambda config: (*views(config), foreseen))
    write_logs(tmp_path, busy_logs(2, 3))
    (table,) = training_rows(tmp_path, TOPIC, SMALL, features=["mood", "session_id"])
    assert table["mood"].type == pa.float32()
    assert table["mood"].null_count == table.num_rows == 6
    assert "mood" not in feature_names(SMALL)


@pytest.mark.parametrize("damage", ["missing", "truncated"])
def test_a_damaged_lake_is_named(tmp_path: Path, damage: str) -> None:
    write_logs(tmp_path, busy_logs(3, 30))
    path = list_files(tmp_path, TOPIC)[3].path
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(LakeError, match=path.name if damage == "truncated" else "goes from offset"):
        list(training_rows(tmp_path, TOPIC, SMALL))
    with pytest.raises(LakeError, match="run `moveline lake`"):
        list(training_rows(tmp_path / "nowhere", TOPIC, SMALL))


def test_a_session_longer_than_allowed_is_cut_as_the_step_cuts_it() -> None:
    """A click every 8 ms: no gap ever, but a session may span 40."""
    clicks = busy_logs(1, 40)[10]
    events = [msgspec.structs.replace(one, event_time_ms=8 * n) for n, one in enumerate(clicks)]
    for row in rows_at({10: events}):
        expected = expected_row({10: events}, 10, row["event_time_ms"], None)
        assert row | expected == row


def test_an_event_at_the_label_is_not_known_though_it_has_arrived() -> None:
    """An ordinal from a feature log may lie behind it; a late event makes the session a replay."""
    clicks = busy_logs(1, 3)[10]
    times = (1_010, 1_005, 1_012)
    events = [
        msgspec.structs.replace(one, event_time_ms=time_ms)
        for one, time_ms in zip(clicks, times, strict=True)
    ]
    (row,) = rows_at({10: events}, Entities(np.array([10]), np.array([1_012]), np.array([3])))
    assert (row["session_start_ms"], row["session_last_ms"]) == (1_005, 1_010)
    assert row["recent_event_time_ms"] == [1_005, 1_010]
    assert (row["session_id"], row["session_num_events"], row["ordinal"]) == (0, 2, 3)
