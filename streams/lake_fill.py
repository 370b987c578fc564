"""The event log on disk as micro-batches: what Kafka no longer has, and replays from the lake."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Final

import numpy as np

from features import lake
from features.events import domain_hash
from streams.errors import LogHoleError
from streams.micro_batch import MicroBatch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    import pyarrow as pa

    from features.config import StateConfig
    from features.state import Accepted
    from streams.effects import Effects

# Rows of a file turned into events at once: what is in memory, about 40 MB. The more there are, the
# more of them share the one write of their user and of their bucket: an event costs 6 us of CPU, in
# batches of 10,000 it costs 10.
BATCH_ROWS: Final = 100_000


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
    columns |= lake.places_of(rows, keep)
    texts = rows["domain"].unique().to_pylist()
    batch.domains = {domain_hash(text): text for text in texts if text is not None}
    # Stable: each user's events stay in offset order.
    order = np.argsort(columns["user_id"], kind="stable")
    columns = {name: column[order] for name, column in columns.items()}
    batch.by_user = _by_user(columns["user_id"], lake.to_events(columns, place))
    return batch


def _by_user(users: lake.Column, events: list[Accepted]) -> dict[int, list[Accepted]]:
    """Return the events of each user; both arguments are sorted by user."""
    # No id is -1, so these are all edges between users; none where there are no events.
    edges = np.flatnonzero(np.diff(users, prepend=-1, append=-1)).tolist()
    spans = [events[start:end] for start, end in pairwise(edges)]
    return dict(zip(users[edges[:-1]].tolist(), spans, strict=True))
