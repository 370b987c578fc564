"""Live sources: what the near-line app counts and answers add to the model. Pure.

`recent_popularity` is the share of an item in all events, each worth half after a half-life.
`co_occurrence` is its share in what came soon after the user's last item, whoever's it was.
Both count by whole hours, so that the same hour gives the same shares, whoever counts when: the
near-line app from the log (streams/trending.py, streams/followers.py), evaluation from the lake
(trainer/counted.py).

Legend: B users, S sources, K places of a list.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np

Int64s = np.ndarray[Any, np.dtype[np.int64]]
Float32s = np.ndarray[Any, np.dtype[np.float32]]

# In the order in which every tensor and manifest has them.
SOURCES: Final = ("recent_popularity", "co_occurrence")
# Items of one source's list, the best ones: as many as an answer can have.
NUM_COUNTED: Final = 100
HOUR_MS: Final = 3_600_000
# An event of six hours ago weighs half of one of this hour: a morning's trend is over by night.
HALF_LIFE_H_DEFAULT: Final = 6
# Popularity counts the events of so many half-lives, of a week at most: the tiles hold no more.
HALF_LIVES_COUNTED: Final = 4
POPULARITY_HOURS_MAX: Final = 7 * 24
# What follows an item is met more rarely than the item, so it is remembered longer: this many
# half-lives of popularity make one of co-occurrence.
FOLLOWERS_SLOWER: Final = 8
# What follows an item is forgotten when nothing has followed it for so many of these half-lives:
# it weighs a thousandth then.
FOLLOWERS_HALF_LIVES_KEPT: Final = 10
# So many of a user's events after an item follow it; the s-th weighs 1 / s.
NUM_STEPS: Final = 3
# No item stands in this place of a list.
NO_COUNTED: Final = -1


class Counted(NamedTuple):
    """What every source says for each of B users, best first.

    Attributes:
        item_BSK: int64, NO_COUNTED behind the last one.
        share_BSK: float32, of all that the source has counted; 0 there.
        domain_BS: int64, the hash of the domain that a list is of, its bits read as signed; 0 is a
            list of all domains.
    """

    item_BSK: Int64s
    share_BSK: Float32s
    domain_BS: Int64s

    @classmethod
    def nothing(cls, num_users: int) -> Counted:
        """Return what sources say that know nothing."""
        shape = (num_users, len(SOURCES), NUM_COUNTED)
        return cls(
            np.full(shape, NO_COUNTED, np.int64),
            np.zeros(shape, np.float32),
            np.zeros(shape[:2], np.int64),
        )


def popularity_hours(half_life_h: int) -> int:
    """Return how many hours popularity looks back on, the current one included.

    >>> popularity_hours(6), popularity_hours(336)
    (24, 168)
    """
    return min(HALF_LIVES_COUNTED * half_life_h, POPULARITY_HOURS_MAX)


def followers_half_life_h(half_life_h: int) -> int:
    """Return the hours in which what follows an item weighs half.

    >>> followers_half_life_h(6)
    48
    """
    return FOLLOWERS_SLOWER * half_life_h
