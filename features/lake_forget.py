"""A user's events before a forget leave the lake; the forget stays and says how many there were."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from features.errors import LakeError
from features.lake import judged_columns, number_one, read_file
from features.lake_revisions import Replacement, count_user, rewrite

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from features.config import StateConfig
    from features.lake import LakeFile
    from features.lake_manifest import Manifest
    from features.lake_revisions import Place


def forget_user(
    place: Place, user_id: int, *, at: int, config: StateConfig, now_ms: int, num_before: int = 0
) -> Manifest | None:
    """No file that counts holds an event of the user before offset `at`, where the forget stands.

    The forget's `item_id` becomes the ordinal that the user goes on from, so that a state built
    from this lake goes on where one built from the whole log does. Doing it again changes nothing.

    Args:
        place: the user's partition.
        user_id: who is forgotten.
        at: the offset of the forget.
        config: rules under which ordinals are counted: the live generation's.
        now_ms: kept in the manifest.
        num_before: ordinals used up before this partition's first event.

    Returns:
        The new revision, or None if there was nothing to take out.

    Raises:
        LakeError: the lake does not reach the forget yet, has a hole, or cannot be read.
        LakeBusyError: another rewrite is under way.
    """
    if not any(file.start <= at <= file.end for file in place.files()):
        raise LakeError(
            f"the lake does not have offset {at} of {place.topic}[{place.partition}] yet: let "
            "`moveline lake` catch up and run the command again."
        )

    def plan(files: Sequence[LakeFile]) -> Iterator[Replacement]:
        mine = [file for file in files if file.start <= at and count_user(file.path, user_id)]
        ordinal = max(num_before, _ordinal_at(mine, user_id, at, config))
        for file in mine:
            events = read_file(file)
            after = _without(events, user_id, at, ordinal)
            if not after.equals(events):
                yield Replacement((file,), after)

    return rewrite(place, plan, reason="forget", now_ms=now_ms)


def count_earlier(place: Place, user_id: int, *, at: int) -> int:
    """Return how many events of the user before an offset the files that count hold.

    Raises:
        LakeError: a hole, or a file cannot be read.
    """
    total = 0
    for file in place.files():
        if file.start < at and count_user(file.path, user_id):
            events = read_file(file)
            goes = pc.and_(pc.equal(events["user_id"], user_id), pc.less(events["offset"], at))
            total += pc.sum(goes).as_py() or 0
    return total


def _ordinal_at(files: Sequence[LakeFile], user_id: int, at: int, config: StateConfig) -> int:
    """Return the ordinal that the user's events go on from after the forget at an offset."""
    parts = []
    for file in files:
        events = read_file(file)
        is_mine = pc.and_(pc.equal(events["user_id"], user_id), pc.less_equal(events["offset"], at))
        parts.append(judged_columns(events.filter(is_mine), config)[0])
    columns = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    _, ordinals = number_one(columns, config.dedup_window)
    return max(ordinals[-1], int(columns["item_id"][-1]))


def _without(events: pa.Table, user_id: int, at: int, ordinal: int) -> pa.Table:
    is_mine = pc.equal(events["user_id"], user_id)
    goes = pc.and_(is_mine, pc.less(events["offset"], at))
    items = pc.if_else(
        pc.equal(events["offset"], at), pa.scalar(ordinal, pa.int64()), events["item_id"]
    )
    place = events.schema.get_field_index("item_id")
    marked = events.set_column(place, events.schema.field(place), items)
    return marked.filter(pc.invert(goes))
