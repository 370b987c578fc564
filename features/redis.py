"""State rows, catalogue and pointers in Redis. Knows keys and scripts, no meaning."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import tee
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Self

import msgspec

from features import keys
from features.catalogue import Item, decode_item, encode_item
from features.config import StateConfig, config_from_json
from features.errors import SchemaMismatchError, StaleTokenError, UnsafeStoreError
from features.redis_client import (
    PIPELINE_MAX,
    TIMEOUT_S_DEFAULT,
    RedisClient,
    ScriptMissingError,
    connect,
    execute,
    infos,
    load_script,
    mapped_errors,
    pipelined,
    primaries,
    read_strings,
    run_script,
    scan,
    streamed,
)
from features.row import (
    FORGET,
    FORMATS,
    POSITION_FROM_END,
    ROW_FORMAT,
    RowFormat,
    RowWrite,
    as_foreign,
    decode_newest,
    decode_row,
    format_of,
    is_short,
    known_format,
    newest_bytes,
)
from features.state import EMPTY_STATE, UserState, rebuild_window

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

# Who uses a store connects to it too, and imports both from here.
__all__ = [
    "CHECKPOINT_DIFFERS",
    "PIPELINE_MAX",
    "TIMEOUT_S_DEFAULT",
    "WRITTEN",
    "BucketWrite",
    "Canary",
    "CatalogueStore",
    "Pointers",
    "RedisClient",
    "StateStore",
    "Trending",
    "connect",
    "count_users",
    "execute",
    "mapped_errors",
    "memory_used",
]


class Canary(msgspec.Struct, frozen=True, omit_defaults=True):
    """A version that is being tried beside the live one.

    Attributes:
        version: of the retrieval model.
        memory_version: what it reads, None if nothing.
        mode: `canary` answers its share of users; `shadow` is only logged beside.
        share: of users, above 0, at most a half; as many more are the control group.
        since_ms: when it began, epoch ms.
    """

    version: int
    memory_version: str | None
    mode: Literal["canary", "shadow"]
    share: float
    since_ms: int


class Pointers(msgspec.Struct, frozen=True, omit_defaults=True):
    """What is live: the model version that answers, the generation and the memories it reads.

    Attributes:
        token: of whoever wrote them (streams/control.py); those with the greatest hold.
    """

    model_version: int | None
    generation: int
    memory_version: str | None = None
    token: int = 0
    canary: Canary | None = None


class Trending(msgspec.Struct, frozen=True, omit_defaults=True):
    """Items for users nothing is known of, best first, with their scores.

    Attributes:
        total: the scores of all items, those that are not listed too; 0 where nobody knows it.
        half_life_h: the hours in which an event's weight halved; 0 likewise.
    """

    item_ids: tuple[int, ...]
    scores: tuple[float, ...]
    total: float = 0.0
    half_life_h: int = 0


class BucketWrite(NamedTuple):
    """Users of one bucket whose events came from one partition, and the checkpoint after them."""

    bucket: int
    source: int
    partition: int
    expected: int  # -1: no checkpoint yet
    advance_to: int
    rows: Mapping[int, RowWrite]


WRITTEN: Final = 1
CHECKPOINT_DIFFERS: Final = 0


@cache
def _script() -> bytes:
    return files("features").joinpath("lua/write_bucket.lua").read_bytes()


@cache
def _advance_items() -> bytes:
    return files("features").joinpath("lua/advance_items.lua").read_bytes()


@cache
def _put_pointers() -> bytes:
    return files("features").joinpath("lua/put_pointers.lua").read_bytes()


@cache
def _script_digest() -> str:
    return hashlib.sha1(_script(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class StateStore:
    """State of one generation in Redis.

    Attributes:
        row_format: what rows are written in: see `as_recorded`.
        formats: what rows can be read.
    """

    client: RedisClient
    generation: int
    config: StateConfig
    row_format: RowFormat = FORMATS[ROW_FORMAT]
    formats: Mapping[int, RowFormat] = field(default_factory=lambda: FORMATS)

    def ping(self) -> None:
        """Return once Redis answers.

        Raises:
            StoreUnavailableError: it does not.
        """
        with mapped_errors("pinging"):
            for server in primaries(self.client):
                execute(server, "PING")

    def refuse_eviction(self) -> None:
        """Return if Redis keeps what it is given.

        Raises:
            UnsafeStoreError: a maxmemory-policy other than noeviction.
        """
        with mapped_errors("reading maxmemory-policy"):
            replies = [
                execute(server, "CONFIG GET", "maxmemory-policy")
                for server in primaries(self.client)
            ]
        for reply in replies:
            policy = reply.get("maxmemory-policy", reply.get(b"maxmemory-policy"))
            if policy not in {"noeviction", b"noeviction"}:
                raise UnsafeStoreError(
                    f"maxmemory-policy is {policy!r}: Redis would drop users silently. "
                    "Run `redis-cli config set maxmemory-policy noeviction`."
                )

    def claim_generation(self) -> None:
        """Record the generation's config, or check that the recorded one is equal.

        Raises:
            SchemaMismatchError: the generation was built under other rules.
        """
        key = keys.generation_key(self.generation)
        with mapped_errors("claiming the generation"):
            execute(self.client, "SET", key, self.config.to_json(), "NX")
            recorded = execute(self.client, "GET", key)
        if recorded != self.config.to_json():
            raise SchemaMismatchError(
                f"generation g{self.generation} was built with {recorded!r}, this worker has "
                f"{self.config.to_json()!r}: use the recorded rules, or another generation."
            )

    def as_recorded(self) -> Self:
        """Return this store as one that writes the row format its generation's record names.

        Workers of two builds may keep one generation: until all of them know a format, nobody
        writes it. Who was started before the record changed goes on as before.

        Raises:
            UnknownRowFormatError: this build does not know it.
        """
        with mapped_errors("reading the generation's row format"):
            number = execute(self.client, "GET", keys.row_format_key(self.generation))
        row_format = known_format(int(number or ROW_FORMAT), self.formats)
        return replace(self, row_format=row_format)

    def record_row_format(self, number: int) -> None:
        """Let writers of this generation that start from now on write rows in that format.

        Raises:
            UnknownRowFormatError: this build does not know it.
        """
        known_format(number, self.formats)
        with mapped_errors("recording the generation's row format"):
            execute(self.client, "SET", keys.row_format_key(self.generation), number)

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]:
        """Return each user's whole state, EMPTY_STATE for users Redis does not know.

        Raises:
            StoreError: Redis did not answer.
            CorruptRowError: stored bytes are not a row.
        """
        rows = self._pipelined(
            [("GET", keys.row_key(self.generation, user)) for user in user_ids], "loading states"
        )
        return {user: self._state_in(row) for user, row in zip(user_ids, rows, strict=True)}

    def _state_in(self, row: bytes | None) -> UserState:
        if row is None:
            return EMPTY_STATE
        state = rebuild_window(decode_row(row, self.formats), self.config.dedup_window)
        is_ours = format_of(row, self.formats).number == self.row_format.number
        return state if is_ours else as_foreign(state)

    def write_buckets(self, writes: Iterable[BucketWrite]) -> list[int]:
        """Write each bucket whole or not at all; return a reply for each.

        Redis works on the first ones while `writes` still yields later ones.

        WRITTEN, or what differed from what the write was computed from: CHECKPOINT_DIFFERS when
        Redis is older or another worker wrote, a negative number for a user's row.

        Raises:
            StoreError: Redis did not answer or is full; some buckets may be written.
        """
        writes, again = tee(writes)
        try:
            return self._streamed(writes)
        except ScriptMissingError:
            load_script(self.client, _script())
            return self._streamed(again)

    def _streamed(self, writes: Iterable[BucketWrite]) -> list[int]:
        return streamed(self.client, map(self._bucket_command, writes), "writing states")

    def _bucket_command(self, write: BucketWrite) -> tuple[Any, ...]:
        values: list[Any] = [
            b"%d:%d" % (write.source, write.partition),
            b"" if write.expected < 0 else b"%d" % write.expected,
            write.advance_to,
            POSITION_FROM_END,
        ]
        for expected, keep, data, chunks in write.rows.values():
            values += (expected, keep, data, len(chunks), *chunks)
        forgotten = [
            keys.memories_key(self.generation, user)
            for user, row in write.rows.items()
            if row.keep == FORGET
        ]
        return (
            "EVALSHA",
            _script_digest(),
            1 + 2 * len(write.rows) + len(forgotten),
            keys.checkpoints_key(self.generation, write.bucket),
            *keys.user_keys(self.generation, write.bucket, write.rows),
            *forgotten,
            *values,
        )

    def read_checkpoints(self, source: int, partitions: Sequence[int]) -> dict[int, list[int]]:
        """Return for each partition the next offset of each bucket, -1 where there is none."""
        fields = [b"%d:%d" % (source, partition) for partition in partitions]
        if not fields:
            return {}
        replies = self._pipelined(
            [
                ("HMGET", keys.checkpoints_key(self.generation, bucket), *fields)
                for bucket in range(keys.NUM_BUCKETS)
            ],
            "reading checkpoints",
        )
        return {
            partition: [-1 if reply[i] is None else int(reply[i]) for reply in replies]
            for i, partition in enumerate(partitions)
        }

    def read_bucket_ends(self, places: Sequence[tuple[int, int, int]]) -> list[int]:
        """Return the next offset of each (bucket, source, partition), -1 where there is none.

        What is before it is in this Redis, and so in every row that is read afterwards.
        """
        replies = self._pipelined(
            [
                ("HGET", keys.checkpoints_key(self.generation, bucket), f"{source}:{partition}")
                for bucket, source, partition in places
            ],
            "reading checkpoints",
        )
        return [-1 if reply is None else int(reply) for reply in replies]

    def read_states(self, user_ids: Sequence[int], *, newest: int) -> list[UserState | None]:
        """Return states with at least the newest records asked for, as far as there are any.

        Raises:
            StoreError: Redis did not answer.
            CorruptRowError: stored bytes are not a row.
        """
        rows = self.read_rows(user_ids, newest=newest)
        return [None if row is None else decode_newest(row, self.formats)[0] for row in rows]

    def read_rows(
        self, user_ids: Sequence[int], *, newest: int | None = None
    ) -> list[bytes | None]:
        """Return the users' rows in one round trip, each read atomically; None when unknown.

        Only rows that remember departed ids of late events can come back short of the records
        asked for, and those are read again, whole.

        Args:
            user_ids: whose rows.
            newest: only this many of the newest records (and all of the trailer).

        Raises:
            StoreError: Redis did not answer.
        """
        if newest is not None:
            ends = self.read_ends(user_ids, newest=newest)
            return [None if row is None else bytes(row) for row in ends]
        commands = [("GET", keys.row_key(self.generation, user)) for user in user_ids]
        return [row or None for row in self._pipelined(commands, "reading states")]

    def read_ends(self, user_ids: Sequence[int], *, newest: int) -> list[memoryview | None]:
        """Return the ends of rows as `read_rows` does, where they came from the socket."""
        row_keys = [keys.row_key(self.generation, user) for user in user_ids]
        size = newest_bytes(newest)
        commands = [("GETRANGE", key, -size, -1) for key in row_keys]
        rows = read_strings(self.client, commands, "reading states", bytes_max=size)
        short = [i for i, row in enumerate(rows) if is_short(row, newest)]
        again = self._pipelined([("GET", row_keys[i]) for i in short], "reading states")
        for i, row in zip(short, again, strict=True):
            rows[i] = memoryview(row or b"")
        return [row or None for row in rows]

    def _pipelined(self, commands: Sequence[tuple[Any, ...]], doing: str) -> list[Any]:
        return pipelined(self.client, commands, doing)


@dataclass(frozen=True)
class CatalogueStore:
    """Items, domains and pointers in Redis: small, shared by all generations."""

    client: RedisClient

    def put_items(self, items: Iterable[Item]) -> None:
        """Store catalogue entries; the last one of an item wins (its topic is compacted)."""
        commands: list[tuple[Any, ...]] = []
        for item in items:
            field = b"%d" % item.item_id
            commands.append(("HSET", keys.items_key(item.item_id), field, encode_item(item)))
            verb = "SREM" if item.available else "SADD"
            commands.append((verb, keys.WITHDRAWN_KEY, field))
        pipelined(self.client, commands, "writing items")

    def get_items(self, item_ids: Sequence[int]) -> list[Item | None]:
        """Return the entries in the order asked, None where the catalogue has none."""
        commands = [("HGET", keys.items_key(item_id), b"%d" % item_id) for item_id in item_ids]
        raw = pipelined(self.client, commands, "reading items")
        return [None if entry is None else decode_item(entry) for entry in raw]

    def withdrawn(self) -> set[int]:
        """Return the ids of items that must not be recommended."""
        with mapped_errors("reading withdrawn items"):
            return {int(raw) for raw in execute(self.client, "SMEMBERS", keys.WITHDRAWN_KEY)}

    def put_domains(self, domains: Mapping[int, str]) -> None:
        """Remember which text a domain hash stands for."""
        if not domains:
            return
        with mapped_errors("writing domains"):
            pairs = [part for code, text in domains.items() for part in (b"%d" % code, text)]
            execute(self.client, "HSET", keys.DOMAINS_KEY, *pairs)

    def get_domains(self) -> dict[int, str]:
        """Return every known domain by its hash."""
        with mapped_errors("reading domains"):
            raw = execute(self.client, "HGETALL", keys.DOMAINS_KEY)
        return {int(code): text.decode() for code, text in raw.items()}

    def put_pointers(self, pointers: Pointers) -> None:
        """Make a model version and a generation the live ones, at once for every reader.

        Raises:
            StaleTokenError: Redis holds pointers with a greater token.
        """
        values: list[str | int | bytes] = [
            "generation",
            pointers.generation,
            "memory_version",
            pointers.memory_version or "",
            "canary",
            msgspec.json.encode(pointers.canary) if pointers.canary else "",
        ]
        if pointers.model_version is not None:
            values += ["model_version", pointers.model_version]
        with mapped_errors("writing pointers"):
            args = (pointers.token, *values)
            held = run_script(self.client, _put_pointers(), [keys.POINTERS_KEY], args)
        if held >= 0:
            raise StaleTokenError(pointers.token, held)

    def put_items_read(self, partition: int, offset: int) -> None:
        """Remember up to where the items topic is applied."""
        with mapped_errors("writing the catalogue's position"):
            execute(self.client, "HSET", keys.ITEMS_READ_KEY, partition, offset)

    def advance_items_read(self, partition: int, *, expected: int, offset: int) -> bool:
        """Remember up to where the items topic is applied; False if it stood elsewhere."""
        with mapped_errors("writing the catalogue's position"):
            place = [keys.ITEMS_READ_KEY]
            args = (partition, expected, offset)
            return bool(run_script(self.client, _advance_items(), place, args))

    def get_items_read(self) -> dict[int, int]:
        """Return up to where the items topic is applied, by partition."""
        with mapped_errors("reading the catalogue's position"):
            raw = execute(self.client, "HGETALL", keys.ITEMS_READ_KEY)
        return {int(partition): int(offset) for partition, offset in raw.items()}

    def get_pointers(self) -> Pointers | None:
        """Return what is live, None before anything was published."""
        with mapped_errors("reading pointers"):
            raw = execute(self.client, "HGETALL", keys.POINTERS_KEY)
        if b"generation" not in raw:
            return None
        version, canary = raw.get(b"model_version"), raw.get(b"canary")
        return Pointers(
            None if version is None else int(version),
            int(raw[b"generation"]),
            raw.get(b"memory_version", b"").decode() or None,
            int(raw.get(b"token", 0)),
            canary=msgspec.json.decode(canary, type=Canary) if canary else None,
        )

    def put_trending(self, trending: Trending) -> None:
        """Replace the trending items."""
        with mapped_errors("writing trending items"):
            execute(self.client, "SET", keys.TRENDING_KEY, msgspec.json.encode(trending))

    def get_trending(self) -> Trending | None:
        """Return the trending items, None before there were any."""
        with mapped_errors("reading trending items"):
            raw = execute(self.client, "GET", keys.TRENDING_KEY)
        return None if raw is None else msgspec.json.decode(raw, type=Trending)

    def recorded_config(self, generation: int) -> StateConfig | None:
        """Return the rules a generation was built with, None if it does not exist."""
        with mapped_errors("reading a generation's config"):
            raw = execute(self.client, "GET", keys.generation_key(generation))
        return None if raw is None else config_from_json(raw)


def count_users(client: RedisClient, generation: int) -> int:
    """Return how many users a generation holds. Scans the keyspace: for people, not for code."""
    with mapped_errors("counting users"):
        pattern = f"{keys.PREFIX}:*:g{generation}:row:*"
        return sum(1 for _ in scan(client, pattern, count=10_000))


def memory_used(client: RedisClient) -> float:
    """Return the bytes Redis holds as data, by its own count."""
    with mapped_errors("reading memory"):
        return float(sum(info["used_memory_dataset"] for info in infos(client, "memory")))
