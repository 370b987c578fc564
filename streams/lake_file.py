"""One partition's part of the lake: events wait in memory, then become a file, whole or not at all.

Crash after step n of `Partition.publish` -> what is seen -> how it heals:
1 lock taken        -> nothing; the kernel frees the lock  -> the next sink goes on
2 pending file      -> a file no reader looks at           -> the next publication overwrites it
3 renamed           -> the file, whole                     -> the next sink starts after it
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import pyarrow as pa

from features.events import event_hash
from features.lake import (
    BLOCK_OFFSETS,
    LAKE_SCHEMA,
    file_name,
    next_offset,
    partition_folder,
    write_file,
)
from features.lake_lock import locked
from streams.columns import POSITION_MAX

if TYPE_CHECKING:
    from pathlib import Path

    from features.events import Event

# A name that features.lake does not take for a published file.
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
    # Dictionaries are made when the file is written: plain text until then.
    kinds = {name: LAKE_SCHEMA.field(name).type for name in LAKE_SCHEMA.names}
    arrays = [
        pa.array(columns[name], pa.string() if pa.types.is_dictionary(kind) else kind)
        for name, kind in kinds.items()
    ]
    return pa.table(arrays, names=LAKE_SCHEMA.names)


def remove_pending(folder: Path) -> None:
    """No half-written file is left in the folder."""
    with locked(folder):
        (folder / PENDING_NAME).unlink(missing_ok=True)


def _write(folder: Path, start: int, end: int, table: pa.Table) -> None:
    """The file of the offsets [start, end] exists, durably. The folder's lock is held."""
    pending = folder / PENDING_NAME
    write_file(pending, table)
    pending.rename(folder / file_name(start, end))
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _position(position: int | None) -> int | None:
    """Return the position if the lake's 32 bits hold it: no odd number may stop the sink."""
    return position if position is not None and 0 <= position <= POSITION_MAX else None
