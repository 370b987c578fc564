"""What the near-line app keeps in Redis: hourly tiles of counts, session markers, an outbox.

All of it is derived from the log or from users' states, and may be lost: it is made again.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np

from features.chunks import decode_chunks
from features.followers import changed_key, encode_followers, followers_key
from features.keys import PREFIX, chunks_key, row_key
from features.redis import Trending
from features.redis_client import execute, mapped_errors, pipelined, run_script, scan_step
from features.sources import HOUR_MS
from features.state import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from features.followers import Followers
    from features.redis_client import RedisClient
    from features.view import Records

__all__ = ["HOUR_MS", "SessionStore", "TileStore"]

# A week is the widest window; a day more keeps a tile while its last readers still want it.
TILE_HOURS_MAX: Final = 8 * 24
# A domain that nothing happens in any more leaves after this long.
DOMAIN_TRENDING_S: Final = 2 * 24 * 3_600
# Keys a single SCAN call looks at: a few milliseconds of Redis' one thread.
SCAN_COUNT: Final = 1_000
_FIELD: Final = struct.Struct("<Qq")
TILE_FIELD: Final = np.dtype([("domain", "<u8"), ("item_id", "<i8")])

Counts = dict[tuple[int, int], int]  # (domain hash, item) -> events
Int64s = np.ndarray[tuple[int], np.dtype[np.int64]]
Uint64s = np.ndarray[tuple[int], np.dtype[np.uint64]]


def marks_key(generation: int, partition: int) -> str:
    """Return the key of a partition's marks."""
    return f"{PREFIX}:{{t{partition}}}:g{generation}:marks"


def tile_key(generation: int, partition: int, hour: int) -> str:
    """Return the key of one partition's counts of one hour; it shares a slot with the marks."""
    return f"{PREFIX}:{{t{partition}}}:g{generation}:tile:{hour}"


def markers_key(generation: int, bucket: int) -> str:
    """Return the key of a bucket's session markers; it shares a slot with the users' rows."""
    return f"{PREFIX}:{{b{bucket}}}:g{generation}:session-markers"


def outbox_key(generation: int, bucket: int) -> str:
    """Return the key of a bucket's closed sessions that may not have been sent yet."""
    return f"{PREFIX}:{{b{bucket}}}:g{generation}:session-outbox"


def domain_trending_key(domain: int) -> str:
    """Return the key of one domain's trending items."""
    return f"{PREFIX}:trending:{domain}"


def read_domain_trending(client: RedisClient, domains: Sequence[int]) -> dict[int, Trending | None]:
    """Return the trending items of those domains, None for one that has no list.

    Raises:
        StoreError: Redis did not answer.
    """
    commands = [("GET", domain_trending_key(domain)) for domain in domains]
    replies = pipelined(client, commands, "reading trending items by domain")
    return {
        domain: None if reply is None else msgspec.json.decode(reply, type=Trending)
        for domain, reply in zip(domains, replies, strict=True)
    }


@cache
def _source(name: str) -> bytes:
    return files("features").joinpath(f"lua/{name}.lua").read_bytes()


class Tile(NamedTuple):
    """The counts of one hour in one partition, a column each."""

    domain: Uint64s
    item_id: Int64s
    num_events: Int64s


class Marks(NamedTuple):
    """How far a partition is counted, and the offset at which each hour's tile last changed."""

    next_offset: int | None
    changed_at: dict[int, int]


@dataclass(frozen=True)
class TileStore:
    """Hourly counts of one generation, exact whatever is delivered how often."""

    client: RedisClient
    generation: int
    source: int = 0

    def marks(self, partition: int) -> Marks:
        """Return where a partition stands."""
        with mapped_errors("reading how far tiles are counted"):
            raw = execute(self.client, "HGETALL", marks_key(self.generation, partition))
        mark = raw.pop(self._field, None)
        hours = {int(hour): int(at) for hour, at in raw.items() if hour.isdigit()}
        return Marks(None if mark is None else int(mark), hours)

    def add(
        self,
        partition: int,
        counts: Mapping[int, Counts],
        *,
        expected: int | None,
        advance_to: int,
        followers: Mapping[int, Followers] | None = None,
        followers_kept_s: int = 0,
    ) -> bool:
        """Add what happened in the offsets [expected, advance_to), by hour.

        Args:
            partition: whose offsets.
            counts: events by hour.
            expected: where the partition stood when they were counted.
            advance_to: where it stands afterwards.
            followers: what followed an item, then and before; replaces what is there.
            followers_kept_s: when they go, if nothing follows the item any more.

        Returns False, with nothing added, when Redis does not stand at `expected`: another app
        was faster, or Redis came back older. Read the marks again.
        """
        names = [marks_key(self.generation, partition), changed_key(self.generation, partition)]
        args: list[Any] = [
            self._field,
            b"" if expected is None else expected,
            advance_to,
            len(counts),
            followers_kept_s,
        ]
        for hour, of_hour in counts.items():
            names.append(tile_key(self.generation, partition, hour))
            args += (hour, (hour + TILE_HOURS_MAX) * HOUR_MS // 1000, len(of_hour))
            for place, count in of_hour.items():
                args += (_FIELD.pack(*place), count)
        for item_id, followed in (followers or {}).items():
            names.append(followers_key(self.generation, partition, item_id))
            args += (item_id, encode_followers(followed))
        with mapped_errors("adding to tiles"):
            return bool(run_script(self.client, _source("add_counts"), names, args))

    def read(self, partition: int, hours: Sequence[int]) -> dict[int, Tile]:
        """Return a partition's tiles of those hours; an hour without events has an empty one."""
        tiles = {}
        for hour in hours:
            with mapped_errors("reading a tile"):
                raw = execute(self.client, "HGETALL", tile_key(self.generation, partition, hour))
            places = np.frombuffer(b"".join(raw), TILE_FIELD)
            counts = np.array([int(count) for count in raw.values()], np.int64)
            tiles[hour] = Tile(places["domain"], places["item_id"], counts)
        return tiles

    def forget_hours(self, partition: int, hours: Iterable[int]) -> None:
        """Drop the change marks of tiles that have expired."""
        fields = list(hours)
        if fields:
            with mapped_errors("forgetting old tiles"):
                execute(self.client, "HDEL", marks_key(self.generation, partition), *fields)

    def put_domain_trending(self, by_domain: Mapping[int, Trending]) -> None:
        """Replace the trending items of those domains."""
        commands = [
            ("SET", domain_trending_key(d), msgspec.json.encode(t), "EX", DOMAIN_TRENDING_S)
            for d, t in by_domain.items()
        ]
        pipelined(self.client, commands, "writing trending items by domain")

    @property
    def _field(self) -> bytes:
        return b"mark:%d" % self.source


class SessionNote(NamedTuple):
    """What a sweep found out about one user: the marker after it, and records to be sent."""

    user_id: int
    expected: bytes  # the marker it was worked out from, empty when there was none
    marker: bytes
    records: tuple[tuple[int, bytes], ...]  # (session_id, record)


class Unsent(NamedTuple):
    """A closed session's record that may not have been sent yet."""

    bucket: int
    field: bytes  # "user:session"
    record: bytes

    @property
    def user(self) -> bytes:
        """The decimal user id, which is the record's key."""
        return self.field.split(b":")[0]


@dataclass(frozen=True)
class SessionStore:
    """Which sessions of one generation are closed and sent."""

    client: RedisClient
    generation: int

    def scan_users(self, cursor: int) -> tuple[int, list[int]]:
        """Return the next cursor (0: the round is over) and some users; each comes at least once.

        A user whose row exists during the whole round is found, whatever else is written.
        """
        pattern = f"{PREFIX}:*:g{self.generation}:row:*"
        with mapped_errors("looking for users"):
            after, found = scan_step(self.client, cursor, pattern, count=SCAN_COUNT)
        return after, [int(key.rsplit(b":", 1)[1]) for key in found]

    def markers(self, bucket_of_user: Mapping[int, int]) -> dict[int, bytes]:
        """Return the users' markers, empty for a user no sweep has seen."""
        users = list(bucket_of_user)
        commands: list[tuple[Any, ...]] = [
            ("HGET", markers_key(self.generation, bucket_of_user[user]), user) for user in users
        ]
        replies = pipelined(self.client, commands, "reading session markers")
        return {user: reply or b"" for user, reply in zip(users, replies, strict=True)}

    def read_histories(self, user_ids: Sequence[int]) -> list[tuple[bytes | None, Records]]:
        """Return each user's row, and the records of the chunks that waited a moment later.

        Rows are read first: what leaves a tail in between is in both, never in neither.
        """
        rows: list[tuple[Any, ...]] = [("GET", row_key(self.generation, u)) for u in user_ids]
        chunks = [("HGETALL", chunks_key(self.generation, user)) for user in user_ids]
        replies = pipelined(self.client, [*rows, *chunks], "reading users' histories")
        return [
            (row, np.frombuffer(b"".join(decode_chunks(waiting).records.values()), RECORD))
            for row, waiting in zip(replies[: len(user_ids)], replies[len(user_ids) :], strict=True)
        ]

    def note(self, bucket: int, notes: Sequence[SessionNote]) -> int:
        """Move the markers and put the records into the outbox; return how many users it took.

        A user whose marker has moved meanwhile is left alone.
        """
        args: list[Any] = []
        for note in notes:
            fields = [
                part
                for session_id, record in note.records
                for part in (b"%d:%d" % (note.user_id, session_id), record)
            ]
            args += (note.user_id, note.expected, note.marker, len(fields), *fields)
        names = [markers_key(self.generation, bucket), outbox_key(self.generation, bucket)]
        with mapped_errors("noting closed sessions"):
            return run_script(self.client, _source("close_sessions"), names, args)

    def unsent(self, buckets: Sequence[int]) -> list[Unsent]:
        """Return what those buckets' outboxes hold."""
        replies = pipelined(
            self.client,
            [("HGETALL", outbox_key(self.generation, bucket)) for bucket in buckets],
            "reading closed sessions",
        )
        return [
            Unsent(bucket, field, record)
            for bucket, reply in zip(buckets, replies, strict=True)
            for field, record in reply.items()
        ]

    def sent(self, records: Sequence[Unsent]) -> None:
        """Take records out of the outbox that the broker has acknowledged."""
        pipelined(
            self.client,
            [("HDEL", outbox_key(self.generation, one.bucket), one.field) for one in records],
            "clearing sent sessions",
        )
