"""Counts what follows items along with the tiles, and makes the lists that answers read."""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

from features.errors import CorruptRowError
from features.followers import (
    FOLLOWERS_MAX,
    LISTS_PER_ROUND_MAX,
    Followers,
    added,
    kept_s,
    put_lists,
    read_changed,
    read_followers,
    settle,
)
from features.sources import HALF_LIFE_H_DEFAULT, NUM_COUNTED, followers_half_life_h
from features.store import read_users
from features.view import PADDING_ITEM
from streams.followers import RECORDS_READ, counts_of, pairs_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.redis import CatalogueStore, StateStore
    from features.state import Accepted
    from features.view import Records

log = logging.getLogger("moveline.nearline")


@dataclass(frozen=True)
class FollowerCounter:
    """Works out what a stretch changes of what follows items; writes nothing.

    Attributes:
        states: rows of the users, for what came before the stretch.
        popularity_half_life_h: what follows an item is forgotten more slowly: features/sources.py.
    """

    states: StateStore
    popularity_half_life_h: int = HALF_LIFE_H_DEFAULT

    @property
    def half_life_h(self) -> int:
        """Return the hours in which the weight of what followed halves."""
        return followers_half_life_h(self.popularity_half_life_h)

    @property
    def kept_s(self) -> int:
        """Return how long followers stay when nothing follows any more."""
        return kept_s(self.half_life_h)

    def counted(
        self, partition: int, by_user: Mapping[int, Sequence[Accepted]]
    ) -> dict[int, Followers]:
        """Return what follows each item that a stretch of a partition follows, it included.

        Raises:
            StoreError: Redis did not answer.
        """
        known = self._known(list(by_user))
        pairs = chain.from_iterable(
            pairs_of(events, known[user]) for user, events in by_user.items()
        )
        new = counts_of(pairs, self.half_life_h)
        places = [(partition, item_id) for item_id in new]
        held = read_followers(self.states.client, self.states.generation, places)
        return {
            item_id: added([before, now], self.half_life_h, num_max=FOLLOWERS_MAX)
            for (item_id, now), before in zip(new.items(), held, strict=True)
        }

    def _known(self, users: Sequence[int]) -> Mapping[int, Records]:
        try:
            batch = read_users(self.states, users, now_ms=0, newest=RECORDS_READ)
        except CorruptRowError as error:
            # The audit tells of it; what follows what within the stretch is known without rows.
            log.warning("followers are counted without rows: %s", error)
            nothing = read_users(self.states, [], now_ms=0, newest=RECORDS_READ).records_BN
            return defaultdict(lambda: nothing.reshape(-1))
        return {
            user: records[records["item_id"] != PADDING_ITEM]
            for user, records in zip(users, batch.records_BN, strict=True)
        }


@dataclass(frozen=True)
class FollowerLists:
    """Makes the lists of items whose followers changed, over all partitions."""

    counter: FollowerCounter
    catalogue: CatalogueStore
    partitions: int

    def put(self) -> int:
        """Replace the lists that are behind; return how many, at most LISTS_PER_ROUND_MAX.

        None while another generation is the live one.
        """
        states = self.counter.states
        pointers = self.catalogue.get_pointers()
        if pointers is not None and pointers.generation != states.generation:
            return 0
        changed = read_changed(states.client, states.generation, range(self.partitions))
        items = list(dict.fromkeys(chain.from_iterable(changed.values())))[:LISTS_PER_ROUND_MAX]
        chosen = set(items)
        put_lists(states.client, self._merged(items), self.counter.half_life_h)
        for partition, marks in changed.items():
            mine = {item: mark for item, mark in marks.items() if item in chosen}
            settle(states.client, states.generation, partition, mine)
        return len(items)

    def _merged(self, items: Sequence[int]) -> dict[int, Followers]:
        states = self.counter.states
        places = [(partition, item) for item in items for partition in range(self.partitions)]
        parts = read_followers(states.client, states.generation, places)
        return {
            item: added(
                parts[at * self.partitions : (at + 1) * self.partitions],
                self.counter.half_life_h,
                num_max=NUM_COUNTED,
            )
            for at, item in enumerate(items)
        }
