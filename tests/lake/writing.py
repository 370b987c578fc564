"""Events written into a lake by the sink's own writer, and read back as plain rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from features.events import Event
from features.lake import next_offset, read_file
from features.lake_revisions import Replacement, places, rewrite
from streams.lake_file import LakeRow, Partition

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from features.lake import LakeFile
    from features.lake_manifest import Manifest
    from features.lake_revisions import Place

TOPIC = "t.events"
START_MS = 1_763_700_000_000


def event(offset: int, user_id: int, **fields: Any) -> Event:  # noqa: ANN401 - any field of it
    """Return an event that its offset makes different from the others."""
    return Event(
        **{
            "event_id": f"e-{offset}",
            "user_id": user_id,
            "item_id": 100 + offset,
            "action": "click",
            "event_time_ms": START_MS + offset,
            "domain": f"d-{user_id}",
            **fields,
        }
    )


def append(place: Place, events: Iterable[Event | None]) -> None:
    """One more file of the sink: an offset each, None for one without an event."""
    start = next_offset(place.root, place.topic, place.partition) or 0
    rows = list(enumerate(events, start))
    end = start + len(rows)
    kept = [LakeRow(offset, START_MS + offset, one) for offset, one in rows if one]
    Partition(place.root, place.topic, place.partition, start, end, rows=kept).publish(end)


def rows_of(files: Iterable[LakeFile]) -> list[tuple[int, int, str]]:
    """Return (offset, user, event id) of everything in the files."""
    return [
        (row["offset"], row["user_id"], row["event_id"])
        for file in files
        for row in read_file(file).to_pylist()
    ]


def drop_user(root: Path, user_id: int, *, now_ms: int) -> list[Manifest]:
    """Rewrite every file that holds an event of a user without them; return the revisions."""

    def plan(files: Iterable[LakeFile]) -> Iterator[Replacement]:
        for file in files:
            events = read_file(file)
            kept = events.filter(pc.not_equal(events["user_id"], user_id))
            if kept.num_rows < events.num_rows:
                yield Replacement((file,), kept)

    made = (rewrite(one, plan, reason="test", now_ms=now_ms) for one in places(root, TOPIC))
    return [manifest for manifest in made if manifest]
