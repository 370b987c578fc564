"""Memories from the lake: for a new memory version, and for users whose chunks left too early.

Which chunks there were is worked out from the whole log of a user. A memory is written only if the
user's state begins with the same event as that log, and by the same script as a near-line one: the
two can run side by side, and a build that was interrupted goes on where it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.lifelong import (
    Memory,
    empty_memory,
    fold_into,
    memory_difference,
)
from features.lifelong_cut import by_user, chunks_of
from features.lifelong_store import MemoryWrite, decode_memory
from streams.lifelong import FOLD_CHUNKS_MAX

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from features.lifelong import Chunks, Fold, LiveMemory
    from features.lifelong_store import LifelongStore, Marks
    from features.view import Records

    Columns = Mapping[str, np.ndarray[tuple[int], np.dtype]]

# Users whose marks are asked for in one round trip.
USERS_AT_ONCE: Final = 500
# Share of the users with chunks of whom nothing may be missing before a model reads the memories.
COVERAGE_DEFAULT: Final = 0.99
# What two sums over the same events may differ by, relative to the sum.
TOLERANCE: Final = 1e-5


class Coverage(NamedTuple):
    """How far the users of a generation are with one memory version.

    Attributes:
        num_users: users of whom chunks have left the tail; others need no memory.
        num_whole: those of them of whom nothing is missing: the rest waits in Redis.
        num_current: those of whom every chunk is folded.
        num_folded: chunks folded, of `num_chunks`.
    """

    num_users: int
    num_whole: int
    num_current: int
    num_folded: int
    num_chunks: int

    @property
    def share(self) -> float:
        """The share of users of whom nothing is missing; 1 where nobody needs a memory."""
        return self.num_whole / self.num_users if self.num_users else 1.0


def coverage(memories: LifelongStore, user_ids: Sequence[int], version: str) -> Coverage:
    """Return how far these users are.

    Raises:
        StoreError: Redis did not answer.
    """
    marks = [mark for _, mark in _marks(memories, user_ids, version) if mark.num_chunks]
    return Coverage(
        len(marks),
        sum(not mark.is_incomplete(version) for mark in marks),
        sum(mark.folded[version] == mark.num_chunks for mark in marks),
        sum(mark.folded[version] for mark in marks),
        sum(mark.num_chunks for mark in marks),
    )


def _marks(
    memories: LifelongStore, user_ids: Sequence[int], version: str
) -> Iterator[tuple[int, Marks]]:
    """Yield the users that have a state, and how far they are."""
    for at in range(0, len(user_ids), USERS_AT_ONCE):
        part = user_ids[at : at + USERS_AT_ONCE]
        for user, mark in zip(part, memories.marks(part, [version]), strict=True):
            if mark is not None:
                yield user, mark


class _Wanted(NamedTuple):
    """A memory to be made: of the chunks that are not in `base` yet.

    Attributes:
        before: chunks that the memory in Redis says it has.
    """

    user_id: int
    before: int
    base: Memory
    chunks: Chunks


@dataclass
class BuildReport:
    """What a build has done.

    Attributes:
        num_users: users whose memories were written.
        num_chunks: chunks folded into them.
        num_refused: users who were changed meanwhile; building again looks at them again.
        num_behind: users of whom the lake lacks chunks that have left Redis.
    """

    num_users: int = 0
    num_chunks: int = 0
    num_refused: int = 0
    num_behind: int = 0


@dataclass
class MemoryBuilder:
    """Brings the memories of one version up to what the lake has.

    Attributes:
        rate: chunks a second at most; None: as fast as they are folded.
        advance: called with the number of users looked at.
    """

    memories: LifelongStore
    live: LiveMemory
    fold: Fold
    rate: float | None = None
    advance: Callable[[int], None] = lambda _: None
    should_stop: Callable[[], bool] = lambda: False
    report: BuildReport = field(default_factory=BuildReport)
    started_s: float = field(default_factory=time.monotonic)

    def run(self, parts: Iterable[Columns]) -> BuildReport:
        """Write what is missing of every user in the lake, until told to stop.

        Args:
            parts: of whole users, as `features.lake_users.stream_users` yields them.

        Raises:
            LakeError: the lake cannot be read.
            StoreError: Redis did not answer or is full; what was written stays.
            ScoringError: the compressor is away; likewise.
        """
        for columns in parts:
            users: dict[int, Records] = {}
            for user, records in by_user(columns):
                users[user] = records
                if len(users) == USERS_AT_ONCE:
                    self._build(users)
                    users = {}
                if self.should_stop():
                    return self.report
            self._build(users)
        return self.report

    def _build(self, users: Mapping[int, Records]) -> None:
        wanted: list[_Wanted] = []
        for one in self._wanted(users):
            wanted.append(one)
            if sum(len(each.chunks) for each in wanted) >= FOLD_CHUNKS_MAX:
                self._write(wanted)
                wanted = []
        self._write(wanted)
        self.advance(len(users))

    def _wanted(self, users: Mapping[int, Records]) -> Iterator[_Wanted]:
        """Yield what is missing of each user and can be made from the lake."""
        version = self.live.memory_version
        marks = dict(_marks(self.memories, list(users), version))
        bases = self.memories.read(list(marks), version)
        for (user, mark), raw in zip(marks.items(), bases, strict=True):
            before = mark.folded[version]
            base = decode_memory(raw or b"", version)
            is_damaged = raw is not None and base is None
            if int(users[user]["ordinal"][0]) != mark.begins:
                continue  # the user was forgotten after the lake was read
            if before == mark.num_chunks and not is_damaged:
                continue  # nothing is missing
            if is_damaged or not before or base is None:
                base = empty_memory(mark.begins)
            elif base.num_chunks != before:
                self.report.num_refused += 1  # the near-line app was there between the two reads
                continue
            chunks = chunks_of(users[user], self.memories.config)[: mark.num_chunks]
            self.report.num_behind += len(chunks) < mark.first
            if len(chunks) > base.num_chunks:
                yield _Wanted(user, before, base, chunks[base.num_chunks :])

    def _write(self, wanted: Sequence[_Wanted]) -> None:
        """Fold what is wanted, all of it in calls of at most FOLD_CHUNKS_MAX chunks, and write."""
        if not wanted:
            return
        folded = self._folded(np.concatenate([one.chunks for one in wanted]), wanted)
        writes = [
            MemoryWrite(one.user_id, one.before, memory)
            for one, memory in zip(wanted, folded, strict=True)
        ]
        taken = self.memories.write(self.live.memory_version, writes)
        self.report.num_users += taken
        self.report.num_refused += len(writes) - taken
        self.report.num_chunks += sum(len(one.chunks) for one in wanted)
        self._pace()

    def _folded(self, chunks_NC: Chunks, wanted: Sequence[_Wanted]) -> list[Memory]:
        owners = np.repeat(np.arange(len(wanted)), [len(one.chunks) for one in wanted])
        memories = [one.base for one in wanted]
        for at in range(0, len(chunks_NC), FOLD_CHUNKS_MAX):
            part = slice(at, at + FOLD_CHUNKS_MAX)
            folded = self.fold(self.live.lifelong_model_version, chunks_NC[part])
            for owner in np.unique(owners[part]).tolist():
                mine = owners[part] == owner
                own = folded._replace(states=folded.states[mine], counts=folded.counts[mine])
                memories[owner] = fold_into(memories[owner], own)
        return memories

    def _pace(self) -> None:
        if self.rate is not None:
            ahead_s = self.report.num_chunks / self.rate - (time.monotonic() - self.started_s)
            time.sleep(max(0.0, ahead_s))


class Verdict(NamedTuple):
    """One user's memory beside the one that the lake gives.

    Attributes:
        difference: relative to the largest value; None where the lake ends too early to tell.
    """

    user_id: int
    num_chunks: int
    difference: float | None

    @property
    def is_equal(self) -> bool:
        """Whether the two are the same sum."""
        return self.difference is not None and self.difference <= TOLERANCE


def verify(
    memories: LifelongStore, live: LiveMemory, fold: Fold, parts: Iterable[Columns]
) -> Iterator[Verdict]:
    """Yield for each user who has a memory how it differs from one made of the lake.

    Raises:
        LakeError, StoreError, ScoringError: see `MemoryBuilder.run`.
    """
    version, config = live.memory_version, memories.config
    for columns in parts:
        for user, records in by_user(columns):
            # The chunks in a memory never change, so it does not matter that it may grow meanwhile.
            (raw,) = memories.read([user], version)
            if raw is None:
                continue
            held = decode_memory(raw, version)
            if held is None:
                yield Verdict(user, 0, float("inf"))
                continue
            chunks = chunks_of(records, config)[: held.num_chunks]
            if len(chunks) < held.num_chunks or int(records["ordinal"][0]) != held.begins:
                yield Verdict(user, held.num_chunks, None)
                continue
            base = empty_memory(held.begins)
            for at in range(0, len(chunks), FOLD_CHUNKS_MAX):
                part = chunks[at : at + FOLD_CHUNKS_MAX]
                base = fold_into(base, fold(live.lifelong_model_version, part))
            same_size = base[:3] == held[:3]
            yield Verdict(
                user, held.num_chunks, memory_difference(base, held) if same_size else float("inf")
            )
