"""What live sources say of the users of a batch, as the model takes it."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.errors import FeatureError
from features.followers import NO_LIST, FollowerList, read_lists
from features.sources import NUM_COUNTED, SOURCES, Counted
from features.view import PADDING_ITEM

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.redis import Trending
    from features.redis_client import RedisClient

log = logging.getLogger("moveline.recommend")

# What follows an item is asked for again after this long: no later than what is trending.
LIST_AGE_MAX_S: Final = 1.0
# Items whose list is kept in memory, 1.2 KB each; with more of them all are asked for again.
LISTS_HELD_MAX: Final = 20_000
_POPULARITY: Final = SOURCES.index("recent_popularity")
_FOLLOWERS: Final = SOURCES.index("co_occurrence")


class _Held(NamedTuple):
    read_at_s: float
    found: FollowerList


@dataclass
class FollowerCache:
    """Lists of what follows items, read at most once a second each.

    What is not held costs one round trip for all users of a batch together. Threads may read the
    same list at once; the later one stays.
    """

    client: RedisClient
    held: dict[int, _Held] = field(default_factory=dict)

    def lists(self, item_ids: Sequence[int]) -> list[FollowerList]:
        """Return the list of each item; an empty one of PADDING_ITEM, and while Redis is away."""
        held, now_s = self.held, time.monotonic()
        wanted = {item_id for item_id in item_ids if item_id != PADDING_ITEM}
        due = [one for one in wanted if not _is_fresh(held.get(one), now_s)]
        if due:
            if len(held) + len(due) > LISTS_HELD_MAX:
                self.held = held = {}
                due = list(wanted)
            try:
                found = read_lists(self.client, due)
            except FeatureError as error:
                log.warning("what follows items was not read: %s", error)
                found = []
            held.update((one, _Held(now_s, got)) for one, got in zip(due, found, strict=False))
        return [held[one].found if one in held else NO_LIST for one in item_ids]


def _is_fresh(held: _Held | None, now_s: float) -> bool:
    return held is not None and now_s - held.read_at_s < LIST_AGE_MAX_S


def counted_for(trending: Trending, lists: Sequence[FollowerList]) -> Counted:
    """Return what both sources say, for as many users as there are lists.

    Items whose share nobody knows do not count: a record of trending items without its total.
    """
    counted = Counted.nothing(len(lists))
    if trending.total > 0:
        num = min(len(trending.item_ids), NUM_COUNTED)
        counted.item_BSK[:, _POPULARITY, :num] = trending.item_ids[:num]
        counted.share_BSK[:, _POPULARITY, :num] = np.array(trending.scores[:num]) / trending.total
    for row, found in enumerate(lists):
        num = min(len(found.item_id), NUM_COUNTED)
        counted.item_BSK[row, _FOLLOWERS, :num] = found.item_id[:num]
        counted.share_BSK[row, _FOLLOWERS, :num] = found.share[:num]
    return counted
