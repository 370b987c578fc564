"""Redis keys, both directions. A user's keys share a hash slot through their bucket's tag."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

PREFIX: Final = "moveline"
# Users hash into this many buckets for ever: the number is part of the key format.
NUM_BUCKETS: Final = 1024
_BUCKET_SHIFT: Final = 54
_FIBONACCI: Final = 0x9E3779B97F4A7C15
_MASK_64: Final = 2**64 - 1


def bucket_of(entity_id: int) -> int:
    """Return the bucket, 0..1023, by Fibonacci hashing: the top ten bits of id * 2^64/phi.

    >>> bucket_of(0), bucket_of(1), 0 <= bucket_of(2**62) < NUM_BUCKETS
    (0, 632, True)
    """
    return ((entity_id * _FIBONACCI) & _MASK_64) >> _BUCKET_SHIFT


def buckets_of(entity_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Return the bucket of each id.

    >>> buckets_of(np.array([0, 1])).tolist()
    [0, 632]
    """
    hashed = entity_ids.astype(np.uint64) * np.uint64(_FIBONACCI)
    return (hashed >> np.uint64(_BUCKET_SHIFT)).astype(np.int64)


def row_key(generation: int, user_id: int) -> str:
    """Return the key of a user's state row."""
    return f"{PREFIX}:{{b{bucket_of(user_id)}}}:g{generation}:row:{user_id}"


def chunks_key(generation: int, user_id: int) -> str:
    """Return the key of a user's waiting chunks: a hash of chunk number to records."""
    return f"{PREFIX}:{{b{bucket_of(user_id)}}}:g{generation}:chunks:{user_id}"


def memories_key(generation: int, user_id: int) -> str:
    """Return the key of a user's lifelong memories: a hash of memory version to memory."""
    return f"{PREFIX}:{{b{bucket_of(user_id)}}}:g{generation}:memories:{user_id}"


def user_keys(generation: int, bucket: int, user_ids: Iterable[int]) -> list[str]:
    """Return `row_key` and `chunks_key` of each user in turn; all of them are in `bucket`."""
    row, chunks = (f"{PREFIX}:{{b{bucket}}}:g{generation}:{kind}:" for kind in ("row", "chunks"))
    return [f"{kind}{user}" for user in user_ids for kind in (row, chunks)]


def checkpoints_key(generation: int, bucket: int) -> str:
    """Return the key of a bucket's checkpoints: a hash of "source:partition" to next offset."""
    return f"{PREFIX}:{{b{bucket}}}:g{generation}:checkpoints"


def items_key(item_id: int) -> str:
    """Return the key of the hash that holds an item's catalogue entry (field: decimal item id)."""
    return f"{PREFIX}:{{i{bucket_of(item_id)}}}:items"


def generation_key(generation: int) -> str:
    """Return the key of a generation's recorded config."""
    return f"{PREFIX}:generation:g{generation}"


def built_key(generation: int) -> str:
    """Return the key of how a replay builds a generation."""
    return f"{generation_key(generation)}:built"


def row_format_key(generation: int) -> str:
    """Return the key of the format that a generation's rows are written in."""
    return f"{generation_key(generation)}:row-format"


# Kafka itself gets slow long before so many partitions in a topic.
_PARTITIONS_PER_TOPIC: Final = 65_536


def log_partition(source: int, partition: int) -> int:
    """Return the number of a partition among those of all topics that the event log has had.

    What a request's `min_position` names: the events topic may be followed by another.

    >>> log_partition(0, 3), log_partition(2, 3)
    (3, 131075)
    """
    return source * _PARTITIONS_PER_TOPIC + partition


def split_log_partition(number: int) -> tuple[int, int]:
    """Return which topic of the event log, and its partition.

    >>> split_log_partition(131075)
    (2, 3)
    """
    return divmod(number, _PARTITIONS_PER_TOPIC)


POINTERS_KEY: Final = f"{PREFIX}:pointers"
ITEMS_READ_KEY: Final = f"{PREFIX}:items-read"
DOMAINS_KEY: Final = f"{PREFIX}:domains"
TRENDING_KEY: Final = f"{PREFIX}:trending"
LIVE_MEMORIES_KEY: Final = f"{PREFIX}:live-memories"
WITHDRAWN_KEY: Final = f"{PREFIX}:withdrawn"
TRAINER_LEASE_KEY: Final = f"{PREFIX}:trainer-lease"


def parse_generation(name: str) -> int:
    """Return 3 for "g3".

    Raises:
        ValueError: not a generation name.

    >>> parse_generation("g3")
    3
    """
    if len(name) < 2 or name[0] != "g" or not name[1:].isdigit():  # noqa: PLR2004 - "g" + digit
        raise ValueError(f"{name!r} is not a generation; write g1, g2, ...")
    return int(name[1:])
