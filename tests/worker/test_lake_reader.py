"""`read_accepted` gives the events of the states: small files written by hand, and the oracle."""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.errors import LakeError
from features.events import ID_MAX, domain_hash, event_hash
from features.lake import LAKE_SCHEMA, file_name, list_files, partition_folder, read_accepted
from features.oracle import accept
from features.state import Accepted, Position
from tests.small import SMALL

if TYPE_CHECKING:
    from pathlib import Path

TOPIC = "t.events"
NOW_MS = 1_763_700_000_000
USERS = {0: [1, 2, 3], 1: [ID_MAX, 10**12]}
CODES = {action: code for code, action in enumerate(SMALL.actions)}


def make_rows(source: random.Random, partition: int, count: int) -> list[dict[str, Any]]:
    """Return a partition's log: repeats, late events, other generations' actions, holes."""
    rows: list[dict[str, Any]] = []
    offset = 0
    for _ in range(count):
        offset += source.choice([1, 1, 1, 3])
        event_id = f"{partition}-{source.randrange(count // 3)}"
        rows.append(
            {
                "offset": offset,
                "append_time_ms": NOW_MS + offset,
                "user_id": source.choice(USERS[partition]),
                "item_id": source.randrange(20),
                "action": source.choice([*SMALL.actions, "teleport"]),
                "event_time_ms": NOW_MS + source.choice([0, offset, 400_000]),
                "event_hash": event_hash(event_id),
                "event_id": event_id,
                "domain": source.choice([None, "home", "search"]),
                "dwell_ms": source.choice([None, 0, 900]),
                "value": source.choice([None, 0.0, 2.5]),
                "request_id": None,
                "position": None,
            }
        )
    return rows


def write_file(root: Path, partition: int, start: int, end: int, rows: list[Any]) -> Path:
    folder = partition_folder(root, TOPIC, partition)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / file_name(start, end)
    pq.write_table(pa.Table.from_pylist(rows, schema=LAKE_SCHEMA), path)
    return path


def write_lake(root: Path, rows: dict[int, list[dict[str, Any]]], num_files: int = 4) -> None:
    """Cut every partition into files at seeded offsets; one file in each holds no event."""
    for partition, log in rows.items():
        last = log[-1]["offset"]
        edges = [last * i // num_files for i in range(num_files)] + [last + 1, last + 5]
        for start, stop in itertools.pairwise(edges):
            inside = [row for row in log if start <= row["offset"] < stop]
            write_file(root, partition, start, stop - 1, inside)


def accepted_by_user(rows: dict[int, list[dict[str, Any]]]) -> dict[int, list[Accepted]]:
    """Return each user's valid streamed events, judged here by hand."""
    by_user: dict[int, list[Accepted]] = defaultdict(list)
    for partition, log in rows.items():
        for row in log:
            ahead_ms = row["event_time_ms"] - row["append_time_ms"]
            if row["action"] in SMALL.stream_actions and ahead_ms <= SMALL.future_tolerance_ms:
                by_user[row["user_id"]].append(
                    Accepted(
                        Position(0, partition, row["offset"]),
                        row["append_time_ms"],
                        row["item_id"],
                        row["event_time_ms"],
                        domain_hash(row["domain"]),
                        row["event_hash"],
                        -1 if row["dwell_ms"] is None else row["dwell_ms"],
                        float("nan") if row["value"] is None else row["value"],
                        CODES[row["action"]],
                    )
                )
    return by_user


@pytest.mark.parametrize("seed", range(5))
def test_columns_equal_the_oracle(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    rows = {partition: make_rows(source, partition, 200) for partition in USERS}
    write_lake(tmp_path, rows)
    columns = read_accepted(tmp_path, TOPIC, SMALL)
    expected = {user: accept(log, SMALL) for user, log in accepted_by_user(rows).items()}
    assert any(len(accept_) < 200 for accept_ in expected.values())
    assert sorted(set(columns["user_id"].tolist())) == sorted(expected)
    assert np.all(np.diff(columns["user_id"]) >= 0)
    for user, numbered in expected.items():
        mine = columns["user_id"] == user
        assert columns["ordinal"][mine].tolist() == [one.ordinal for one in numbered]
        for name in ("item_id", "event_time_ms", "action", "domain", "dwell_ms"):
            wanted = [getattr(one.event, name) for one in numbered]
            assert columns[name][mine].tolist() == wanted, name
        values = [one.event.value for one in numbered]
        np.testing.assert_array_equal(columns["value"][mine], np.array(values, np.float32))


@pytest.fixture
def lake(tmp_path: Path) -> Path:
    """A lake of two partitions and ten files."""
    source = random.Random(9)
    write_lake(tmp_path, {partition: make_rows(source, partition, 60) for partition in USERS})
    return tmp_path


def test_an_absent_lake_is_named(tmp_path: Path) -> None:
    with pytest.raises(LakeError, match="run `moveline lake`"):
        read_accepted(tmp_path, TOPIC, SMALL)


def test_a_hole_is_named(lake: Path) -> None:
    missing = list_files(lake, TOPIC)[1].path
    missing.unlink()
    with pytest.raises(LakeError, match=r"partition 0 goes from offset \d+ .* to \d+"):
        read_accepted(lake, TOPIC, SMALL)


def test_an_overlap_is_named(lake: Path) -> None:
    first = list_files(lake, TOPIC)[0]
    write_file(lake, 0, first.end, first.end, [])
    with pytest.raises(LakeError, match="partition 0"):
        read_accepted(lake, TOPIC, SMALL)


@pytest.mark.parametrize("keep", [0, 3, 0.5, 0.99])
def test_a_truncated_file_is_named(lake: Path, keep: float) -> None:
    path = list_files(lake, TOPIC)[2].path
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content)) if keep < 1 else int(keep)])
    with pytest.raises(LakeError, match=path.name):
        read_accepted(lake, TOPIC, SMALL)


def test_a_file_of_another_schema_is_named(lake: Path) -> None:
    path = list_files(lake, TOPIC)[2].path
    pq.write_table(pa.table({"offset": ["a"], "user_id": [True]}), path)
    with pytest.raises(LakeError, match=path.name):
        read_accepted(lake, TOPIC, SMALL)


def test_leftovers_of_a_crashed_writer_are_not_read(lake: Path) -> None:
    before = read_accepted(lake, TOPIC, SMALL)
    (partition_folder(lake, TOPIC, 0) / ".draft-1.parquet").write_bytes(b"half")
    after = read_accepted(lake, TOPIC, SMALL)
    for name, column in before.items():
        np.testing.assert_array_equal(column, after[name])
