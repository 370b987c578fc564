"""The one door to Redis: state rows, catalogue, pointers. Knows keys and scripts, no meaning."""

from __future__ import annotations

import hashlib
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from itertools import tee
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import msgspec
import redis
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import NoScriptError, OutOfMemoryError, RedisError, ResponseError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry

from features import keys
from features.catalogue import Item, decode_item, encode_item
from features.config import StateConfig, config_from_json
from features.errors import (
    SchemaMismatchError,
    StoreError,
    StoreFullError,
    StoreUnavailableError,
    UnsafeStoreError,
)
from features.pipeline import replies_to
from features.row import (
    FORMATS,
    POSITION_FROM_END,
    ROW_FORMAT,
    RowFormat,
    RowWrite,
    as_foreign,
    decode_newest,
    decode_row,
    format_of,
    known_format,
    newest_bytes,
)
from features.state import EMPTY_STATE, UserState, rebuild_window

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from redis.client import Pipeline

# A read for scoring that takes longer is worth less than a degraded answer.
TIMEOUT_S_DEFAULT: Final = 5.0
# One pipeline's size: past it Redis buffers replies for nothing.
PIPELINE_MAX: Final = 2_000


@contextmanager
def mapped_errors(doing: str) -> Iterator[None]:
    """Inside the block, what Redis raises becomes an error of ours that says what was tried."""
    try:
        yield
    except (RedisConnectionError, RedisTimeoutError) as error:
        raise StoreUnavailableError(
            f"Redis did not answer while {doing} ({str(error).rstrip('.')}). "
            "Check `moveline status` and the redis.url setting."
        ) from error
    except OutOfMemoryError as error:
        raise StoreFullError(
            f"Redis is at maxmemory while {doing}: raise it, or drop a generation."
        ) from error
    except RedisError as error:
        raise StoreError(f"Redis refused while {doing}: {error}") from error


def connect(url: str, *, timeout_s: float = TIMEOUT_S_DEFAULT) -> redis.Redis:
    """Return a client that never retries by itself: a lost reply must not be written twice."""
    return redis.Redis.from_url(
        url,
        socket_timeout=timeout_s,
        socket_connect_timeout=timeout_s,
        retry=Retry(NoBackoff(), 0),
        decode_responses=False,
    )


def execute(client: redis.Redis, *command: str | bytes | float) -> Any:  # noqa: ANN401 - Redis replies
    """Return the reply to one command; the library's own type of it says nothing."""
    run: Callable[..., Any] = client.execute_command
    return run(*command)


def _queue(pipeline: Pipeline, *command: str | bytes | float) -> None:
    execute: Callable[..., Any] = pipeline.execute_command
    execute(*command)


@dataclass(frozen=True)
class Pointers:
    """What is live: the model version that answers and the generation it reads."""

    model_version: int | None
    generation: int


@dataclass(frozen=True)
class Trending:
    """Items for users nothing is known of, best first, with their scores."""

    item_ids: tuple[int, ...]
    scores: tuple[float, ...]


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
def _script_digest() -> str:
    return hashlib.sha1(_script(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class StateStore:
    """State of one generation in Redis.

    Attributes:
        row_format: what rows are written in: see `as_recorded`.
        formats: what rows can be read.
    """

    client: redis.Redis
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
            execute(self.client, "PING")

    def refuse_eviction(self) -> None:
        """Return if Redis keeps what it is given.

        Raises:
            UnsafeStoreError: a maxmemory-policy other than noeviction.
        """
        with mapped_errors("reading maxmemory-policy"):
            reply = execute(self.client, "CONFIG GET", "maxmemory-policy")
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
            return self._write_streamed(writes)
        except _ScriptMissingError:
            with mapped_errors("loading the write script"):
                execute(self.client, "SCRIPT LOAD", _script())
            return self._write_streamed(again)

    def _write_streamed(self, writes: Iterable[BucketWrite]) -> list[int]:
        doing = "writing states"
        with mapped_errors(doing):
            replies = replies_to(self.client, map(self._bucket_command, writes))
        return _refuse_errors(replies, doing)

    def _bucket_command(self, write: BucketWrite) -> tuple[Any, ...]:
        values: list[Any] = [
            b"%d:%d" % (write.source, write.partition),
            b"" if write.expected < 0 else b"%d" % write.expected,
            write.advance_to,
            POSITION_FROM_END,
        ]
        for expected, keep, data, chunks in write.rows.values():
            values += (expected, keep, data, len(chunks), *chunks)
        return (
            "EVALSHA",
            _script_digest(),
            1 + 2 * len(write.rows),
            keys.checkpoints_key(self.generation, write.bucket),
            *keys.user_keys(self.generation, write.bucket, write.rows),
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

    def read_states(self, user_ids: Sequence[int], *, newest: int) -> list[UserState | None]:
        """Return states with at least the newest records asked for, as far as there are any.

        One round trip. Only rows that remember departed ids of late events can come back short,
        and those are read again, whole.

        Raises:
            StoreError: Redis did not answer.
            CorruptRowError: stored bytes are not a row.
        """
        rows = self.read_rows(user_ids, newest=newest)
        read = [None if row is None else decode_newest(row, self.formats) for row in rows]
        short = [
            i
            for i, found in enumerate(read)
            if found is not None and found[1] and found[0].records.size < newest
        ]
        states = [None if found is None else found[0] for found in read]
        if short:
            whole = self.read_rows([user_ids[i] for i in short])
            for i, row in zip(short, whole, strict=True):
                states[i] = None if row is None else decode_row(row, self.formats)
        return states

    def read_rows(
        self, user_ids: Sequence[int], *, newest: int | None = None
    ) -> list[bytes | None]:
        """Return the users' rows in one round trip, each read atomically; None when unknown.

        Args:
            user_ids: whose rows.
            newest: only this many of the newest records (and all of the trailer).
        """
        if newest is None:
            commands: list[tuple[Any, ...]] = [
                ("GET", keys.row_key(self.generation, user)) for user in user_ids
            ]
        else:
            start = -newest_bytes(newest)
            commands = [
                ("GETRANGE", keys.row_key(self.generation, user), start, -1) for user in user_ids
            ]
        return [row or None for row in self._pipelined(commands, "reading states")]

    def _pipelined(self, commands: Sequence[tuple[Any, ...]], doing: str) -> list[Any]:
        replies: list[Any] = []
        for start in range(0, len(commands), PIPELINE_MAX):
            pipeline = self.client.pipeline(transaction=False)
            for command in commands[start : start + PIPELINE_MAX]:
                _queue(pipeline, *command)
            with mapped_errors(doing):
                replies += pipeline.execute(raise_on_error=False)
        return _refuse_errors(replies, doing)


def _refuse_errors(replies: list[Any], doing: str) -> list[Any]:
    """Return the replies if none of them is an error."""
    for reply in replies:
        if isinstance(reply, NoScriptError):
            raise _ScriptMissingError(str(reply))
        if isinstance(reply, ResponseError):
            with mapped_errors(doing):
                raise reply
    return replies


class _ScriptMissingError(StoreError):
    """Redis does not know the script: load it and run the pipeline again.

    Running the whole pipeline twice is safe: a bucket that was written refuses its second write.
    """


@dataclass(frozen=True)
class CatalogueStore:
    """Items, domains and pointers in Redis: small, shared by all generations."""

    client: redis.Redis

    def put_items(self, items: Iterable[Item]) -> None:
        """Store catalogue entries; the last one of an item wins (its topic is compacted)."""
        with mapped_errors("writing items"):
            pipeline = self.client.pipeline(transaction=False)
            for item in items:
                field = b"%d" % item.item_id
                _queue(pipeline, "HSET", keys.items_key(item.item_id), field, encode_item(item))
                verb = "SREM" if item.available else "SADD"
                _queue(pipeline, verb, keys.WITHDRAWN_KEY, field)
            pipeline.execute()

    def get_items(self, item_ids: Sequence[int]) -> list[Item | None]:
        """Return the entries in the order asked, None where the catalogue has none."""
        with mapped_errors("reading items"):
            pipeline = self.client.pipeline(transaction=False)
            for item_id in item_ids:
                _queue(pipeline, "HGET", keys.items_key(item_id), b"%d" % item_id)
            raw = pipeline.execute()
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
        """Make a model version and a generation the live ones, at once for every reader."""
        values: list[str | int] = ["generation", pointers.generation]
        if pointers.model_version is not None:
            values += ["model_version", pointers.model_version]
        with mapped_errors("writing pointers"):
            execute(self.client, "HSET", keys.POINTERS_KEY, *values)

    def put_items_read(self, partition: int, offset: int) -> None:
        """Remember up to where the items topic is applied."""
        with mapped_errors("writing the catalogue's position"):
            execute(self.client, "HSET", keys.ITEMS_READ_KEY, partition, offset)

    def advance_items_read(self, partition: int, *, expected: int, offset: int) -> bool:
        """Remember up to where the items topic is applied; False if it stood elsewhere."""
        with mapped_errors("writing the catalogue's position"):
            script = _advance_items()
            place = keys.ITEMS_READ_KEY, partition
            reply = execute(self.client, "EVAL", script, 1, *place, expected, offset)
        return bool(reply)

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
        version = raw.get(b"model_version")
        return Pointers(None if version is None else int(version), int(raw[b"generation"]))

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


def count_users(client: redis.Redis, generation: int) -> int:
    """Return how many users a generation holds. Scans the keyspace: for people, not for code."""
    with mapped_errors("counting users"):
        pattern = f"{keys.PREFIX}:*:g{generation}:row:*"
        return sum(1 for _ in client.scan_iter(match=pattern, count=10_000))


def memory_used(client: redis.Redis) -> float:
    """Return the bytes Redis holds as data, by its own count."""
    with mapped_errors("reading memory"):
        return float(execute(client, "INFO", "memory")["used_memory_dataset"])
