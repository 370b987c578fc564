"""Which users a canary is tried on: shares by a hash that no other share is drawn by."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import xxhash

if TYPE_CHECKING:
    from features.redis import Canary

# No canary runs, or the user is in none of its shares.
LIVE: Final = "live"
# As many users as the canary has, answered by the live version: what it is compared with.
CONTROL: Final = "control"
# Answered by the new version.
CANARY: Final = "canary"
# Answered by the new version too, but only into the log; the same users' answers are CONTROL.
SHADOW: Final = "shadow"

_HASH_RANGE: Final = 2**64


def place_of(user_id: int, version: int) -> float:
    """Return where in [0, 1) a user stands for the canary of a version, always the same place.

    Salted by the version: the users of one canary are not those of the next.

    >>> place_of(42, 7) == place_of(42, 7) != place_of(42, 8)
    True
    """
    raw = (user_id % _HASH_RANGE).to_bytes(8, "little")
    return xxhash.xxh3_64_intdigest(raw, seed=version) / _HASH_RANGE


def arm_of(user_id: int, canary: Canary | None) -> str:
    """Return the arm that answers a user: LIVE, CONTROL or CANARY."""
    if canary is None:
        return LIVE
    place = place_of(user_id, canary.version)
    if canary.mode == "shadow":
        return CONTROL if place < canary.share else LIVE
    if place < canary.share:
        return CANARY
    return CONTROL if place < 2 * canary.share else LIVE
