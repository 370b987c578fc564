"""What generations a Redis holds, how each was built, and how one is taken away again."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from features import keys
from features.config import StateConfig, config_from_json
from features.errors import GenerationError, StoreFullError
from features.redis_client import execute, infos, mapped_errors, pipelined, scan

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from features.redis_client import RedisClient

# Keys a SCAN looks at before it answers: under a millisecond of a Redis that others use meanwhile.
SCAN_COUNT: Final = 2_000
# A build that fills Redis makes the live worker wait. It ends itself while this share is free.
MEMORY_SHARE_MAX: Final = 0.9

_CONFIG_KEY: Final = re.compile(rb"^moveline:generation:g(\d+)$")
_ROW_KEY: Final = re.compile(rb":g(\d+):row:(\d+)$")


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """How a replay builds a generation: a resumed replay must have been asked for the same.

    Attributes:
        topic: the log it is built from.
        origin: "earliest", "lake" or "time".
        from_ms: with origin "time", the append time it starts at.
        to_ms: the append time it ends before; None: it is built up to the end.
        users: digest of the chosen users, None for everybody.
        num_users: how many were chosen.
        starts: the first offset by "partition" of the log's first topic and "source:partition" of
            those after it; see `start_of`.
        is_dropping: it is being deleted; what is left of it is not to be used.
    """

    topic: str
    origin: str
    from_ms: int | None = None
    to_ms: int | None = None
    users: str | None = None
    num_users: int = 0
    starts: dict[str, int] = {}
    is_dropping: bool = False

    @property
    def is_partial(self) -> bool:
        """Return whether it lacks users or their beginnings, so that it can never be live."""
        return self.users is not None or self.origin == "time"

    def start_of(self, source: int, partition: int) -> int:
        """Return the first offset of a partition; a topic that came later counts from its own."""
        return self.starts.get(start_field(source, partition), 0)

    def asked_for(self) -> tuple[object, ...]:
        """Return what the operator chose, which decides what the state is."""
        return (self.topic, self.origin, self.from_ms, self.to_ms, self.users)

    def __str__(self) -> str:
        """Say it as the command line would."""
        text = f"--from {self.origin if self.from_ms is None else self.from_ms}"
        text += "" if self.to_ms is None else f" --to {self.to_ms}"
        return text + ("" if self.users is None else f" --users ({self.num_users:,} users)")


def start_field(source: int, partition: int) -> str:
    """Return the name under which `Built.starts` holds a partition.

    >>> start_field(0, 3), start_field(1, 3)
    ('3', '1:3')
    """
    return f"{source}:{partition}" if source else str(partition)


@dataclass(frozen=True)
class Generations:
    """The generations of one Redis."""

    client: RedisClient

    def recorded(self) -> dict[int, StateConfig]:
        """Return the rules of every generation there is, by number."""
        with mapped_errors("listing generations"):
            found = [
                (int(match[1]), execute(self.client, "GET", match[0]))
                for match in map(_CONFIG_KEY.match, self._scan(f"{keys.PREFIX}:generation:g*"))
                if match
            ]
        return {number: config_from_json(raw) for number, raw in sorted(found) if raw is not None}

    def built(self, generation: int) -> Built | None:
        """Return how a replay builds it; None when workers did from the start."""
        with mapped_errors("reading how a generation was built"):
            raw = execute(self.client, "GET", keys.built_key(generation))
        return None if raw is None else msgspec.json.decode(raw, type=Built)

    def claim(self, generation: int, built: Built) -> Built:
        """Record how the generation is built; return the record, perhaps that of an earlier run.

        Raises:
            GenerationError: it was built otherwise, or is being dropped.
        """
        number = f"g{generation}"
        if self.built(generation) is None and generation in self.recorded():
            raise GenerationError(
                f"{number} is kept by its workers, not built by a replay: replay into another "
                f"generation, or drop it first: moveline drop {number}"
            )
        with mapped_errors("claiming the generation"):
            key = keys.built_key(generation)
            execute(self.client, "SET", key, msgspec.json.encode(built), "NX")
        recorded = self.built(generation)
        assert recorded is not None
        if recorded.is_dropping:
            raise GenerationError(
                f"{number} is being dropped; let that end first: moveline drop {number}"
            )
        if recorded.asked_for() != built.asked_for():
            raise GenerationError(
                f"{number} is being built with `{recorded}` from {recorded.topic}, this replay "
                f"asks for `{built}` from {built.topic}: repeat the former to resume, or drop it: "
                f"moveline drop {number}"
            )
        return recorded

    def refuse_some_users(self, generation: int) -> None:
        """Return unless only chosen users are in it: a worker would begin the others halfway.

        Raises:
            GenerationError: it was built with `--users`.
        """
        built = self.built(generation)
        if built is not None and built.users is not None:
            raise GenerationError(
                f"g{generation} holds {built.num_users:,} chosen users (`{built}`) and takes no "
                "worker: it is for comparing. Build one for all: moveline replay --into gN"
            )

    def count_users(self) -> Counter[int]:
        """Return how many users each generation holds; looks at every key."""
        with mapped_errors("counting users"):
            matches = map(_ROW_KEY.search, self._scan(f"{keys.PREFIX}:{{b*}}:g*:row:*"))
            return Counter(int(match[1]) for match in matches if match)

    def users(self, generation: int, keep: Callable[[int], bool]) -> list[int]:
        """Return the users of a generation that `keep` wants, sorted; looks at every key."""
        with mapped_errors("listing users"):
            pattern = f"{keys.PREFIX}:{{b*}}:g{generation}:row:*"
            matches = map(_ROW_KEY.search, self._scan(pattern))
            users = {int(match[2]) for match in matches if match}
        return sorted(filter(keep, users))

    def drop(self, generation: int) -> Iterator[int]:
        """Delete a generation step by step, yielding how many keys each step deleted.

        Interrupted, it is marked as being dropped, and dropping it again ends it. Checkpoints go
        first: without them nobody takes what is left for complete.
        """
        built = self.built(generation) or Built(topic="", origin="earliest")
        dropping = msgspec.structs.replace(built, is_dropping=True)
        with mapped_errors("marking the generation as being dropped"):
            execute(self.client, "SET", keys.built_key(generation), msgspec.json.encode(dropping))
        names = [keys.checkpoints_key(generation, number) for number in range(keys.NUM_BUCKETS)]
        yield self._unlink([name.encode() for name in names])
        batch: list[bytes] = []
        for key in self._scan(f"{keys.PREFIX}:{{b*}}:g{generation}:*"):
            batch.append(key)
            if len(batch) == SCAN_COUNT:
                yield self._unlink(batch)
                batch = []
        yield self._unlink(batch)
        last = (
            keys.row_format_key(generation),
            keys.generation_key(generation),
            keys.built_key(generation),
        )
        yield self._unlink([key.encode() for key in last])

    def refuse_full(self, generation: int) -> None:
        """Return while building `generation` leaves Redis room for live traffic.

        Raises:
            StoreFullError: MEMORY_SHARE_MAX of maxmemory is in use.
        """
        with mapped_errors("reading memory figures"):
            servers = infos(self.client, "memory")
        for memory in servers:
            used, limit = int(memory["used_memory"]), int(memory["maxmemory"])
            if limit and used > MEMORY_SHARE_MAX * limit:
                raise StoreFullError(
                    f"Redis uses {used / limit:.0%} of maxmemory; above {MEMORY_SHARE_MAX:.0%} g"
                    f"{generation} would take room from live traffic. Raise maxmemory and repeat "
                    f"the command, which resumes, or drop a generation: moveline drop g{generation}"
                )

    def _unlink(self, names: Sequence[bytes]) -> int:
        commands = [("UNLINK", name) for name in names]
        return sum(pipelined(self.client, commands, "dropping a generation"))

    def _scan(self, pattern: str) -> Iterator[bytes]:
        return scan(self.client, pattern, count=SCAN_COUNT)
