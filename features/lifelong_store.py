"""Lifelong memories in Redis: how far each is, folding on, and reading them with what waits.

Memory, waiting chunks and tail of a user are looked at and changed by scripts, so that each of the
user's events is in exactly one of them at every instant. Layout: docs/formats.md.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from features import keys
from features.chunks import FIRST_FIELD
from features.errors import CorruptMemoryError
from features.lifelong import MEMORY_BYTES, LiveMemory, Memory, pack_memory, unpack_memory
from features.redis_client import (
    ScriptMissingError,
    execute,
    load_script,
    mapped_errors,
    pipelined,
    read_strings,
    scan,
)
from features.row import DEPARTED_BYTES, newest_bytes
from features.state import RECORD_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig
    from features.redis import StateStore
    from features.redis_client import RedisClient

# Waiting chunks that one answer looks at, as many as stay under the cap by default. Where more
# wait, the oldest of them are left out and the answer says that it lacks something.
WAITING_READ_MAX: Final = 64
_PARTS: Final = struct.Struct("<III")


class Marks(NamedTuple):
    """How far a user's memories are.

    Attributes:
        num_chunks: chunks that have left the tail.
        first: the first chunk that waits in Redis; those before are in the lake only.
        begins: the ordinal that the state begins with: 0, or what a forget left.
        folded: by memory version, chunks folded.
    """

    num_chunks: int
    first: int
    begins: int
    folded: dict[str, int]

    def is_incomplete(self, version: str) -> bool:
        """Return whether chunks have left Redis that the memory has not folded."""
        return self.folded[version] < self.first


class MemoryWrite(NamedTuple):
    """A user's memory, and how many chunks were in the one that it was made from."""

    user_id: int
    before: int
    memory: Memory


class DropFolded(NamedTuple):
    """Chunks of a user that may go if they are folded: those before `keep_from`."""

    user_id: int
    begins: int
    keep_from: int


class WithMemory(NamedTuple):
    """What Redis holds of a user, as of one instant.

    Attributes:
        row: the whole row; None for a user nothing is known of.
        memory: bytes of the memory of the version asked for; empty for none.
        first: number of the first chunk in `chunks`.
        chunks: records of the waiting chunks that are not in the memory, oldest first.
    """

    row: memoryview | None
    memory: memoryview
    first: int
    chunks: memoryview


NOTHING: Final = WithMemory(None, memoryview(b""), 0, memoryview(b""))


@cache
def _script(name: str) -> bytes:
    lua = files("features").joinpath("lua")
    return b"".join(lua.joinpath(f"{part}.lua").read_bytes() for part in ("memory_state", name))


@cache
def _digest(name: str) -> str:
    return hashlib.sha1(_script(name), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class LifelongStore:
    """The memories of one generation."""

    client: RedisClient
    generation: int
    config: StateConfig

    @classmethod
    def of(cls, states: StateStore) -> LifelongStore:
        """Return the memories beside some states."""
        return cls(states.client, states.generation, states.config)

    def marks(self, user_ids: Sequence[int], versions: Sequence[str]) -> list[Marks | None]:
        """Return how far each user is, as of one instant each; None for an unknown user.

        Raises:
            StoreError: Redis did not answer.
        """
        calls = [(self._keys(user), (*self._sizes(), *versions)) for user in user_ids]
        replies = self._run("memory_marks", calls, "asking how far memories are")
        return [
            Marks(reply[0], reply[1], reply[2], dict(zip(versions, reply[3:], strict=True)))
            if reply
            else None
            for reply in replies
        ]

    def read(self, user_ids: Sequence[int], version: str) -> list[bytes | None]:
        """Return the users' memories as they are stored; None where there is none.

        Raises:
            StoreError: Redis did not answer.
        """
        commands = [
            ("HGET", keys.memories_key(self.generation, user), version) for user in user_ids
        ]
        return pipelined(self.client, commands, "reading memories")

    def read_chunks(self, wanted: Sequence[tuple[int, range]]) -> list[list[bytes | None]]:
        """Return chunks of (user, numbers); None for one that is not in Redis.

        Raises:
            StoreError: Redis did not answer.
        """
        commands = [
            ("HMGET", keys.chunks_key(self.generation, user), *numbers) for user, numbers in wanted
        ]
        return pipelined(self.client, commands, "reading chunks")

    def write(self, version: str, writes: Sequence[MemoryWrite]) -> int:
        """Put memories in the place of those they were made from; return how many it took.

        One is refused, and nothing changed, when another has folded meanwhile, when the user was
        forgotten, or when Redis went back.

        Raises:
            StoreError: Redis did not answer or is full; some may be written.
        """
        sizes = self._sizes()[1:]
        calls = [
            (
                self._keys(one.user_id)[::2],
                (
                    version,
                    *sizes,
                    one.before,
                    one.memory.num_chunks,
                    one.memory.begins,
                    pack_memory(one.memory, version),
                ),
            )
            for one in writes
        ]
        return sum(self._run("fold_memory", calls, "writing memories"))

    def drop_folded(self, drops: Sequence[DropFolded], versions: Sequence[str]) -> int:
        """Drop chunks that all of `versions` have folded, mark the hole; return how many left.

        Raises:
            StoreError: Redis did not answer.
        """
        assert versions, "without a live memory version every chunk stays"
        calls = [
            (self._keys(one.user_id), (*self._sizes(), one.keep_from, one.begins, *versions))
            for one in drops
        ]
        return sum(self._run("drop_folded", calls, "dropping chunks that are folded"))

    def read_with_chunks(self, user_ids: Sequence[int], version: str) -> list[WithMemory]:
        """Return rows, memories and the chunks not in them in one round trip, each user atomically.

        Raises:
            StoreError: Redis did not answer.
        """
        config = self.config
        tail_bytes = newest_bytes(config.tail_max) + config.dedup_window * DEPARTED_BYTES
        chunk_bytes = config.chunk * RECORD_BYTES
        size = _PARTS.size + tail_bytes + MEMORY_BYTES + WAITING_READ_MAX * chunk_bytes
        commands = [
            self._command(
                "read_lifelong", self._keys(u), (*self._sizes(), version, WAITING_READ_MAX)
            )
            for u in user_ids
        ]
        doing = "reading states and memories"
        try:
            replies = read_strings(self.client, commands, doing, bytes_max=size)
        except ScriptMissingError:
            load_script(self.client, _script("read_lifelong"))
            replies = read_strings(self.client, commands, doing, bytes_max=size)
        return [_split(reply) for reply in replies]

    def discard(self, user_id: int, version: str) -> None:
        """Remove a user's memory of a version: one that cannot be read, or is not wanted."""
        with mapped_errors("removing a memory"):
            execute(self.client, "HDEL", keys.memories_key(self.generation, user_id), version)

    def discard_version(self, version: str) -> int:
        """Remove a version's memories of all users; return how many. Looks at every key."""
        with mapped_errors("looking for memories"):
            pattern = f"{keys.PREFIX}:*:g{self.generation}:memories:*"
            found = list(scan(self.client, pattern, count=1_000))
        commands = [("HDEL", key, version) for key in set(found)]
        return sum(pipelined(self.client, commands, "removing memories"))

    def _keys(self, user_id: int) -> tuple[str, str, str]:
        number = self.generation
        return (
            keys.row_key(number, user_id),
            keys.chunks_key(number, user_id),
            keys.memories_key(number, user_id),
        )

    def _sizes(self) -> tuple[bytes, int, int]:
        return FIRST_FIELD, self.config.chunk, MEMORY_BYTES

    def _command(self, name: str, names: Sequence[str], args: Sequence[Any]) -> tuple[Any, ...]:
        return ("EVALSHA", _digest(name), len(names), *names, *args)

    def _run(
        self, name: str, calls: Sequence[tuple[Sequence[str], Sequence[Any]]], doing: str
    ) -> list[Any]:
        """Run a script for each of the calls. A second run of one of these changes nothing."""
        commands = [self._command(name, names, args) for names, args in calls]
        try:
            return pipelined(self.client, commands, doing)
        except ScriptMissingError:
            load_script(self.client, _script(name))
            return pipelined(self.client, commands, doing)


def decode_memory(raw: bytes | memoryview, version: str) -> Memory | None:
    """Return the memory in `raw`; None where there is none, or one that is damaged."""
    if not raw:
        return None
    try:
        return unpack_memory(raw, version)
    except CorruptMemoryError:
        return None


def _split(reply: memoryview) -> WithMemory:
    if not reply:
        return NOTHING
    if len(reply) < _PARTS.size:
        return WithMemory(reply, reply[:0], 0, reply[:0])  # no row, as its reader will say
    row_bytes, memory_bytes, first = _PARTS.unpack_from(reply)
    memory_at = _PARTS.size + row_bytes
    chunks_at = memory_at + memory_bytes
    row = reply[_PARTS.size : memory_at]
    return WithMemory(row, reply[memory_at:chunks_at], first, reply[chunks_at:])


def put_live_memories(client: RedisClient, live: Sequence[LiveMemory]) -> None:
    """Say which memory versions are kept up to date."""
    with mapped_errors("writing which memory versions are live"):
        execute(client, "SET", keys.LIVE_MEMORIES_KEY, msgspec.json.encode(live))


def get_live_memories(client: RedisClient) -> tuple[LiveMemory, ...]:
    """Return which memory versions are kept up to date; none before the first."""
    with mapped_errors("reading which memory versions are live"):
        raw = execute(client, "GET", keys.LIVE_MEMORIES_KEY)
    return () if raw is None else msgspec.json.decode(raw, type=tuple[LiveMemory, ...])
