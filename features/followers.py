"""What came soon after each item: decayed counts by partition, and the lists that answers read.

Counts of a partition change in the same script as the partition's mark (features/nearline.py), so
that nothing is counted twice. The lists are derived from the counts of all partitions and may be
late or lost: the next time that anything follows the item they are made again.
"""

from __future__ import annotations

import struct
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from features.errors import CorruptRowError
from features.keys import PREFIX
from features.redis_client import mapped_errors, pipelined, run_script
from features.sources import FOLLOWERS_HALF_LIVES_KEPT, HOUR_MS, NUM_COUNTED, Float32s, Int64s

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from features.redis_client import RedisClient

# Followers of one item in one partition, the heaviest; lighter ones are dropped and start anew.
# Their weight stays in the total, so that no share grows by it.
FOLLOWERS_MAX: Final = 100
# Items whose list is made anew in one go; the others wait for the next.
LISTS_PER_ROUND_MAX: Final = 2_000
_HEAD: Final = struct.Struct("<HHqd")  # version, followers, hour, total
_VERSION: Final = 1
_FOLLOWER: Final = np.dtype([("item_id", "<i8"), ("weight", "<f8")])
_LISTED: Final = np.dtype([("item_id", "<i8"), ("share", "<f4")])

Float64s = np.ndarray[Any, np.dtype[np.float64]]


class Followers(NamedTuple):
    """What followed one item in one partition, as it weighs in an hour.

    Attributes:
        hour: since 1970; later ones weigh less.
        total: the weight of all that followed, dropped ones too.
    """

    hour: int
    total: float
    item_id: Int64s
    weight: Float64s


class FollowerList(NamedTuple):
    """The best followers of an item and their share in all that followed it."""

    item_id: Int64s
    share: Float32s


NO_FOLLOWERS: Final = Followers(0, 0.0, np.zeros(0, np.int64), np.zeros(0))
NO_LIST: Final = FollowerList(np.zeros(0, np.int64), np.zeros(0, np.float32))


def added(parts: Sequence[Followers], half_life_h: int, *, num_max: int) -> Followers:
    """Return several counts as one, as they weigh in the newest hour of them, heaviest first.

    Args:
        parts: counts of the same item; at least one.
        half_life_h: hours in which a weight halves.
        num_max: followers kept; of equals the smaller id.
    """
    hour = max(part.hour for part in parts)
    decays = [0.5 ** ((hour - part.hour) / half_life_h) if part.total else 0.0 for part in parts]
    every = zip(parts, decays, strict=True)
    weights = np.concatenate([part.weight * decay for part, decay in every])
    items, inverse = np.unique(
        np.concatenate([part.item_id for part in parts]), return_inverse=True
    )
    weight = np.bincount(inverse, weights, minlength=len(items)).astype(np.float64)
    best = np.lexsort((items, -weight))[:num_max]
    total = sum(part.total * decay for part, decay in zip(parts, decays, strict=True))
    return Followers(hour, total, items[best], weight[best])


def encode_followers(followers: Followers) -> bytes:
    """Return the counts' bytes: docs/formats.md."""
    packed = np.empty(len(followers.item_id), _FOLLOWER)
    packed["item_id"], packed["weight"] = followers.item_id, followers.weight
    head = _HEAD.pack(_VERSION, len(packed), followers.hour, followers.total)
    return head + packed.tobytes()


def decode_followers(raw: bytes | None) -> Followers:
    """Return the counts; none for None.

    Raises:
        CorruptRowError: the bytes are none.
    """
    if raw is None:
        return NO_FOLLOWERS
    if len(raw) < _HEAD.size:
        raise _damaged(raw)
    version, count, hour, total = _HEAD.unpack_from(raw)
    if version != _VERSION or len(raw) != _HEAD.size + count * _FOLLOWER.itemsize:
        raise _damaged(raw)
    packed = np.frombuffer(raw, _FOLLOWER, offset=_HEAD.size)
    return Followers(hour, total, packed["item_id"].copy(), packed["weight"].copy())


def _damaged(raw: bytes) -> CorruptRowError:
    return CorruptRowError(
        f"{len(raw)} bytes under a key of what follows an item are no such counts: delete the key, "
        "it is counted again from here on"
    )


def encode_list(followers: Followers) -> bytes:
    """Return what answers read: the best followers with their shares, packed."""
    packed = np.empty(min(len(followers.item_id), NUM_COUNTED), _LISTED)
    packed["item_id"] = followers.item_id[:NUM_COUNTED]
    packed["share"] = followers.weight[:NUM_COUNTED] / max(followers.total, 1e-9)
    return packed.tobytes()


def decode_list(raw: bytes | None) -> FollowerList:
    """Return the list; empty for None and for bytes that are none, since it is made again."""
    if raw is None or len(raw) % _LISTED.itemsize:
        return NO_LIST
    packed = np.frombuffer(raw, _LISTED)
    return FollowerList(packed["item_id"].astype(np.int64), packed["share"].astype(np.float32))


def kept_s(half_life_h: int) -> int:
    """Return how many seconds followers stay when nothing follows any more."""
    return FOLLOWERS_HALF_LIVES_KEPT * half_life_h * HOUR_MS // 1000


def followers_key(generation: int, partition: int, item_id: int) -> str:
    """Return the key of one item's counts in a partition; it shares a slot with the marks."""
    return f"{PREFIX}:{{t{partition}}}:g{generation}:after:{item_id}"


def changed_key(generation: int, partition: int) -> str:
    """Return the key of a partition's items whose list is older than their counts."""
    return f"{PREFIX}:{{t{partition}}}:g{generation}:after-changed"


def list_key(item_id: int) -> str:
    """Return the key of the list that answers read."""
    return f"{PREFIX}:after:{item_id}"


@cache
def _settle() -> bytes:
    return files("features").joinpath("lua/settle_followers.lua").read_bytes()


def read_followers(
    client: RedisClient, generation: int, places: Sequence[tuple[int, int]]
) -> list[Followers]:
    """Return the counts at each (partition, item), in one round trip.

    Raises:
        StoreError: Redis did not answer.
        CorruptRowError: stored bytes are no counts.
    """
    commands = [("GET", followers_key(generation, *place)) for place in places]
    return [
        decode_followers(raw) for raw in pipelined(client, commands, "reading what follows items")
    ]


def read_changed(
    client: RedisClient, generation: int, partitions: Iterable[int]
) -> dict[int, dict[int, int]]:
    """Return, by partition, some items whose list is behind, with the mark since."""
    numbers = list(partitions)
    commands: list[tuple[Any, ...]] = [
        ("ZRANGE", changed_key(generation, one), 0, LISTS_PER_ROUND_MAX - 1, "WITHSCORES")
        for one in numbers
    ]
    replies = pipelined(client, commands, "looking for changed followers")
    return {
        number: {int(item): int(mark) for item, mark in _pairs(reply)}
        for number, reply in zip(numbers, replies, strict=True)
    }


def _pairs(reply: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return (member, score), however this version of the protocol tells them apart."""
    if reply and isinstance(reply[0], list | tuple):
        return [(member, float(score)) for member, score in reply]
    return [(member, float(score)) for member, score in zip(reply[::2], reply[1::2], strict=True)]


def settle(
    client: RedisClient, generation: int, partition: int, changed: Mapping[int, int]
) -> None:
    """Forget that these items changed, unless they changed again."""
    if changed:
        args = [part for pair in changed.items() for part in pair]
        with mapped_errors("settling followers"):
            run_script(client, _settle(), [changed_key(generation, partition)], args)


def put_lists(client: RedisClient, lists: Mapping[int, Followers], half_life_h: int) -> None:
    """Replace the lists that answers read."""
    commands: list[tuple[Any, ...]] = [
        ("SET", list_key(item_id), encode_list(followers), "EX", kept_s(half_life_h))
        for item_id, followers in lists.items()
    ]
    pipelined(client, commands, "writing what follows items")


def read_lists(client: RedisClient, item_ids: Sequence[int]) -> list[FollowerList]:
    """Return what answers read of each item, in one round trip.

    Raises:
        StoreError: Redis did not answer.
    """
    commands = [("GET", list_key(item_id)) for item_id in item_ids]
    return [decode_list(raw) for raw in pipelined(client, commands, "reading what follows items")]
