"""What came soon after which item in a stretch of the log. Pure.

An event follows the items of the user's few events before it. These stand in the stretch or in the
user's row; a row may be ahead of the stretch (the worker is faster than the near-line app), so the
event is looked up in it first. Where a row has gone so far ahead that the events before are no
longer among those read, nothing follows them: a pair may be missed while the app catches up, and
none is counted twice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.followers import Followers
from features.nearline import HOUR_MS, TILE_HOURS_MAX
from features.sources import NUM_STEPS

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from features.state import Accepted
    from features.view import Records

# Newest records of a user that are looked at for what came before a stretch.
RECORDS_READ: Final = 16


class Pair(NamedTuple):
    """An item that followed another one, by so many steps, in an hour since 1970."""

    item_id: int
    after: int
    step: int
    hour: int


class _Met(NamedTuple):
    """An event in the order in which a user's events are told."""

    time_ms: int
    ordinal: int
    item_id: int
    is_new: bool


def pairs_of(events: Sequence[Accepted], known: Records) -> list[Pair]:
    """Return what one user's events of a stretch followed.

    Args:
        events: of the user, in the order of the log; forgets and repeats do not follow anything.
        known: newest records of the user's row, in the order of the row, these events among them or
            not.
    """
    rows = known[["event_time_ms", "ordinal", "item_id", "event_hash"]].tolist()
    met = {row[3]: _Met(row[0], row[1], row[2], is_new=False) for row in rows}
    beyond = max((one.ordinal for one in met.values()), default=-1) + 1
    told: set[int] = set()
    for place, event in enumerate(events):
        if event.is_forget or event.event_hash in told or _is_old(event):
            continue
        told.add(event.event_hash)
        held = met.get(event.event_hash)
        ordinal = beyond + place if held is None else held.ordinal
        met[event.event_hash] = _Met(event.event_time_ms, ordinal, event.item_id, is_new=True)
    return _followed(sorted(met.values()))


def _is_old(event: Accepted) -> bool:
    """Return whether it came too late for every window, as for tiles."""
    hour, now = event.event_time_ms // HOUR_MS, event.append_time_ms // HOUR_MS
    return hour <= now - TILE_HOURS_MAX


def _followed(met: Sequence[_Met]) -> list[Pair]:
    return [
        Pair(met[place - step].item_id, one.item_id, step, one.time_ms // HOUR_MS)
        for place, one in enumerate(met)
        if one.is_new
        for step in range(1, min(NUM_STEPS, place) + 1)
    ]


def counts_of(pairs: Iterable[Pair], half_life_h: int) -> dict[int, Followers]:
    """Return what followed each item, a pair of step s weighing 1 / s in its hour.

    Args:
        pairs: in any order.
        half_life_h: hours in which the weight of what followed halves.
    """
    by_item: dict[int, list[Pair]] = {}
    for pair in pairs:
        by_item.setdefault(pair.item_id, []).append(pair)
    return {item_id: _summed(followed, half_life_h) for item_id, followed in by_item.items()}


def _summed(followed: Sequence[Pair], half_life_h: int) -> Followers:
    hour = max(pair.hour for pair in followed)
    weights = [0.5 ** ((hour - pair.hour) / half_life_h) / pair.step for pair in followed]
    items, inverse = np.unique([pair.after for pair in followed], return_inverse=True)
    weight = np.bincount(inverse, weights, minlength=len(items)).astype(np.float64)
    return Followers(hour, float(sum(weights)), items.astype(np.int64), weight)
