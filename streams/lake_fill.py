"""The event log on disk as micro-batches: what Kafka no longer has, and replays from the lake."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from features import lake
from features.events import domain_hash
from features.state import Accepted, Position
from streams.errors import LogHoleError
from streams.micro_batch import MicroBatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa

    from features.config import StateConfig
    from streams.effects import Effects

# Rows of a file turned into events at once: what is in memory.
BATCH_ROWS: Final = 10_000


def fill_from_lake(
    effects: Effects, root: Path | None, place: tuple[str, int], *, start: int, low: int
) -> int:
    """Apply the offsets [start, low) of a partition from the lake; return where Kafka goes on.

    Raises:
        LogHoleError: the lake does not have them all.
    """
    topic, partition = place
    files = lake.list_partition(root, topic, partition) if root is not None else []
    held = files[-1].end + 1 if files and files[0].start <= start else start
    if held < low:
        raise LogHoleError(topic, partition, lake_end=held, low=low)
    processor = effects.processor
    for batch in lake_batches(files, start, low, processor.config, processor.source):
        effects.apply_batch(batch)
    return low


def lake_batches(
    files: list[lake.LakeFile], start: int, stop: int, config: StateConfig, source: int = 0
) -> Iterator[MicroBatch]:
    """Yield the accepted events of offsets [start, stop) of one partition, in order.

    The generation's rules judge them as they judge records; what breaks the ranges never got into
    the lake.
    """
    for file in files:
        if file.end < start or file.start >= stop:
            continue
        table = lake.read_file(file)
        offsets = table["offset"].to_numpy()
        first, last = np.searchsorted(offsets, [start, stop])
        for at in range(first, last, BATCH_ROWS):
            rows = table.slice(at, min(BATCH_ROWS, last - at))
            batch = _to_batch(rows, (source, file.partition), config)
            is_end = at + BATCH_ROWS >= last
            # A file also covers offsets that held no event.
            batch.ends = {file.partition: min(stop, file.end + 1) if is_end else _next(rows)}
            yield batch


def _next(rows: pa.Table) -> int:
    return int(rows["offset"][-1].as_py()) + 1


def _to_batch(rows: pa.Table, place: tuple[int, int], config: StateConfig) -> MicroBatch:
    batch = MicroBatch(num_records=rows.num_rows)
    columns, keep = lake.judged_columns(rows, config)
    batch.num_outside = int(rows.num_rows - keep.sum())
    names = ("offset", "append_time_ms")
    columns |= {name: rows[name].to_numpy()[keep] for name in names}
    texts = [text for text in rows["domain"].to_pylist() if text is not None]
    batch.domains = {domain_hash(text): text for text in set(texts)}
    for row in zip(*(columns[name].tolist() for name in _FIELDS), strict=True):
        event = _to_event(row, place)
        batch.by_user.setdefault(row[0], []).append(event)
    return batch


_FIELDS: Final = (
    "user_id",
    "offset",
    "append_time_ms",
    "item_id",
    "event_time_ms",
    "domain",
    "event_hash",
    "dwell_ms",
    "value",
    "action",
)


def _to_event(row: tuple[Any, ...], place: tuple[int, int]) -> Accepted:
    _, offset, *rest = row
    return Accepted(Position(*place, offset), *rest)
