"""What Redis holds of one user besides the state that the worker starts anew."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from features.chunks import ChunkStore
from features.keys import PREFIX, bucket_of, parse_generation
from features.nearline import markers_key, outbox_key
from features.redis import StateStore
from features.redis_client import execute, mapped_errors, primaries, scan
from features.state import RECORD_BYTES

if TYPE_CHECKING:
    from features.config import StateConfig
    from features.redis_client import RedisClient


@dataclass(frozen=True)
class Kept:
    """What one generation holds of a user.

    Attributes:
        num_events: in tail and waiting chunks.
        next_ordinal: of the user's next event.
        partition: of the last record applied, with its `offset`.
    """

    generation: int
    num_events: int
    next_ordinal: int
    partition: int
    offset: int


def kept_of(client: RedisClient, generation: int, config: StateConfig, user_id: int) -> Kept | None:
    """Return what a generation holds of a user, None if it has no row.

    Raises:
        StoreError: Redis did not answer.
        CorruptRowError: stored bytes are not a row.
    """
    (state,) = StateStore(client, generation, config).read_states([user_id], newest=config.tail_max)
    if state is None:
        return None
    (waiting,) = ChunkStore(client, generation).read([user_id])
    num_waiting = sum(len(records) for records in waiting.records.values())
    at = state.position
    num_events = (len(state.tail) + num_waiting) // RECORD_BYTES
    return Kept(generation, num_events, state.next_ordinal, at.partition, at.offset)


def drop_traces(client: RedisClient, generation: int, user_id: int) -> int:
    """Remove the near-line app's notes of a user's sessions; return how many there were."""
    bucket = bucket_of(user_id)
    outbox = outbox_key(generation, bucket)
    with mapped_errors("forgetting a user's sessions"):
        removed = int(execute(client, "HDEL", markers_key(generation, bucket), user_id))
        mine = [
            field
            for field in execute(client, "HKEYS", outbox)
            if field.startswith(b"%d:" % user_id)
        ]
        if mine:
            removed += int(execute(client, "HDEL", outbox, *mine))
    return removed


def keys_of(client: RedisClient, user_id: int) -> list[str]:
    """Return every key of Moveline's that ends with the user's id; looks at the whole keyspace."""
    with mapped_errors("looking for keys of a user"):
        found = scan(client, f"{PREFIX}:*:{user_id}", count=10_000)
        return sorted({key.decode() for key in found})


def last_snapshot_ms(client: RedisClient) -> int | None:
    """Return when Redis wrote the oldest of its servers' snapshots, epoch ms; None for never."""
    with mapped_errors("asking for the last snapshot"):
        saved_s = [execute(server, "LASTSAVE").timestamp() for server in primaries(client)]
    return int(min(saved_s)) * 1000 or None


def generation_of(key: str) -> int | None:
    """Return the generation in a key, None if it belongs to none.

    >>> generation_of("moveline:{b7}:g3:row:42"), generation_of("moveline:pointers")
    (3, None)
    """
    for part in key.split(":"):
        if part.startswith("g") and part[1:].isdigit():
            return parse_generation(part)
    return None
