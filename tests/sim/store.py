"""A Redis that can go back to the moment after any command it ever carried out.

A double, because a real server cannot be stopped between two commands of a pipeline, nor be
restored to any of its earlier moments, some hundred thousand times a minute. `test_store.py` holds
it against the real script.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from features.catalogue import decode_item, encode_item
from features.chunks import FIRST_FIELD, Drop
from features.errors import StoreFullError, StoreUnavailableError
from features.redis import CHECKPOINT_DIFFERS, WRITTEN, BucketWrite
from features.row import (
    FORGET,
    FORMATS,
    POSITION_BYTES,
    POSITION_FROM_END,
    ROW_FORMAT,
    RowFormat,
    decode_row,
)
from features.state import EMPTY_STATE, UserState, rebuild_window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from features.catalogue import Item
    from features.config import StateConfig
    from features.row import RowWrite

# Few, so that users meet in a bucket; the worker's code takes their number from the checkpoints.
NUM_BUCKETS: Final = 4

Key = tuple[str | int, ...]
Value = bytes | str | int


@dataclass
class SimRedis:
    """Keys and values, and what each command changed."""

    data: dict[Key, Value] = field(default_factory=dict)
    journal: list[list[tuple[Key, Value | None]]] = field(default_factory=list)
    is_away: bool = False
    is_full: bool = False

    def write(self, changes: Mapping[Key, Value | None]) -> None:
        """One command: all of it happens, at once; None deletes."""
        self.journal.append([(key, self.data.get(key)) for key in changes])
        self._set(changes.items())

    def _set(self, changes: Iterable[tuple[Key, Value | None]]) -> None:
        for key, value in changes:
            if value is None:
                self.data.pop(key, None)
            else:
                self.data[key] = value

    def restore(self, num_commands: int) -> None:
        """Stand again where Redis stood after its first `num_commands` commands."""
        while len(self.journal) > num_commands:
            self._set(self.journal.pop())

    def row(self, user: int) -> bytes:
        """Return a user's row, empty when there is none."""
        row = self.data.get(("row", user), b"")
        assert isinstance(row, bytes)
        return row

    def chunks(self, user: int) -> dict[bytes, bytes]:
        """Return a user's chunks by number, and the mark if there is one."""
        return {
            key[2]: value
            for key, value in self.data.items()
            if key[:2] == ("chunk", user) and isinstance(key[2], bytes) and isinstance(value, bytes)
        }

    def checkpoint(self, bucket: int, source: int, partition: int) -> int:
        """Return a bucket's next offset in a partition, -1 where there is none."""
        at = self.data.get(("checkpoint", bucket, source, partition), -1)
        assert isinstance(at, int)
        return at

    def run_script(self, write: BucketWrite) -> int:
        """Do what features/lua/write_bucket.lua does, and answer as it does."""
        if self.checkpoint_differs(write):
            return CHECKPOINT_DIFFERS
        for number, (user, row) in enumerate(write.rows.items(), 1):
            if self.row_differs(user, row):
                return -number
        changes: dict[Key, Value | None] = {}
        for user, row in write.rows.items():
            changes["row", user] = patched(self.row(user), row)
            if row.keep == FORGET:
                changes |= {("chunk", user, number): None for number in self.chunks(user)}
            parts = row.chunks
            changes |= {("chunk", user, parts[i]): parts[i + 1] for i in range(0, len(parts), 2)}
        place = "checkpoint", write.bucket, write.source, write.partition
        self.write({**changes, place: write.advance_to})
        return WRITTEN

    def drop_chunks(self, user: int, drop: Drop) -> int:
        """Do what features/lua/drop_chunks.lua does, and answer as it does."""
        held = self.chunks(user)
        witness = held.get(b"%d" % drop.newest)
        if witness is None or not witness.startswith(drop.begins):
            return 0
        numbers = [b"%d" % n for n in range(int(held.get(FIRST_FIELD, 0)), drop.keep_from)]
        gone: dict[Key, Value | None] = {("chunk", user, n): None for n in numbers if n in held}
        if gone:
            self.write({**gone, ("chunk", user, FIRST_FIELD): b"%d" % drop.keep_from})
        return len(gone)

    def checkpoint_differs(self, write: BucketWrite) -> bool:
        """Return whether the bucket does not stand where the write was computed from."""
        held = self.checkpoint(write.bucket, write.source, write.partition)
        return held != max(-1, write.expected)

    def row_differs(self, user: int, row: RowWrite) -> bool:
        """Return whether the user's row is not the one that the write was computed from."""
        return get_range(self.row(user), -POSITION_FROM_END, POSITION_BYTES) != row.expected


def get_range(value: bytes, start: int, length: int) -> bytes:
    """Return what GETRANGE returns for a start counted from the end.

    Both ends of the range stop at the first byte: a value too short for it gives that one.
    """
    first, last = len(value) + start, len(value) + start + length - 1
    return value[max(0, first) : max(0, last) + 1]


def patched(old: bytes, row: RowWrite) -> bytes:
    """Return the row after SET (keep below 0) or SETRANGE."""
    if row.keep < 0:
        return row.data
    padded = old.ljust(row.keep, b"\0")
    return padded[: row.keep] + row.data + padded[row.keep + len(row.data) :]


class Hooks(Protocol):
    """What a client tells the world it lives in."""

    def at(self, point: str) -> None:
        """Something may happen here: a crash, a pause, a lost connection."""
        ...

    def lose_reply(self) -> bool:
        """Return whether the connection breaks after Redis has carried out the commands."""
        ...

    def written(self, write: BucketWrite) -> None:
        """A bucket was written; the world looks at it."""
        ...

    def dropped(self, user: int) -> None:
        """Some of a user's chunks have left; the world looks at it."""
        ...

    def is_refused(self) -> bool:
        """Return whether a full Redis refuses this command; smaller ones may still fit."""
        ...


@dataclass
class SimStore:
    """One worker's connection: what `features.redis.StateStore` and `CatalogueStore` promise."""

    redis: SimRedis
    config: StateConfig
    hooks: Hooks
    row_format: RowFormat = FORMATS[ROW_FORMAT]
    generation: int = 1
    is_broken: bool = False

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]:
        """Return whole states, EMPTY_STATE for users that have none."""
        self._reach("load states")
        window = self.config.dedup_window
        rows = {user: self.redis.row(user) for user in user_ids}
        self.hooks.at("states loaded")
        return {
            user: rebuild_window(decode_row(row), window) if row else EMPTY_STATE
            for user, row in rows.items()
        }

    def write_buckets(self, writes: Iterable[BucketWrite]) -> list[int]:
        """Write each bucket whole or not at all; others' commands may come in between."""
        replies: list[int] = []
        is_refused = False
        for write in writes:
            self._reach(f"write bucket {write.bucket} of partition {write.partition}")
            if self.redis.is_full and self.hooks.is_refused():
                is_refused = True
                continue
            replies.append(self.run(write))
            if replies[-1] == WRITTEN:
                self.hooks.written(write)
        if self.hooks.lose_reply():
            raise StoreUnavailableError("the reply was lost")
        self.hooks.at("buckets written")
        if is_refused:
            raise StoreFullError("Redis is at maxmemory")
        return replies

    def run(self, write: BucketWrite) -> int:
        """Run the script."""
        return self.redis.run_script(write)

    def read_checkpoints(self, source: int, partitions: Sequence[int]) -> dict[int, list[int]]:
        """Return each partition's next offset by bucket, -1 where there is none."""
        if not partitions:
            return {}
        self._reach("read checkpoints")
        found = {
            partition: [
                self.redis.checkpoint(bucket, source, partition) for bucket in range(NUM_BUCKETS)
            ]
            for partition in partitions
        }
        self.hooks.at("checkpoints read")
        return found

    def drop(self, drops: Mapping[int, Drop]) -> int:
        """Drop users' oldest chunks; others' commands may come in between."""
        num_dropped = 0
        for user, drop in drops.items():
            self._reach(f"drop chunks of {user} before {drop.keep_from}")
            num_dropped += self.redis.drop_chunks(user, drop)
            self.hooks.dropped(user)
        if self.hooks.lose_reply():
            raise StoreUnavailableError("the reply was lost")
        self.hooks.at("chunks dropped")
        return num_dropped

    def put_domains(self, domains: Mapping[int, str]) -> None:
        """Remember which text a domain hash stands for."""
        if not domains:
            return
        self._reach("put domains")
        self.redis.write({("domain", code): text for code, text in domains.items()})
        self.hooks.at("domains put")

    def put_items(self, items: Iterable[Item]) -> None:
        """Store catalogue entries."""
        for item in items:
            self._reach(f"put item {item.item_id}")
            self.redis.write({("item", item.item_id): encode_item(item)})
        self.hooks.at("items put")

    def get_items(self, item_ids: Sequence[int]) -> list[Item | None]:
        """Return the entries in the order asked, None where the catalogue has none."""
        self._reach("get items")
        found = [self.redis.data.get(("item", item_id)) for item_id in item_ids]
        return [decode_item(entry) if isinstance(entry, bytes) else None for entry in found]

    def put_items_read(self, partition: int, offset: int) -> None:
        """Remember up to where the items topic is applied."""
        self._reach("put the items' position")
        self.redis.write({("items-read", partition): offset})

    def advance_items_read(self, partition: int, *, expected: int, offset: int) -> bool:
        """Likewise, if it stands where the worker left it."""
        self._reach("advance the items' position")
        if self.redis.data.get(("items-read", partition), 0) != expected:
            return False
        self.redis.write({("items-read", partition): offset})
        return True

    def get_items_read(self) -> dict[int, int]:
        """Return up to where the items topic is applied, by partition."""
        self._reach("get the items' position")
        at = self.redis.data.get(("items-read", 0))
        return {0: at} if isinstance(at, int) else {}

    def _reach(self, doing: str) -> None:
        self.hooks.at(doing)
        if self.redis.is_away or self.is_broken:
            self.is_broken = False
            raise StoreUnavailableError(f"Redis did not answer ({doing})")
