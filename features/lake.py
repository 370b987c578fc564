"""The event log as Parquet: schema, file names, and reading it back in log order.

`streams/lake.py` writes it. One folder per partition; each file's name carries the offsets it
covers, [start, end], and starts where the one before it ended, so the names alone say what the
lake holds. Files appear by rename or hard link, whole or not at all.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.errors import LakeError
from features.events import domain_hash

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from features.config import StateConfig

# Every event whose ranges are right (features.events.judge_ranges), as it was sent, and where it
# stood. Rules that belong to a generation (actions, future) are applied by the reader.
LAKE_SCHEMA: Final = pa.schema(
    [
        pa.field("offset", pa.int64(), nullable=False),
        pa.field("append_time_ms", pa.int64(), nullable=False),
        pa.field("user_id", pa.int64(), nullable=False),
        pa.field("item_id", pa.int64(), nullable=False),
        pa.field("action", pa.dictionary(pa.int32(), pa.string()), nullable=False),
        pa.field("event_time_ms", pa.int64(), nullable=False),
        pa.field("event_hash", pa.uint64(), nullable=False),
        pa.field("event_id", pa.string(), nullable=False),
        pa.field("domain", pa.dictionary(pa.int32(), pa.string())),
        pa.field("dwell_ms", pa.int32()),
        pa.field("value", pa.float32()),
        pa.field("request_id", pa.string()),
        pa.field("position", pa.int32()),
    ]
)
Column = np.ndarray[tuple[int], np.dtype[Any]]
_FILE_NAME: Final = re.compile(r"^(\d{20})-(\d{20})\.parquet$")


@dataclass(frozen=True, order=True)
class LakeFile:
    """One published file: partition and the offsets [start, end] it covers."""

    partition: int
    start: int
    end: int
    path: Path


def partition_folder(root: Path, topic: str, partition: int) -> Path:
    """Return where a partition's files lie."""
    return root / topic / f"partition={partition}"


def file_name(start: int, end: int) -> str:
    """Return the name of the file that covers the offsets [start, end].

    >>> file_name(0, 41)
    '00000000000000000000-00000000000000000041.parquet'
    """
    return f"{start:020d}-{end:020d}.parquet"


def log_topics(root: Path, topic: str) -> list[str]:
    """Return the log's topics that the lake has, oldest first: `topic`, `topic-1`, ...

    A user's events in one of them come before those in the next: `moveline repartition` saw to it.
    """
    later = itertools.takewhile(
        lambda name: (root / name).is_dir(), (f"{topic}-{number}" for number in itertools.count(1))
    )
    return [topic, *later]


def list_files(root: Path, topic: str) -> list[LakeFile]:
    """Return the published files by partition and offset.

    Raises:
        LakeError: files of a partition overlap or leave a hole.
    """
    folders = (root / topic).glob("partition=*")
    partitions = sorted(int(folder.name.split("=")[1]) for folder in folders)
    return [file for partition in partitions for file in list_partition(root, topic, partition)]


def list_partition(root: Path, topic: str, partition: int) -> list[LakeFile]:
    """Return one partition's published files by offset; none if its folder is not there.

    Raises:
        LakeError: files overlap or leave a hole.
    """
    folder = partition_folder(root, topic, partition)
    paths = folder.iterdir() if folder.is_dir() else ()
    matches = ((path, _FILE_NAME.match(path.name)) for path in paths)
    files = sorted(
        LakeFile(partition, int(match[1]), int(match[2]), path) for path, match in matches if match
    )
    for before, after in itertools.pairwise(files):
        if after.start != before.end + 1:
            raise LakeError(
                f"partition {partition} goes from offset {before.end} ({before.path}) to "
                f"{after.start} ({after.path}): restore the missing file, or rebuild the lake "
                "with `moveline lake`."
            )
    return files


def next_offset(root: Path, topic: str, partition: int) -> int | None:
    """Return the offset the next file starts at, None for an empty partition."""
    files = list_partition(root, topic, partition)
    return files[-1].end + 1 if files else None


def read_file(file: LakeFile) -> pa.Table:
    """Return a file's events in offset order.

    Raises:
        LakeError: the file is missing, truncated or of another schema.
    """
    try:
        return pq.read_table(file.path, schema=LAKE_SCHEMA, partitioning=None)
    except (pa.ArrowException, OSError) as error:
        raise LakeError(
            f"{file.path} cannot be read ({error}): restore it, or delete it and every later "
            "file of its partition and let `moveline lake` write them again."
        ) from error


def read_events(root: Path, topic: str) -> Iterator[tuple[LakeFile, pa.Table]]:
    """Yield every file and its events, by partition and offset; one file in memory at a time.

    Raises:
        LakeError: nothing there, a hole, or an unreadable file.
    """
    files = list_files(root, topic)
    if not files:
        raise LakeError(f"no event log under {root / topic}: run `moveline lake` first.")
    for file in files:
        yield file, read_file(file)


# What a model learns from: the columns of a state RECORD, and whose they are.
TRAINING_COLUMNS: Final = (
    "user_id",
    "item_id",
    "event_time_ms",
    "ordinal",
    "action",
    "domain",
    "dwell_ms",
    "value",
)


def read_accepted(root: Path, topic: str, config: StateConfig) -> dict[str, Column]:
    """Return the accepted events of every user as columns, sorted by (user, arrival).

    `topic` is the log's first one; those that follow it are read too (`log_topics`). The same
    events as in the users' states: judged by the generation's rules, repeats within the duplicate
    window dropped, numbered by `ordinal`.

    Raises:
        LakeError: see `read_events`.
    """
    parts = [
        judged_columns(table, config)[0]
        for name in log_topics(root, topic)
        for _, table in read_events(root, name)
    ]
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    # Stable: files come in log order, and a user lives in one partition of each topic.
    order = np.argsort(columns["user_id"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    keep = keep_first(columns["user_id"], columns["event_hash"], config.dedup_window)
    columns = {name: column[keep] for name, column in columns.items()}
    columns["ordinal"] = _count_within(columns["user_id"])
    return {name: columns[name] for name in TRAINING_COLUMNS}


def judged_columns(table: pa.Table, config: StateConfig) -> tuple[dict[str, Column], Column]:
    """Return the columns of the events a generation's rules take, and which rows those are."""
    action = _codes(table["action"], {name: i for i, name in enumerate(config.actions)})
    streamed = np.array([name in config.stream_actions for name in config.actions])
    ahead = table["event_time_ms"].to_numpy() - table["append_time_ms"].to_numpy()
    keep = (action >= 0) & streamed[action] & (ahead <= config.future_tolerance_ms)
    columns = {
        "user_id": table["user_id"].to_numpy(),
        "item_id": table["item_id"].to_numpy(),
        "event_time_ms": table["event_time_ms"].to_numpy(),
        "event_hash": table["event_hash"].to_numpy(),
        "action": action.astype(np.uint8),
        "domain": _domain_hashes(table["domain"]),
        "dwell_ms": table["dwell_ms"].fill_null(-1).to_numpy(),
        "value": table["value"].fill_null(float("nan")).to_numpy(),
    }
    return {name: column[keep] for name, column in columns.items()}, keep


def _codes(column: pa.ChunkedArray, code_of: dict[str, int]) -> Column:
    """Return each dictionary-encoded text's code, -1 for one that has none."""
    unified = column.unify_dictionaries().combine_chunks()
    unified = unified.chunk(0) if isinstance(unified, pa.ChunkedArray) else unified
    codes = np.array([code_of.get(text, -1) for text in unified.dictionary.to_pylist()], np.int64)
    coded: Column = codes[unified.indices.to_numpy(zero_copy_only=False)]
    return coded


def _domain_hashes(column: pa.ChunkedArray) -> Column:
    unified = column.unify_dictionaries().combine_chunks()
    unified = unified.chunk(0) if isinstance(unified, pa.ChunkedArray) else unified
    texts = unified.dictionary.to_pylist()
    hashes = np.array([*(domain_hash(text) for text in texts), 0], np.uint64)
    # A null index becomes -1 and picks the last entry: no domain.
    hashed: Column = hashes[unified.indices.fill_null(-1).to_numpy(zero_copy_only=False)]
    return hashed


def keep_first(
    users: Column,
    hashes: Column,
    window: int,
) -> Column:
    """Return which events count, given users grouped and each user's events in log order.

    An event is dropped if its hash is among the last `window` *accepted* of its user. Only users
    who repeat a hash at all need the event-by-event look; the rest is decided by one sort.
    """
    keep = np.ones(users.size, bool)
    order = np.lexsort((hashes, users))
    same = (users[order][1:] == users[order][:-1]) & (hashes[order][1:] == hashes[order][:-1])
    for user in np.unique(users[order][1:][same]):
        # Not `user + 1`: the largest id has no successor in 64 bits.
        start, end = np.searchsorted(users, user, "left"), np.searchsorted(users, user, "right")
        last_ordinal: dict[int, int] = {}
        ordinal = 0
        for i in range(start, end):
            seen = last_ordinal.get(int(hashes[i]))
            if seen is not None and ordinal - seen <= window:
                keep[i] = False
                continue
            last_ordinal[int(hashes[i])] = ordinal
            ordinal += 1
    return keep


def _count_within(users: Column) -> Column:
    """Return 0, 1, 2, ... within each run of equal users."""
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    lengths = np.diff(np.r_[starts, users.size])
    return np.arange(users.size) - np.repeat(starts, lengths)
