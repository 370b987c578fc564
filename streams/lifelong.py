"""Compaction: folds the chunks that wait into every live memory, and drops what all have folded.

What there is to do is the difference between the chunks that have left a user's tail and those in
his memories, both read from Redis: a hint that is lost, doubled or late changes nothing.

  1. a memory with more chunks takes the place of the one it was made from, in one script;
  2. chunks that every live memory version has folded leave Redis, in another.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.keys import bucket_of
from features.lifelong import Memory, empty_memory, fold_into
from features.lifelong_store import (
    DropFolded,
    MemoryWrite,
    decode_memory,
    get_live_memories,
)
from features.state import RECORD
from scoring.errors import ScoringError
from streams.closing import decode_marker
from streams.nearline_metrics import NearlineMetrics

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from features.lifelong import Fold, LiveMemory
    from features.lifelong_store import LifelongStore, Marks
    from features.nearline import SessionStore

log = logging.getLogger("moveline.nearline")

# Chunks of one call of the compressor: some ten milliseconds of a core.
FOLD_CHUNKS_MAX: Final = 64
# Of one user in one call, so that a long backlog of one leaves room for others.
USER_CHUNKS_MAX: Final = 16


class Job(NamedTuple):
    """Chunks of one user to be folded next."""

    user_id: int
    begins: int
    numbers: range


def jobs_of(marks: Mapping[int, Marks], version: str) -> list[Job]:
    """Return what can be folded: the chunks after those in the memory, while none is missing."""
    jobs = []
    for user, mark in marks.items():
        folded = mark.folded[version]
        if mark.first <= folded < mark.num_chunks:
            end = min(mark.num_chunks, folded + USER_CHUNKS_MAX)
            jobs.append(Job(user, mark.begins, range(folded, end)))
    return jobs


def batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Yield the jobs in groups of at most FOLD_CHUNKS_MAX chunks."""
    group: list[Job] = []
    size = 0
    for job in jobs:
        if group and size + len(job.numbers) > FOLD_CHUNKS_MAX:
            yield group
            group, size = [], 0
        group.append(job)
        size += len(job.numbers)
    if group:
        yield group


def fold_chunks(fold: Fold, live: LiveMemory, base: Memory, chunks: Sequence[bytes]) -> Memory:
    """Return a memory with these chunks, the next ones, in it.

    Raises:
        ScoringError: the compressor is away.
    """
    for at in range(0, len(chunks), FOLD_CHUNKS_MAX):
        part = chunks[at : at + FOLD_CHUNKS_MAX]
        records = np.frombuffer(b"".join(part), RECORD).reshape(len(part), -1)
        base = fold_into(base, fold(live.lifelong_model_version, records))
    return base


@dataclass
class Compactor:
    """Looks at every user, a bounded step at a time.

    Attributes:
        sessions: which sessions are out: chunks of others stay until they are.
        cursor: where the round over all users stands; lost with the process, at no harm.
    """

    memories: LifelongStore
    sessions: SessionStore
    fold: Fold
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    cursor: int = 0
    num_behind: int = 0
    num_incomplete: int = 0

    def step(self, *, budget_s: float) -> bool:
        """Look at some users; return whether that ended a round over all of them.

        Raises:
            StoreError: Redis did not answer.
            ScoringError: the compressor of a version is away; the others are folded.
        """
        deadline = time.monotonic() + budget_s
        live = get_live_memories(self.memories.client)
        if self.cursor == 0:
            self.num_behind = self.num_incomplete = 0
        while live:
            after, users = self.sessions.scan_users(self.cursor)
            failure = self.compact(users, live)
            self.cursor = after
            if after == 0:
                self._end_round()
            if failure is not None:
                raise failure
            if after == 0 or time.monotonic() > deadline:
                break
        return self.cursor == 0

    def round(self) -> None:
        """Look at every user."""
        while not self.step(budget_s=1.0):
            pass

    def _end_round(self) -> None:
        self.metrics.chunks_behind.set(self.num_behind)
        self.metrics.memories_incomplete.set(self.num_incomplete)

    def compact(self, users: Sequence[int], live: Sequence[LiveMemory]) -> ScoringError | None:
        """Fold and drop what there is of these users; return why a version was left out."""
        versions = [one.memory_version for one in live]
        failure = None
        for one in live:
            try:
                while self._fold_once(users, one):
                    pass
            except ScoringError as error:
                failure = error
        marks = self._marks(users, versions)
        self._drop(marks, versions)
        for mark in marks.values():
            self.num_behind += max(0, mark.num_chunks - min(mark.folded.values()))
            self.num_incomplete += any(map(mark.is_incomplete, versions))
        return failure

    def _marks(self, users: Sequence[int], versions: Sequence[str]) -> dict[int, Marks]:
        """Return how far the users are who have handed out chunks."""
        marks = zip(users, self.memories.marks(users, versions), strict=True)
        return {user: mark for user, mark in marks if mark is not None and mark.num_chunks}

    def _fold_once(self, users: Sequence[int], live: LiveMemory) -> bool:
        """Fold a few chunks of each user; return whether there may be more."""
        version = live.memory_version
        num_written = 0
        for group in batches(jobs_of(self._marks(users, [version]), version)):
            writes = self._folded(group, live)
            taken = self.memories.write(version, writes)
            num_written += taken
            self.metrics.folds_refused.inc(len(writes) - taken)
        return num_written > 0

    def _folded(self, group: Sequence[Job], live: LiveMemory) -> list[MemoryWrite]:
        """Return the memories with a group's chunks in them."""
        version = live.memory_version
        found = self.memories.read_chunks([(job.user_id, job.numbers) for job in group])
        held = self.memories.read([job.user_id for job in group], version)
        writes = []
        ready: list[tuple[Job, Memory, list[bytes]]] = []
        for job, numbered, raw in zip(group, found, held, strict=True):
            base = self._base(job, raw, version)
            # One that has left since: another app has folded it, or the cap has come.
            there = [chunk for chunk in numbered if chunk is not None]
            if base is not None and len(there) == len(numbered):
                ready.append((job, base, there))
        if not ready:
            return []
        joined = b"".join(chunk for _, _, chunks in ready for chunk in chunks)
        records = np.frombuffer(joined, RECORD).reshape(-1, self.memories.config.chunk)
        folded = self.fold(live.lifelong_model_version, records)
        at = 0
        for job, base, chunks in ready:
            mine = slice(at, at + len(chunks))
            at += len(chunks)
            part = folded._replace(states=folded.states[mine], counts=folded.counts[mine])
            writes.append(MemoryWrite(job.user_id, job.numbers.start, fold_into(base, part)))
        self.metrics.chunks_folded.inc(at)
        return writes

    def _base(self, job: Job, raw: bytes | None, version: str) -> Memory | None:
        """Return the memory that a job goes on from; None where there is another by now."""
        if job.numbers.start == 0:
            return empty_memory(job.begins)
        if raw is None:
            return None
        memory = decode_memory(raw, version)
        if memory is None:
            log.warning(
                "user %d: memory %s is damaged and was removed: `moveline lifelong build` makes "
                "it again",
                job.user_id,
                version,
            )
            self.metrics.memories_damaged.inc()
            self.memories.discard(job.user_id, version)
            return None
        is_same = (memory.num_chunks, memory.begins) == (job.numbers.start, job.begins)
        return memory if is_same else None

    def _drop(self, marks: Mapping[int, Marks], versions: Sequence[str]) -> None:
        """Drop what every version has folded and no session that is not out needs."""
        done = {
            user: (mark, min(mark.folded.values()))
            for user, mark in marks.items()
            if min(mark.folded.values()) > mark.first
        }
        wanted = [(user, range(mark.first, keep)) for user, (mark, keep) in done.items()]
        markers = self.sessions.markers({user: bucket_of(user) for user in done})
        drops = []
        found = self.memories.read_chunks(wanted)
        for (user, numbers), held in zip(wanted, found, strict=True):
            needed_from = decode_marker(markers[user]).session_id
            keep = numbers.start
            for chunk in held:
                if chunk is None or np.frombuffer(chunk, RECORD)["ordinal"].max() >= needed_from:
                    break
                keep += 1
            if keep > numbers.start:
                drops.append(DropFolded(user, marks[user].begins, keep))
        if drops:
            self.metrics.chunks_left.inc(self.memories.drop_folded(drops, versions))
