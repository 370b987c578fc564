"""A user's waiting chunks in Redis, and the mark of those that have left it for the lake.

A chunk is a function of the log, so it may leave as soon as the lake has its events, whoever owns
the partition. Layout: docs/formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Final, NamedTuple

from features import keys
from features.redis_client import pipelined

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.redis_client import RedisClient


# Beside the decimal chunk numbers of the same hash: the first chunk that is kept.
FIRST_FIELD: Final = b"first"


class Waiting(NamedTuple):
    """What waits of one user; chunks before `first` have left Redis and are in the lake."""

    first: int
    records: dict[int, bytes]

    def missing(self, num_chunks: int) -> list[int]:
        """Return the numbers that are neither there nor marked, or there although marked.

        Args:
            num_chunks: chunks that have left the user's tail.
        """
        return sorted(self.records.keys() ^ set(range(self.first, num_chunks)))


class Drop(NamedTuple):
    """Which chunks of a user are to leave, and how to tell that they are still the same ones.

    Attributes:
        keep_from: the first chunk that stays.
        newest: a chunk, this one or a later one, that was there when it was decided.
        begins: that chunk's first record: its ordinal is used once, whatever happens to numbers.
    """

    keep_from: int
    newest: int
    begins: bytes


def decode_chunks(fields: Mapping[bytes, bytes]) -> Waiting:
    """Return the chunks and the mark in one hash."""
    records = {int(name): data for name, data in fields.items() if name != FIRST_FIELD}
    return Waiting(int(fields.get(FIRST_FIELD, 0)), records)


@cache
def _script() -> bytes:
    return files("features").joinpath("lua/drop_chunks.lua").read_bytes()


@dataclass(frozen=True)
class ChunkStore:
    """The waiting chunks of one generation."""

    client: RedisClient
    generation: int

    def read(self, user_ids: Sequence[int]) -> list[Waiting]:
        """Return each user's waiting chunks and mark, each user's as of one instant."""
        commands = [("HGETALL", keys.chunks_key(self.generation, user)) for user in user_ids]
        replies = pipelined(self.client, commands, "reading chunks")
        return [decode_chunks(reply) for reply in replies]

    def first_kept(self, user_ids: Sequence[int]) -> list[int]:
        """Return each user's mark: the number of chunks that have left Redis for the lake."""
        commands = [
            ("HGET", keys.chunks_key(self.generation, user), FIRST_FIELD) for user in user_ids
        ]
        replies = pipelined(self.client, commands, "reading marks of chunks")
        return [int(reply or 0) for reply in replies]

    def drop(self, drops: Mapping[int, Drop]) -> int:
        """Drop each user's oldest chunks, mark the hole; return how many left.

        The lake must have every event of them. Doing it again, or to a Redis where the chunks are
        not those that were meant, changes nothing.
        """
        commands = [
            ("EVAL", _script(), 1, keys.chunks_key(self.generation, user), FIRST_FIELD, *drop)
            for user, drop in drops.items()
        ]
        return sum(pipelined(self.client, commands, "dropping chunks that the lake has"))
