"""How many chunks of a user wait in Redis: beyond that the oldest leave once the lake has them.

Dropping a chunk is no part of the write that makes one. Whether the lake has its events is a fact
about the log, true for every owner of the partition and every Redis that may come back, so it can
happen at any later moment, or twice; and a user with more events than the lake can follow does not
keep all of them. What is remembered here is lost with the process: the user's next chunk notes it
again.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from features import lake
from features.chunks import ChunkStore, Drop
from features.errors import LakeError
from features.state import RECORD_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from features.redis import StateStore
    from features.state import Change, Position
    from streams.metrics import WorkerMetrics

log = logging.getLogger("moveline.worker")

# 4,096 events of the default chunk size, seven times the tail: 200 kB of a user at most.
WAITING_CHUNKS_DEFAULT: Final = 64
# How often the lake's folders are listed while somebody is over the cap.
DROP_INTERVAL_S: Final = 5.0
# Users whose chunks leave between two micro-batches: some ten milliseconds of Redis.
DROPS_MAX: Final = 1_000
# Users remembered as being over the cap, about 200 bytes each; who is not noted now is noted with
# the next chunk.
NOTED_MAX: Final = 100_000
# The lake is a few seconds behind; so long behind, somebody should look.
LAKE_PATIENCE_S: Final = 60.0


class Chunks(Protocol):
    """What is needed of Redis: `features.chunks.ChunkStore` keeps these promises."""

    def drop(self, drops: Mapping[int, Drop]) -> int:
        """Drop each user's oldest chunks if they are the ones meant, and mark the hole."""
        ...


class Noted(NamedTuple):
    """A user over the cap: no event of the chunks to be dropped comes after `last`."""

    drop: Drop
    last: Position
    since_s: float


@dataclass
class ChunkCap:
    """Remembers who is over the cap, and drops what the lake has.

    Attributes:
        chunks: the generation's chunks.
        ends: by (source, partition), the offset before which the lake has every event.
        chunks_max: chunks that stay, at least 1.
    """

    chunks: Chunks
    ends: Callable[[int, int], int]
    metrics: WorkerMetrics
    chunks_max: int = WAITING_CHUNKS_DEFAULT
    clock: Callable[[], float] = time.monotonic
    noted: dict[int, Noted] = field(default_factory=dict)
    known_ends: dict[tuple[int, int], int] = field(default_factory=dict)
    asked_at: float = float("-inf")
    is_done: bool = True
    is_told: bool = False

    def note(self, user_id: int, change: Change) -> None:
        """Remember a user of whom Redis has just acknowledged a chunk, if there are too many.

        Who is noted already stays as he is: the lake could never catch up with somebody busy.
        """
        keep_from = change.state.num_chunks - self.chunks_max
        if keep_from > 0 and user_id not in self.noted and len(self.noted) < NOTED_MAX:
            newest = change.chunks[-1]
            drop = Drop(keep_from, newest.number, newest.records[:RECORD_BYTES])
            self.noted[user_id] = Noted(drop, change.state.position, self.clock())

    def drop(self) -> None:
        """Drop what the lake has by now, and say so when it is far behind.

        Raises:
            StoreError: Redis did not answer; who was noted still is.
        """
        is_due = self.clock() - self.asked_at > DROP_INTERVAL_S
        if not self.noted or (self.is_done and not is_due):
            return
        if is_due:
            self.asked_at = self.clock()
            self.known_ends = {}
        ready = self._ready()
        self.is_done = len(ready) < DROPS_MAX
        if ready:
            self.metrics.chunks_dropped.inc(self.chunks.drop(ready))
        for user in ready:
            del self.noted[user]
        self.metrics.over_cap.set(len(self.noted))
        self._tell()

    def _ready(self) -> dict[int, Drop]:
        """Return what may leave: the users whose oldest chunks the lake has."""
        ends, ready = self.known_ends, dict[int, Drop]()
        for user, noted in self.noted.items():
            place = noted.last.source, noted.last.partition
            if place not in ends:
                ends[place] = self.ends(*place)
            if noted.last.offset < ends[place]:
                ready[user] = noted.drop
                if len(ready) == DROPS_MAX:
                    break
        return ready

    def _tell(self) -> None:
        """Warn once when somebody has waited for the lake for long, until nobody has."""
        oldest_s = min((one.since_s for one in self.noted.values()), default=self.clock())
        is_behind = self.clock() - oldest_s > LAKE_PATIENCE_S
        if is_behind and not self.is_told:
            log.warning(
                "%d users have more than %d chunks in Redis (worker.waiting_chunks_max) that the "
                "lake does not have yet, so none is dropped: is `moveline lake` running, with the "
                "same lake.path?",
                len(self.noted),
                self.chunks_max,
            )
        self.is_told = is_behind


def keep_to_cap(
    store: StateStore, root: Path | None, topic: str, metrics: WorkerMetrics, *, chunks_max: int
) -> ChunkCap | None:
    """Return what keeps a generation's users to the cap; None without a lake, and says so."""
    if root is None:
        log.info("no lake: every chunk stays in Redis, whatever worker.waiting_chunks_max is")
        return None
    chunks = ChunkStore(store.client, store.generation)
    return ChunkCap(chunks, LakeEnds(root, topic), metrics, chunks_max)


@dataclass(frozen=True)
class LakeEnds:
    """How far the lake has the log, asked of its folders' file names; `topic` is the first one."""

    root: Path
    topic: str

    def __call__(self, source: int, partition: int) -> int:
        """Return the offset before which every event is in the lake; 0 if the first ones are not.

        The lake has a topic whole before it begins with the next one (streams/lake_chain.py).
        """
        try:
            names = lake.log_topics(self.root, self.topic)
            if source >= len(names) or not all(map(self._has_beginning, names[:source])):
                return 0
            files = lake.list_partition(self.root, names[source], partition)
        except (LakeError, OSError) as error:
            log.warning("chunks stay in Redis: %s", error)
            return 0
        # A lake that begins later may lack the beginning of a user's chunks.
        return files[-1].end + 1 if files and files[0].start == 0 else 0

    def _has_beginning(self, name: str) -> bool:
        files = lake.list_files(self.root, name)
        first = {file.partition: file.start for file in reversed(files)}
        return not any(first.values())
