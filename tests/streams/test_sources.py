"""Reading events and items from files.

Goal: the same rows give the same events whatever the format, a bad cell is named by file, row and
column, and a file read twice gives the same event_ids.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import sys
from typing import TYPE_CHECKING

import msgspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.catalogue import Item
from features.events import TIME_MS_MAX, Event, stable_id
from streams.columns import ColumnMapping, field_converters, parse_mapping
from streams.errors import MappingError
from streams.sources import count_rows, read_events, read_items

if TYPE_CHECKING:
    from pathlib import Path

ROWS = [
    {
        "household": 7,
        "product": "sku-1",
        "when": "2025-11-21T10:00:00.123Z",
        "paid": 1.5,
        "spot": 3,
    },
    {"household": 8, "product": "19", "when": "2025-11-21T11:00:00+01:00", "paid": None, "spot": 0},
    {"household": 9, "product": 'ä,"b"', "when": "2025-11-21", "paid": 0.0, "spot": None},
]
MAPPING = parse_mapping(
    ["user_id=household", "item_id=product", "event_time_ms=when", "value=paid", "position=spot"],
    ["action=purchase", "domain=shop"],
    time_unit="iso",
)
TEN_MS = 1_763_719_200_000  # 2025-11-21T10:00:00Z


def write(folder: Path, kind: str, rows: list[dict[str, object]]) -> Path:
    """Write the rows in one of the formats."""
    path = folder / f"rows.{kind}"
    table = pa.Table.from_pylist(rows)
    if kind == "csv":
        pa_csv.write_csv(table, path)
    elif kind == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_every_format_gives_the_same_events(tmp_path: Path, kind: str) -> None:
    path = write(tmp_path, kind, ROWS)
    prefix = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    same = {"action": "purchase", "domain": "shop"}
    expected = [
        Event(
            event_id=f"{prefix}:1",
            user_id=7,
            item_id=stable_id("sku-1"),
            event_time_ms=TEN_MS + 123,
            value=1.5,
            position=3,
            **same,
        ),
        Event(
            event_id=f"{prefix}:2", user_id=8, item_id=19, event_time_ms=TEN_MS, position=0, **same
        ),
        Event(
            event_id=f"{prefix}:3",
            user_id=9,
            item_id=stable_id('ä,"b"'),
            event_time_ms=TEN_MS - 36_000_000,
            value=0.0,
            **same,
        ),
    ]
    assert list(read_events(path, mapping=MAPPING)) == expected
    assert list(read_events(path, mapping=MAPPING)) == expected


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_standard_input_is_read_like_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = write(tmp_path, kind, ROWS)
    with path.open(encoding="utf-8") as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        events = list(read_events("-", mapping=MAPPING, file_format=kind))
        assert not stdin.closed
    from_file = list(read_events(path, mapping=MAPPING))
    assert [event.item_id for event in events] == [event.item_id for event in from_file]
    assert [event.event_id.split(":")[1] for event in events] == ["1", "2", "3"]
    assert events[0].event_id != from_file[0].event_id


def test_columns_named_like_fields_need_no_mapping(tmp_path: Path) -> None:
    row = {"event_id": "a", "user_id": 1, "item_id": 2, "action": "view", "event_time_ms": 5}
    path = write(tmp_path, "csv", [row])
    assert list(read_events(path)) == [msgspec.convert(row, Event)]


def test_a_parquet_file_larger_than_a_batch_is_read_in_order(tmp_path: Path) -> None:
    path = tmp_path / "many.parquet"
    numbers = pa.array(range(40_000))
    table = pa.table({"user_id": numbers, "item_id": numbers, "event_time_ms": numbers})
    pq.write_table(table, path)
    assert count_rows(path) == 40_000
    events = read_events(path, mapping=ColumnMapping(constants={"action": "click"}))
    assert [event.user_id for event in events] == list(range(40_000))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("user_id,item_id,action,event_time_ms\n1,2,view,soon\n", r"row 1, column 'event_time_ms'"),
        (
            "user_id,item_id,action,event_time_ms\n1,2,view,5\n1,,view,5\n",
            r"row 2.*item_id is empty",
        ),
        ("user_id,item_id,action,event_time_ms\n1,2,view\n", r"row 1: 3 cells, the header has 4"),
        ("user_id,item_id,action\n1,2,view\n", r"no column 'event_time_ms'.*--map event_time_ms="),
        (
            "user_id,item_id,action,event_time_ms,position\n1,2,view,5,1.5\n",
            r"'1\.5' is not a whole",
        ),
        (
            "user_id,item_id,action,event_time_ms,dwell_ms\n1,2,view,5,-1\n",
            r"'-1' is outside 0\.\.",
        ),
        ("user_id,item_id,action,event_time_ms,value\n1,2,view,5,nan\n", r"not a finite number"),
        ("user_id,item_id,action,event_time_ms,value\n1,2,view,5,1e39\n", r"'1e39' is outside"),
        ("", r"is empty"),
        ('user_id,item_id,action,event_time_ms\n1,2,"view,5\n', r"cannot be read as csv"),
    ],
)
def test_bad_csv_is_named(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(MappingError, match=words) as caught:
        list(read_events(path))
    assert "bad.csv" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"user_id": 1', "row 2"),
        (b"[1]", "row 2"),
        (b'{"user_id": [1], "item_id": 2, "action": "a", "event_time_ms": 5}', "'user_id'"),
        (b'{"user_id": true, "item_id": 2, "action": "a", "event_time_ms": 5}', "not a number"),
        (b'{"item_id": 2, "action": "a", "event_time_ms": 5}', "user_id is empty"),
        (b'"' + b"x" * 1_100_000, "longer than"),
        (b"\xff", "row 2"),
    ],
)
def test_bad_json_is_named(tmp_path: Path, line: bytes, words: str) -> None:
    good = b'{"user_id": 1, "item_id": 2, "action": "a", "event_time_ms": 5}\n'
    path = tmp_path / "bad.jsonl"
    path.write_bytes(good + b"\n" + line + b"\n")
    events = read_events(path)
    assert next(events).user_id == 1
    with pytest.raises(MappingError, match=words):
        next(events)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("no parquet")
    (tmp_path / "rows.xls").write_text("")
    (tmp_path / "latin.csv").write_bytes(b"user_id\n\xe4\n")
    for name, words in {
        "absent.csv": "No such file",
        "text.parquet": "cannot be read as parquet",
        "rows.xls": "--format",
        "latin.csv": "cannot be read as csv",
    }.items():
        mapping = ColumnMapping(constants={"item_id": "1", "action": "a", "event_time_ms": "1"})
        with pytest.raises(MappingError, match=words):
            list(read_events(tmp_path / name, mapping=mapping))
    with pytest.raises(MappingError, match="give a file"):
        list(read_events("-", file_format="parquet"))


@pytest.mark.parametrize(
    ("maps", "constants", "unit", "words"),
    [
        (["user_id"], [], "ms", "--map 'user_id'"),
        (["user_id=a", "user_id=b"], [], "ms", "twice"),
        (["user_id=a"], ["user_id=1"], "ms", "both"),
        ([], [], "minutes", "--time-unit 'minutes'"),
    ],
)
def test_bad_options_are_named(
    maps: list[str], constants: list[str], unit: str, words: str
) -> None:
    with pytest.raises(MappingError, match=words):
        parse_mapping(maps, constants, time_unit=unit)


def test_unknown_fields_and_bad_constants_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "csv", ROWS)
    with pytest.raises(MappingError, match="'user' is not a field"):
        list(read_events(path, mapping=parse_mapping(["user=household"])))
    constants = ["action=a", "item_id=1", "event_time_ms=soon"]
    with pytest.raises(MappingError, match="--const event_time_ms=soon"):
        list(read_events(path, mapping=parse_mapping(["user_id=household"], constants)))


@given(time_ms=st.integers(0, TIME_MS_MAX))
def test_times_lose_nothing_in_any_unit(time_ms: int) -> None:
    moment = dt.datetime(1970, 1, 1, tzinfo=dt.UTC) + dt.timedelta(milliseconds=time_ms)
    convert = {unit: field_converters(unit)["event_time_ms"] for unit in ("s", "ms", "iso")}
    assert convert["ms"](str(time_ms)) == time_ms
    assert convert["s"](f"{time_ms // 1000}.{time_ms % 1000:03d}") == time_ms
    assert convert["iso"](moment.isoformat()) == time_ms
    assert {unit: converter(moment) for unit, converter in convert.items()} == dict.fromkeys(
        convert, time_ms
    )


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_items_are_read(tmp_path: Path, kind: str) -> None:
    rows: list[dict[str, object]] = [
        {
            "sku": "A-1",
            "brand": "Own",
            "title": "milk",
            "dept": "DAIRY",
            "type": "MILK|FRESH",
            "on": True,
        },
        {
            "sku": "12",
            "brand": None,
            "title": "Rye bread",
            "dept": None,
            "type": "BREAD",
            "on": False,
        },
    ]
    mapping = parse_mapping(
        ["item_id=sku", "name=brand+title", "categories=dept+type", "available=on"]
    )
    assert list(read_items(write(tmp_path, kind, rows), mapping=mapping)) == [
        Item(
            item_id=stable_id("A-1"),
            name="Own milk",
            categories=("DAIRY", "MILK", "FRESH"),
            original_id="A-1",
        ),
        Item(item_id=12, name="Rye bread", categories=("BREAD",), available=False),
    ]


def test_a_bad_item_is_named(tmp_path: Path) -> None:
    path = tmp_path / "items.csv"
    path.write_text("item_id,name,available\n1,a,maybe\n", encoding="utf-8")
    with pytest.raises(MappingError, match=r"row 1, column 'available'.*'maybe'"):
        list(read_items(path))
    path.write_text(f"item_id,name\n1,{'x' * 600}\n", encoding="utf-8")
    with pytest.raises(MappingError, match="600 characters, at most 512"):
        list(read_items(path))
    path.write_text("item_id,name\n1,\n", encoding="utf-8")
    with pytest.raises(MappingError, match=r"row 1, column 'name' \(name\): it is empty"):
        list(read_items(path))
