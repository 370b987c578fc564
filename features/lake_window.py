"""The newest days of the lake: from which offset to which, and the events in between.

Days are counted by append time, which never goes back within a partition. So a window is a stretch
of offsets in each, and only the files that hold it are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from features import lake
from features.errors import LakeError
from features.generations import start_field

if TYPE_CHECKING:
    from pathlib import Path

    from features.config import StateConfig
    from features.lake import Column, LakeFile


@dataclass(frozen=True)
class LakeWindow:
    """First and last offset by `PARTITION` (of the log's first topic) or `SOURCE:PARTITION`."""

    first: dict[str, int]
    last: dict[str, int]


def lake_extent(root: Path, topic: str) -> dict[str, tuple[int, int]]:
    """Return the first and the next offset of each partition; file names say it.

    Raises:
        LakeError: files of a partition overlap or leave a hole.
    """
    return {field: (files[0].start, files[-1].end + 1) for field, files in _files(root, topic)}


def newest_window(root: Path, topic: str, *, window_ms: int) -> LakeWindow:
    """Return what was appended within `window_ms` of the newest event.

    Raises:
        LakeError: a hole, or an unreadable file.
    """
    partitions = _files(root, topic)
    newest_ms = max((_newest_ms(files) for _, files in partitions), default=0)
    first, last = {}, {}
    for field, files in partitions:
        begin = _first_since(files, newest_ms - window_ms)
        if begin is not None:
            first[field], last[field] = begin, files[-1].end
    return LakeWindow(first, last)


def read_window(
    root: Path, topic: str, config: StateConfig, window: LakeWindow
) -> dict[str, Column]:
    """Return the window's accepted events, as `features.lake.read_accepted` has those of a lake.

    Ordinals count from the window's beginning.

    Raises:
        LakeError: the window holds nothing, or a file is gone or unreadable.
    """
    parts = [
        lake.judged_columns(_inside(file, window.first[field], window.last[field]), config)[0]
        for field, files in _files(root, topic)
        if field in window.first
        for file in files
        if file.end >= window.first[field] and file.start <= window.last[field]
    ]
    if not parts:
        raise LakeError(
            f"the lake under {root / topic} has none of the window {window.first} to "
            f"{window.last}: look at it with `moveline status`."
        )
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return lake.accept_columns(columns, config)


def _files(root: Path, topic: str) -> list[tuple[str, list[LakeFile]]]:
    """Return each partition that has files, the log's oldest topic first."""
    found = []
    for source, name in enumerate(lake.log_topics(root, topic)):
        for partition in lake.list_partitions(root, name):
            files = lake.list_partition(root, name, partition)
            if files:
                found.append((start_field(source, partition), files))
    return found


def _inside(file: LakeFile, first: int, last: int) -> pa.Table:
    table = lake.read_file(file)
    if file.start >= first and file.end <= last:
        return table
    offset = table["offset"]
    return table.filter(pc.and_(pc.greater_equal(offset, first), pc.less_equal(offset, last)))


def _newest_ms(files: list[LakeFile]) -> int:
    """Return the newest append time; 0 where no file has an event."""
    spans = (_append_span(file) for file in reversed(files))
    return next((span[1] for span in spans if span), 0)


def _first_since(files: list[LakeFile], oldest_ms: int) -> int | None:
    """Return the first offset appended at that time or later; None if there is none."""
    begin = None
    for file in reversed(files):
        span = _append_span(file)
        if span is None:
            continue
        if span[1] < oldest_ms:
            break
        if span[0] < oldest_ms:
            table = lake.read_file(file)
            recent = table.filter(pc.greater_equal(table["append_time_ms"], oldest_ms))
            return int(recent["offset"][0].as_py())
        begin = file.start
    return begin


def _append_span(file: LakeFile) -> tuple[int, int] | None:
    """Return a file's oldest and newest append time, from its footer; None without events."""
    if not lake.num_rows(file):
        return None
    metadata = pq.read_metadata(file.path)
    at = metadata.schema.names.index("append_time_ms")
    found = [metadata.row_group(n).column(at).statistics for n in range(metadata.num_row_groups)]
    return min(one.min for one in found), max(one.max for one in found)
