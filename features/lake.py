"""The event log as Parquet: schema, file names, and reading it back in log order.

`streams/lake.py` writes it. One folder per partition; each file's name carries the offsets it
covers, [start, end], and starts where the one before it ended. Files appear by rename, whole or
not at all, and never change. Which of them count, where some were written anew, is said by
`features/lake_manifest.py`.
"""

from __future__ import annotations

import itertools
import os
import re
from dataclasses import dataclass
from itertools import repeat
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from features.config import FORGET_CODE
from features.errors import LakeError
from features.events import domain_hash
from features.lake_manifest import newest_manifest
from features.state import Accepted, Position

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
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
# The fields of features.state.Accepted in their order, its position apart.
_EVENT_COLUMNS: Final = (
    "append_time_ms",
    "item_id",
    "event_time_ms",
    "domain",
    "event_hash",
    "dwell_ms",
    "value",
    "action",
)
Column = np.ndarray[tuple[int], np.dtype[Any]]
# No file crosses a multiple of this, so that small ones can be merged into the same large ones by
# whoever does it, whenever.
BLOCK_OFFSETS: Final = 65_536
# Dictionary columns have 16-bit codes: a row group may not hold more texts than that.
ROW_GROUP_ROWS: Final = 32_768
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


def as_file(partition: int, path: Path) -> LakeFile | None:
    """Return the file at a path, None for a name that is not a published file's."""
    match = _FILE_NAME.match(path.name)
    return LakeFile(partition, int(match[1]), int(match[2]), path) if match else None


def list_files(root: Path, topic: str) -> list[LakeFile]:
    """Return the files that count, by partition and offset.

    Raises:
        LakeError: files of a partition overlap or leave a hole.
    """
    partitions = list_partitions(root, topic)
    return [file for partition in partitions for file in list_partition(root, topic, partition)]


def list_partitions(root: Path, topic: str) -> list[int]:
    """Return the partitions that have a folder, ascending."""
    return sorted(int(folder.name.split("=")[1]) for folder in (root / topic).glob("partition=*"))


def list_partition(root: Path, topic: str, partition: int) -> list[LakeFile]:
    """Return one partition's files that count, by offset; none if its folder is not there.

    Who holds this list may read on while a newer revision appears: its files stay for a while.

    Raises:
        LakeError: files overlap or leave a hole, or the manifest cannot be read.
    """
    folder = partition_folder(root, topic, partition)
    paths = list(folder.iterdir()) if folder.is_dir() else []
    manifest = newest_manifest(folder, [path.name for path in paths])
    listed = manifest.files if manifest else ()
    files = [LakeFile(partition, one.start, one.end, folder / one.path) for one in listed]
    unlisted = (file for path in paths if (file := as_file(partition, path)))
    files += sorted(file for file in unlisted if manifest is None or file.start > manifest.end)
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
        raise _unreadable(file, error) from error


def num_rows(file: LakeFile) -> int:
    """Return how many events a file holds, without reading them.

    Raises:
        LakeError: the file is missing or truncated.
    """
    try:
        return int(pq.read_metadata(file.path).num_rows)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: LakeFile, error: Exception) -> LakeError:
    return LakeError(
        f"{file.path} cannot be read ({error}): restore it, or delete it and every later "
        "file of its partition and let `moveline lake` write them again."
    )


def write_file(path: Path, table: pa.Table) -> None:
    """The events lie at the path, durably; the name becomes visible by the caller's rename."""
    # Dictionaries are made anew, so that no text stays whose events are left out.
    arrays = [_encoded(table[name], LAKE_SCHEMA.field(name).type) for name in LAKE_SCHEMA.names]
    table = pa.Table.from_arrays(arrays, schema=LAKE_SCHEMA)
    with path.open("wb") as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        file.flush()
        os.fsync(file.fileno())


def _encoded(column: pa.ChunkedArray, kind: pa.DataType) -> pa.ChunkedArray:
    """Return the column as the lake has it; a dictionary serves one row group (ROW_GROUP_ROWS)."""
    if not pa.types.is_dictionary(kind):
        return column.cast(kind)
    texts = column.cast(pa.string()).combine_chunks()
    chunks = [
        texts.slice(at, ROW_GROUP_ROWS).dictionary_encode().cast(kind)
        for at in range(0, len(texts), ROW_GROUP_ROWS)
    ]
    return pa.chunked_array(chunks, kind)


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
    return accept_columns(columns, config)


def accept_columns(columns: dict[str, Column], config: StateConfig) -> dict[str, Column]:
    """Return the accepted ones among judged events, sorted by (user, arrival) and numbered.

    Args:
        columns: as `judged_columns` gives them, in log order; whole users.
        config: the generation's rules.
    """
    # Stable: files come in log order, and a user lives in one partition of each topic.
    order = np.argsort(columns["user_id"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    keep, columns["ordinal"] = _number(columns, config.dedup_window)
    return {name: columns[name][keep] for name in TRAINING_COLUMNS}


def judged_columns(table: pa.Table, config: StateConfig) -> tuple[dict[str, Column], Column]:
    """Return the columns of the events a generation's rules take, and which rows those are."""
    codes = config.codes
    action = _codes(table["action"], codes)
    ahead = table["event_time_ms"].to_numpy() - table["append_time_ms"].to_numpy()
    keep = np.isin(action, [codes[name] for name in config.entering])
    keep &= (ahead <= config.future_tolerance_ms) | (action == FORGET_CODE)
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


def places_of(table: pa.Table, keep: Column) -> dict[str, Column]:
    """Return where the rows kept stood in their partition, and when they were appended."""
    return {name: table[name].to_numpy()[keep] for name in ("offset", "append_time_ms")}


def to_events(columns: Mapping[str, Column], place: tuple[int, int]) -> list[Accepted]:
    """Return the events in `judged_columns` and `places_of` as the step takes them.

    Args:
        columns: both together.
        place: source and partition of all of them.
    """
    source, partition = place
    positions = map(Position, repeat(source), repeat(partition), columns["offset"].tolist())
    return list(map(Accepted, positions, *(columns[name].tolist() for name in _EVENT_COLUMNS)))


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


def _number(columns: dict[str, Column], window: int) -> tuple[Column, Column]:
    """Return which events count and every event's ordinal, given each user's in log order.

    An event is dropped if its hash is among the last `window` *accepted* of its user, or if the
    user was forgotten after it. Only users who repeat a hash or were forgotten at all need the
    event-by-event look; the rest is decided by one sort.
    """
    users, hashes = columns["user_id"], columns["event_hash"]
    keep, ordinals = np.ones(users.size, bool), _count_within(users)
    order = np.lexsort((hashes, users))
    same = (users[order][1:] == users[order][:-1]) & (hashes[order][1:] == hashes[order][:-1])
    forgotten = users[columns["action"] == FORGET_CODE]
    for user in np.union1d(users[order][1:][same], forgotten):
        # Not `user + 1`: the largest id has no successor in 64 bits.
        start, end = np.searchsorted(users, user, "left"), np.searchsorted(users, user, "right")
        mine = {name: column[start:end] for name, column in columns.items()}
        keep[start:end], ordinals[start:end] = number_one(mine, window)
    return keep, ordinals


def number_one(columns: dict[str, Column], window: int) -> tuple[list[bool], list[int]]:
    """Return the same for the events of one user, one by one."""
    keep: list[bool] = []
    ordinals: list[int] = []
    last_ordinal: dict[int, int] = {}
    ordinal = 0
    fields = (columns[name].tolist() for name in ("event_hash", "action", "item_id"))
    for event_hash, action, item_id in zip(*fields, strict=True):
        ordinals.append(ordinal)
        if action == FORGET_CODE:
            keep = [False] * len(ordinals)
            last_ordinal = {}
            ordinal = max(ordinal, item_id)
            continue
        seen = last_ordinal.get(event_hash)
        keep.append(seen is None or ordinal - seen > window)
        if keep[-1]:
            last_ordinal[event_hash] = ordinal
            ordinal += 1
    return keep, ordinals


def _count_within(users: Column) -> Column:
    """Return 0, 1, 2, ... within each run of equal users."""
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    lengths = np.diff(np.r_[starts, users.size])
    return np.arange(users.size) - np.repeat(starts, lengths)
