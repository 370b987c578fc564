"""The lake by user, in bounded memory: each part holds some users and all their accepted events.

Files lie in log order, so a user's events are spread over all of them. One pass cuts every file
by buckets into scratch files of fixed-width records; then one scratch file after another is read,
sorted and numbered. A lake that fits needs no scratch.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final

import numpy as np

from features.errors import LakeError
from features.keys import NUM_BUCKETS, buckets_of
from features.lake import (
    accept_columns,
    judged_columns,
    list_files,
    log_topics,
    num_rows,
    read_file,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from features.config import StateConfig
    from features.lake import Column, LakeFile

# What a part may take while it is sorted; beside it, one file of the lake (65,536 events) is held.
MEMORY_BYTES: Final = 256 * 2**20
# A record, and the copies made of it by sorting and selecting, at their peak.
_WORK_BYTES: Final = 250
_SCRATCH: Final = np.dtype(
    [
        ("user_id", "<i8"),
        ("item_id", "<i8"),
        ("event_time_ms", "<i8"),
        ("event_hash", "<u8"),
        ("domain", "<u8"),
        ("dwell_ms", "<i4"),
        ("value", "<f4"),
        ("action", "<u1"),
    ]
)


def stream_users(
    root: Path,
    topic: str,
    config: StateConfig,
    *,
    users: Column | None = None,
    memory_bytes: int = MEMORY_BYTES,
    scratch: Path | None = None,
) -> Iterator[dict[str, Column]]:
    """Yield every user's accepted events once, as `features.lake.read_accepted` has them.

    A part is sorted by (user, arrival). Parts are cut by bucket, so that `memory_bytes` is kept to
    unless a single bucket, a thousandth of all users, is larger.

    Args:
        root: the lake's folder.
        topic: the log's first one; those that follow it are read too.
        config: the generation's rules.
        users: ids of those wanted; all if left out.
        memory_bytes: of one part, working copies included.
        scratch: where the records wait on disk, 49 bytes an event; the system's place for
            temporary files if left out. Empty again at the end.

    Raises:
        LakeError: nothing there, a hole, or a file is missing, truncated or of another schema.
    """
    files = [file for name in log_topics(root, topic) for file in list_files(root, name)]
    if not files:
        raise LakeError(f"no event log under {root / topic}: run `moveline lake` first.")
    num_parts = _num_parts(sum(num_rows(file) for file in files), memory_bytes)
    if num_parts == 1:
        records = np.concatenate([_records(file, config, users) for file in files])
        yield from _accepted(records, config)
        return
    with TemporaryDirectory(prefix="moveline-lake-", dir=scratch) as folder:
        paths = [Path(folder) / str(part) for part in range(num_parts)]
        for file in files:
            _scatter(_records(file, config, users), paths)
        for path in paths:
            if path.exists():
                yield from _accepted(np.fromfile(path, _SCRATCH), config)
                path.unlink()


def _num_parts(num_events: int, memory_bytes: int) -> int:
    """Return how many parts keep one within the memory, if users are spread evenly."""
    return min(NUM_BUCKETS, max(1, -(-num_events * _WORK_BYTES // memory_bytes)))


def _records(file: LakeFile, config: StateConfig, users: Column | None) -> Column:
    """Return the judged events of a file, packed, in log order."""
    columns, _ = judged_columns(read_file(file), config)
    records = np.empty(columns["user_id"].size, _SCRATCH)
    for name in _SCRATCH.names or ():
        records[name] = columns[name]
    return records if users is None else records[np.isin(records["user_id"], users)]


def _scatter(records: Column, paths: Sequence[Path]) -> None:
    """Each record is at the end of its part's file, in log order."""
    part = buckets_of(records["user_id"]) * len(paths) // NUM_BUCKETS
    order = np.argsort(part, kind="stable")
    ends = np.searchsorted(part[order], np.arange(len(paths) + 1))
    for path, (start, end) in zip(paths, itertools.pairwise(ends), strict=True):
        if end > start:
            with path.open("ab") as file:
                records[order[start:end]].tofile(file)


def _accepted(records: Column, config: StateConfig) -> Iterator[dict[str, Column]]:
    if records.size:
        columns = accept_columns({name: records[name] for name in _SCRATCH.names or ()}, config)
        # Who was forgotten and has done nothing since has no event.
        if columns["user_id"].size:
            yield columns
