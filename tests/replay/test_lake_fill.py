"""Goal: the lake gives the micro-batches that the records themselves would.

Method: seeded rows in a file of the lake's schema, cut into batches of every size; users, order,
domains and offsets against the same rows looked at one by one.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from features.config import StateConfig
from features.events import domain_hash, event_hash
from features.lake import LAKE_SCHEMA, file_name, list_partition, partition_folder
from features.state import NO_DWELL, Accepted, Position
from streams import lake_fill

if TYPE_CHECKING:
    from pathlib import Path

CONFIG = StateConfig()
START_MS = 1_763_700_000_000
PARTITION = 3


def seeded_rows(count: int, actions: tuple[str, ...]) -> list[dict[str, Any]]:
    source = random.Random(count)
    return [
        {
            "offset": 10 + 2 * number,
            "append_time_ms": START_MS + number,
            "user_id": source.choice([0, 1, 5, 2**63 - 1]),
            "item_id": number,
            "action": source.choice(actions),
            "event_time_ms": START_MS + number + source.choice([0, 3_600_000]),
            "event_hash": event_hash(str(number)),
            "event_id": str(number),
            "domain": source.choice([None, "a", "b"]),
            "dwell_ms": source.choice([None, number]),
            "value": 1.5,
            "request_id": None,
            "position": None,
        }
        for number in range(count)
    ]


def write_lake(root: Path, rows: list[dict[str, Any]], end: int) -> None:
    folder = partition_folder(root, "t", PARTITION)
    folder.mkdir(parents=True)
    table = pa.Table.from_pylist(rows, schema=LAKE_SCHEMA)
    pq.write_table(table, folder / file_name(0, end))


def expected_of(rows: list[dict[str, Any]]) -> dict[int, list[Accepted]]:
    by_user: dict[int, list[Accepted]] = {}
    for row in rows:
        ahead_ms = row["event_time_ms"] - row["append_time_ms"]
        if row["action"] in CONFIG.stream_actions and ahead_ms <= CONFIG.future_tolerance_ms:
            accepted = Accepted(
                Position(0, PARTITION, row["offset"]),
                row["append_time_ms"],
                row["item_id"],
                row["event_time_ms"],
                domain_hash(row["domain"]),
                row["event_hash"],
                NO_DWELL if row["dwell_ms"] is None else row["dwell_ms"],
                row["value"],
                CONFIG.actions.index(row["action"]),
            )
            by_user.setdefault(row["user_id"], []).append(accepted)
    return by_user


@pytest.mark.parametrize("batch_rows", [1, 7, 1_000])
@pytest.mark.parametrize("actions", [("click", "view", "impression", "unheard-of"), ("view",)])
def test_batches_are_the_rows_one_by_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch_rows: int, actions: tuple[str, ...]
) -> None:
    rows = seeded_rows(100, actions)
    write_lake(tmp_path, rows, end=250)
    monkeypatch.setattr(lake_fill, "BATCH_ROWS", batch_rows)
    files = list_partition(tmp_path, "t", PARTITION)
    inside = [row for row in rows if 50 <= row["offset"] < 180]
    by_user: dict[int, list[Accepted]] = {}
    domains: dict[int, str] = {}
    batches = list(lake_fill.lake_batches(files, 50, 180, CONFIG))
    for batch in batches:
        domains |= batch.domains
        for user, events in batch.by_user.items():
            by_user.setdefault(user, []).extend(events)
    assert by_user == expected_of(inside)
    assert set(domains.values()) <= {"a", "b"}
    assert sum(batch.num_records for batch in batches) == len(inside)
    assert [batch.ends[PARTITION] for batch in batches] == sorted(
        batch.ends[PARTITION] for batch in batches
    )
    assert batches[-1].ends == {PARTITION: 180}


def test_a_stretch_that_enters_no_stream_is_passed_over(tmp_path: Path) -> None:
    write_lake(tmp_path, seeded_rows(20, ("impression",)), end=60)
    files = list_partition(tmp_path, "t", PARTITION)
    (batch,) = lake_fill.lake_batches(files, 0, 61, CONFIG)
    assert batch.by_user == {}
    assert (batch.num_records, batch.num_outside, batch.ends) == (20, 20, {PARTITION: 61})
