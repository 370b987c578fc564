"""How fast, and in how much memory, does a training set come out of the lake?

Workload: a year of grocery shopping (complete_journey, all 1,469,307 lines of 2,469 households) as
a lake of four partitions. A row is a household at the time of a basket, with what was known before.

- whole: every row there is, all features (session, 64 recent and 448 mid-term events).
- same: every row (ROWS_MEASURED draws as many, by seed), with what an as-of join can do too: the
  newest event's item, time and value, and how many events there were. Feast's file store (Dask)
  gets a table that says so for every basket; that it has to be made first does not count.
- through_feast: the same rows from our offline store through Feast's API.

Each runs in a process of its own; its peak memory is the kernel's (VmHWM), imports included, while
rows/s begin after imports and `apply`. Both sides' values are compared. Not measured: writing the
set to disk, reading a lake that is not in the page cache. `--record` keeps the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import CONSOLE, TOPICS
from compose.figures import report
from compose.groceries import load_groceries
from features.config import StateConfig
from features.events import event_hash
from features.keys import buckets_of
from features.lake import BLOCK_OFFSETS, LAKE_SCHEMA, file_name, partition_folder, write_file
from features.point_in_time import Entities, training_rows
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from compose.groceries import Groceries

    Task = Callable[[], tuple[int, pa.Table | None]]

LINES: Final = int(os.environ.get("LINES_MEASURED", "1469307"))
ROWS: Final = int(os.environ.get("ROWS_MEASURED", "1000000"))
NUM_PARTITIONS: Final = 4
_NOW_MS: Final = 1_763_700_000_000
_SEED: Final = 1
_CONFIG: Final = StateConfig()
# Both sides' answer to the same question.
SAME: Final = ["events", "newest_ms", "newest_item", "newest_value"]


def write_lake(groceries: Groceries, root: Path) -> None:
    """The transaction lines lie in the lake, in time order, as the sink would have written them."""
    table = groceries.table
    users = table["household_id"].to_numpy()
    partition_of = buckets_of(users) % NUM_PARTITIONS
    with progress_bar("lake", total=table.num_rows) as advance:
        for partition in range(NUM_PARTITIONS):
            own = table.filter(partition_of == partition)
            folder = partition_folder(root, TOPICS.events, partition)
            folder.mkdir(parents=True)
            for start in range(0, own.num_rows, BLOCK_OFFSETS):
                rows = own.slice(start, BLOCK_OFFSETS)
                name = file_name(start, start + rows.num_rows - 1)
                write_file(folder / name, _events(rows, start, groceries.prefix))
                advance(rows.num_rows)


def _events(rows: pa.Table, start: int, prefix: str) -> pa.Table:
    size = rows.num_rows
    event_ids = [f"{prefix}:{row}" for row in rows["row"].to_pylist()]
    columns = {
        "offset": np.arange(start, start + size),
        "append_time_ms": rows["time_ms"],
        "user_id": rows["household_id"],
        "item_id": rows["product_id"],
        "action": pa.array(["purchase"] * size),
        "event_time_ms": rows["time_ms"],
        "event_hash": np.array([event_hash(one) for one in event_ids], np.uint64),
        "event_id": pa.array(event_ids),
        "domain": rows["department"],
        "dwell_ms": pa.nulls(size, pa.int32()),
        "value": rows["sales_value"].cast(pa.float32()),
        "request_id": pa.nulls(size, pa.string()),
        "position": pa.nulls(size, pa.int32()),
    }
    return pa.table([columns[name] for name in LAKE_SCHEMA.names], names=LAKE_SCHEMA.names)


def write_frame(groceries: Groceries, path: Path) -> None:
    """The rows to make, in no order, lie at the path."""
    columns = ("household_id", "time_ms")
    user, time_ms = (groceries.table[name].to_numpy() for name in columns)
    labels = np.unique(np.stack((user, time_ms), axis=1), axis=0)
    chosen = np.random.default_rng(_SEED).permutation(len(labels))[:ROWS]
    user_id, at_ms = labels[chosen].T
    pq.write_table(pa.table({"user_id": user_id, "time_ms": at_ms}), path)


def write_newest(groceries: Groceries, path: Path) -> None:
    """What Feast's file store joins with: after each of a household's times, its newest event."""
    frame = groceries.table.select(
        ["household_id", "time_ms", "product_id", "sales_value"]
    ).to_pandas()
    frame["events"] = frame.groupby("household_id").cumcount() + 1
    newest = frame.groupby(["household_id", "time_ms"], as_index=False).last()
    made = pd.DataFrame(
        {
            "user_id": newest["household_id"],
            "event_timestamp": pd.to_datetime(newest["time_ms"], unit="ms", utc=True),
            "events": newest["events"],
            "newest_ms": newest["time_ms"],
            "newest_item": newest["product_id"],
            "newest_value": newest["sales_value"].astype(np.float32),
        }
    )
    pq.write_table(pa.Table.from_pandas(made, preserve_index=False), path)


# What the processes measure. Each gets ready and returns what is timed: that gives the number of
# rows and what is compared of them.


def whole(folder: Path) -> Task:
    """Make every row with all features."""

    def run() -> tuple[int, None]:
        tables = training_rows(folder / "lake", TOPICS.events, _CONFIG)
        return sum(table.num_rows for table in tables), None

    return run


def same(folder: Path) -> Task:
    """Make the rows with what an as-of join can do too."""
    return lambda: _same(folder)


def _same(folder: Path) -> tuple[int, pa.Table]:
    frame = pq.read_table(folder / "frame.parquet")
    entities = Entities(frame["user_id"].to_numpy(), frame["time_ms"].to_numpy())
    tables = training_rows(
        folder / "lake",
        TOPICS.events,
        _CONFIG,
        entities=entities,
        features=["recent_item_id", "recent_value"],
    )
    found = pa.concat_tables(tables).sort_by("row")
    return found.num_rows, pa.table(
        {
            "events": found["ordinal"],
            "newest_ms": found["newest_event_time_ms"],
            "newest_item": _last(found["recent_item_id"]),
            "newest_value": _last(found["recent_value"]),
        }
    )


def _last(lists: pa.ChunkedArray) -> pa.Array:
    """Return the last element of each list, null without one."""
    column = lists.combine_chunks()
    ends = np.asarray(column.offsets)[1:]
    has = np.diff(np.asarray(column.offsets)) > 0
    return column.flatten().take(pa.array(ends - 1 - int(column.offsets[0].as_py()), mask=~has))


def through_feast(folder: Path) -> Task:
    """Make the rows from our offline store, through Feast's API."""
    from features.definitions import apply, open_store  # noqa: PLC0415 - only this process pays

    store = open_store(redis_url="redis://127.0.0.1:1/0", registry=folder / "ours.db")
    apply(store, config=_CONFIG, lake=folder / "lake", topic=TOPICS.events)
    refs = ["user_recent:recent_item_id", "user_recent:recent_value"]
    frame = _feast_frame(folder, before_ms=0)

    def run() -> tuple[int, None]:
        return store.get_historical_features(frame, refs).to_arrow().num_rows, None

    return run


def stock_feast(folder: Path) -> Task:
    """Make the rows with Feast's file store, from a table that has every answer."""
    from feast import (  # noqa: PLC0415 - only this process pays
        Entity,
        FeatureStore,
        FeatureView,
        Field,
        FileSource,
        RepoConfig,
        ValueType,
    )
    from feast.types import Float32, Int64  # noqa: PLC0415 - likewise

    config = RepoConfig(
        project="stock",
        provider="local",
        registry=str(folder / "stock.db"),
        online_store={"type": "sqlite", "path": str(folder / "online.db")},
        offline_store={"type": "dask"},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / "newest.parquet"), timestamp_field="event_timestamp")
    kinds = dict.fromkeys(SAME, Int64) | {"newest_value": Float32}
    view = FeatureView(
        name="newest",
        entities=[user],
        schema=[Field(name=name, dtype=kind) for name, kind in kinds.items()],
        source=source,
    )
    store.apply([user, view])
    # Feast knows an event at the very time of a row; a training row must not.
    frame = _feast_frame(folder, before_ms=1)
    refs = [f"newest:{name}" for name in SAME]

    def run() -> tuple[int, pa.Table]:
        found = store.get_historical_features(frame, refs).to_df()
        # Rows without any event before them do not come back.
        found = found.set_index("row").reindex(frame["row"])
        return len(found), pa.table({name: found[name].to_numpy() for name in SAME})

    return run


def _feast_frame(folder: Path, *, before_ms: int) -> pd.DataFrame:
    frame = pq.read_table(folder / "frame.parquet").to_pandas()
    time = pd.to_datetime(frame["time_ms"] - before_ms, unit="ms", utc=True)
    return pd.DataFrame(
        {"user_id": frame["user_id"], "event_timestamp": time, "row": np.arange(len(frame))}
    )


TASKS: Final[dict[str, Callable[[Path], Task]]] = {
    "whole": whole,
    "same": same,
    "through_feast": through_feast,
    "stock_feast": stock_feast,
}


def child(name: str, folder: Path) -> None:
    """Do one task in this process and print what it took as JSON."""
    run = TASKS[name](folder)
    started = time.perf_counter()
    num_rows, answer = run()
    seconds = time.perf_counter() - started
    if answer is not None:
        pq.write_table(answer, folder / f"{name}.parquet")
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(
        json.dumps({"rows": num_rows, "seconds": seconds, "peak_mb": int(peak.split()[1]) / 1024})
    )


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Return what a task took in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.bench_pit", name, str(folder)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    found["rows_per_s"] = round(found["rows"] / found["seconds"])
    CONSOLE.print(f"{name}: {found}")
    return found


def num_mismatches(folder: Path) -> int:
    """Return how many values the two sides do not agree on."""
    ours, theirs = (pq.read_table(folder / f"{name}.parquet") for name in ("same", "stock_feast"))
    count = 0
    for name in SAME:
        mine, other = (
            np.nan_to_num(side[name].to_pandas().to_numpy(np.float64), nan=-1)
            for side in (ours, theirs)
        )
        # Feast has no row before a household's first event; ours counts none.
        count += int(np.count_nonzero(np.maximum(mine, 0) != np.maximum(other, 0)))
    return count


def main() -> None:
    """Write the lake, measure every task, report."""
    with tempfile.TemporaryDirectory(prefix="moveline-bench-") as name:
        folder = Path(name)
        groceries = load_groceries(num_lines_min=LINES, seed=_SEED, now_ms=_NOW_MS)
        write_lake(groceries, folder / "lake")
        write_frame(groceries, folder / "frame.parquet")
        write_newest(groceries, folder / "newest.parquet")
        del groceries
        taken = {task: measure(task, folder) for task in TASKS}
        mismatches = num_mismatches(folder)
    report(
        "bench-pit",
        {
            "rows_per_s": taken["same"]["rows_per_s"],
            "peak_mb": round(taken["same"]["peak_mb"]),
            "feast_rows_per_s": taken["stock_feast"]["rows_per_s"],
            "feast_peak_mb": round(taken["stock_feast"]["peak_mb"]),
            "rows": taken["same"]["rows"],
            "mismatches": mismatches,
            "through_feast_rows_per_s": taken["through_feast"]["rows_per_s"],
            "through_feast_peak_mb": round(taken["through_feast"]["peak_mb"]),
            "whole_rows": taken["whole"]["rows"],
            "whole_rows_per_s": taken["whole"]["rows_per_s"],
            "whole_peak_mb": round(taken["whole"]["peak_mb"]),
        },
        command="make bench-pit",
        caveats={"events": f"{LINES:,}"},
        keep="--record" in sys.argv,
    )


if __name__ == "__main__":
    if len(sys.argv) == 3:  # noqa: PLR2004 - a task and a folder
        child(sys.argv[1], Path(sys.argv[2]))
    else:
        main()
