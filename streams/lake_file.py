"""One partition's part of the lake: events wait in memory, then become a file, whole or not at all.

Crash after step n of `Partition.publish` -> what is seen -> how it heals:
1 lock taken        -> nothing; the kernel frees the lock  -> the next sink goes on
2 pending file      -> a file no reader looks at           -> the next publication overwrites it
3 renamed           -> the file, whole                     -> the next sink starts after it
"""

from __future__ import annotations

import fcntl
import os
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from features.events import event_hash
from features.lake import LAKE_SCHEMA, file_name, next_offset, partition_folder
from streams.columns import POSITION_MAX
from streams.errors import LakeBusyError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from features.events import Event

# No file crosses a multiple of this, so that the small files of a live sink can later be merged
# into the same large ones by whoever does it.
BLOCK_OFFSETS: Final = 65_536
# Dictionary columns have 16-bit codes: a row group may not hold more texts than that.
ROW_GROUP_ROWS: Final = 32_768
# A writer holds the lock for one file, a fraction of a second. A longer wait means it is stuck.
LOCK_TIMEOUT_S: Final = 30.0
_LOCK_RETRY_S: Final = 0.01
# Names that features.lake does not take for published files.
LOCK_NAME: Final = ".lock"
PENDING_NAME: Final = ".pending"


class LakeRow(NamedTuple):
    """An event, where it stands and when the broker appended it."""

    offset: int
    append_time_ms: int
    event: Event


@dataclass
class Partition:
    """What one partition's next file will hold: the offsets [start, next) and their events.

    Offsets without an event (refused ones, transaction markers) are covered all the same.
    """

    root: Path
    topic: str
    number: int
    start: int
    next: int
    opened_s: float = 0.0
    rows: list[LakeRow] = field(default_factory=list)

    @property
    def folder(self) -> Path:
        """Where the files lie."""
        return partition_folder(self.root, self.topic, self.number)

    @property
    def block_end(self) -> int:
        """The first offset that may not be in the same file as `start`."""
        return (self.start // BLOCK_OFFSETS + 1) * BLOCK_OFFSETS

    def publish(self, end: int) -> int:
        """The lake covers every offset before `end`; return how many events were written.

        Another sink may have written some or all of it meanwhile: that part is dropped here.
        """
        num_written = 0
        with locked(self.folder):
            done = next_offset(self.root, self.topic, self.number)
            if done is not None and done > self.start:
                self._forget_before(done)
            while self.start < end:
                stop = min(end, self.block_end)
                rows = [row for row in self.rows if row.offset < stop]
                _write(self.folder, self.start, stop - 1, to_table(rows))
                num_written += len(rows)
                self._forget_before(stop)
        return num_written

    def _forget_before(self, offset: int) -> None:
        self.rows = [row for row in self.rows if row.offset >= offset]
        self.start = offset
        self.next = max(self.next, offset)


def to_table(rows: list[LakeRow]) -> pa.Table:
    """Return the rows as the lake's columns."""
    events = [row.event for row in rows]
    columns: dict[str, list[object]] = {
        "offset": [row.offset for row in rows],
        "append_time_ms": [row.append_time_ms for row in rows],
        "user_id": [event.user_id for event in events],
        "item_id": [event.item_id for event in events],
        "action": [event.action for event in events],
        "event_time_ms": [event.event_time_ms for event in events],
        "event_hash": [event_hash(event.event_id) for event in events],
        "event_id": [event.event_id for event in events],
        "domain": [event.domain for event in events],
        "dwell_ms": [event.dwell_ms for event in events],
        "value": [event.value for event in events],
        "request_id": [event.request_id for event in events],
        "position": [_position(event.position) for event in events],
    }
    # Dictionaries are made by the cast of plain text, 32-bit first: see ROW_GROUP_ROWS.
    arrays = [_column(columns[name], LAKE_SCHEMA.field(name).type) for name in LAKE_SCHEMA.names]
    return pa.Table.from_arrays(arrays, schema=LAKE_SCHEMA)


def remove_pending(folder: Path) -> None:
    """No half-written file is left in the folder."""
    with locked(folder):
        (folder / PENDING_NAME).unlink(missing_ok=True)


@contextmanager
def locked(folder: Path, *, timeout_s: float = LOCK_TIMEOUT_S) -> Iterator[None]:
    """Hold the folder alone; a dead holder's lock is free at once, the kernel sees to it.

    Raises:
        LakeBusyError: somebody has held it for `timeout_s`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK_NAME).open("ab") as file:
        deadline = time.monotonic() + timeout_s
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise LakeBusyError(
                    f"{folder} has been locked by another sink for {timeout_s:g} s. Find it with "
                    f"`fuser {folder / LOCK_NAME}` and end it, or wait."
                )
            time.sleep(_LOCK_RETRY_S)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _write(folder: Path, start: int, end: int, table: pa.Table) -> None:
    """The file of the offsets [start, end] exists, durably. The folder's lock is held."""
    pending = folder / PENDING_NAME
    with pending.open("wb") as file:
        pq.write_table(table, file, row_group_size=ROW_GROUP_ROWS, compression="zstd")
        file.flush()
        os.fsync(file.fileno())
    pending.rename(folder / file_name(start, end))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _column(values: list[object], kind: pa.DataType) -> pa.ChunkedArray:
    if not pa.types.is_dictionary(kind):
        return pa.chunked_array([pa.array(values, kind)], kind)
    chunks = [
        pa.array(values[i : i + ROW_GROUP_ROWS], pa.string()).dictionary_encode().cast(kind)
        for i in range(0, len(values), ROW_GROUP_ROWS)
    ]
    return pa.chunked_array(chunks, kind)


def _position(position: int | None) -> int | None:
    """Return the position if the lake's 32 bits hold it: no odd number may stop the sink."""
    return position if position is not None and 0 <= position <= POSITION_MAX else None
