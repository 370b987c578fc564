"""The hot path's arithmetic: step the users of a micro-batch and write them bucket by bucket.

A bucket is written whole or not at all, with the checkpoint that says how far its partition is
applied, and only if that checkpoint stands where this worker left it. Everything else follows: a
zombie is refused, a redelivered event is skipped, a Redis that went back in time is noticed.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from itertools import tee
from typing import TYPE_CHECKING, Final, Protocol

from features.keys import bucket_of
from features.redis import WRITTEN, BucketWrite
from features.state import PartitionMovedError, UserState, step
from streams.errors import OutOfStepError
from streams.placement import partitions_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from features.config import StateConfig
    from features.row import RowFormat
    from features.state import Accepted, Change
    from streams.chunk_cap import ChunkCap
    from streams.micro_batch import MicroBatch

# States of idle users cost memory and save one read each; the rest is re-read when it returns.
CACHE_BYTES_DEFAULT: Final = 256 * 1024 * 1024
# What a state takes besides its tail and its duplicate window: measured, 700 and some slack.
_STATE_OVERHEAD_BYTES: Final = 800


class States(Protocol):
    """What the processor needs of Redis: `features.redis.StateStore` keeps these promises."""

    @property
    def row_format(self) -> RowFormat:
        """What rows are written in."""
        ...

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]:
        """Return whole states, EMPTY_STATE for users that have none."""
        ...

    def write_buckets(self, writes: Iterable[BucketWrite]) -> list[int]:
        """Write each bucket whole or not at all; `writes` may be made while it is written."""
        ...

    def read_checkpoints(self, source: int, partitions: Sequence[int]) -> dict[int, list[int]]:
        """Return each partition's next offset by bucket, -1 where there is none."""
        ...


@dataclass
class Report:
    """What one micro-batch did."""

    num_applied: int = 0
    num_duplicates: int = 0
    num_skipped: int = 0
    num_late: int = 0
    load_s: float = 0.0
    step_s: float = 0.0
    write_s: float = 0.0


@dataclass
class StateCache:
    """The states this worker wrote last, least recently used first out, bounded in bytes."""

    bytes_max: int = CACHE_BYTES_DEFAULT
    bytes_held: int = 0
    states: OrderedDict[int, UserState] = field(default_factory=OrderedDict)

    def get(self, user_id: int) -> UserState | None:
        """Return the cached state and mark it used."""
        state = self.states.get(user_id)
        if state is not None:
            self.states.move_to_end(user_id)
        return state

    def put(self, user_id: int, state: UserState) -> None:
        """Keep a state that Redis has acknowledged."""
        before = self.states.get(user_id)
        self.bytes_held += _size(state) - (_size(before) if before else 0)
        self.states[user_id] = state
        while self.bytes_held > self.bytes_max:
            self.bytes_held -= _size(self.states.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget everything: after a rebalance, or when Redis may have changed behind us."""
        self.states.clear()
        self.bytes_held = 0


def _is_new(state: UserState, source: int) -> bool:
    return state.position.source != source or state.position.partition < 0


def _size(state: UserState) -> int:
    return len(state.tail) + len(state.window) + _STATE_OVERHEAD_BYTES


@dataclass
class Processor:
    """Applies micro-batches to the states of one generation.

    Attributes:
        source: which topic of the event log its events come from.
        num_partitions: over which that topic's keys are distributed; None leaves it unchecked.
        checkpoints: by partition, the next offset of each bucket as this worker left it in Redis.
        chunk_cap: what is told of users whose chunks Redis has acknowledged; None keeps them all.
    """

    states: States
    config: StateConfig
    source: int = 0
    num_partitions: int | None = None
    cache: StateCache = field(default_factory=StateCache)
    checkpoints: dict[int, list[int]] = field(default_factory=dict)
    chunk_cap: ChunkCap | None = None

    def assign(self, partitions: Sequence[int]) -> dict[int, int]:
        """Learn where Redis stands; return the offset to read each partition from.

        Everything before it is in Redis for every bucket. What buckets have beyond it is skipped.
        """
        self.cache.clear()
        self.checkpoints.update(self.states.read_checkpoints(self.source, partitions))
        return {partition: max(0, min(self.checkpoints[partition])) for partition in partitions}

    def begin(self, partitions: Iterable[int]) -> None:
        """Write a checkpoint where there is none: a Redis from before it then refuses this worker.

        Raises as `apply` does.
        """
        self._write(
            [
                BucketWrite(bucket, self.source, partition, held, 0, {})
                for partition in partitions
                for bucket, held in enumerate(self.checkpoints[partition])
                if held < 0
            ]
        )

    def revoke(self, partitions: Iterable[int]) -> None:
        """Forget partitions that are another worker's now."""
        self.cache.clear()
        for partition in partitions:
            self.checkpoints.pop(partition, None)

    def apply(self, batch: MicroBatch) -> Report:
        """Return once every event is in Redis, applied exactly once.

        Raises:
            StoreError: Redis is away or full. Some buckets may be written.
            OutOfStepError: Redis does not stand where this worker left it. `assign` again, read
                from there.
            PartitionMovedError: a user's events do not lie where the user's key belongs.
        """
        report = Report()
        started = time.perf_counter()
        todo = self._not_yet_applied(batch.by_user, report)
        before = self._states_of(todo)
        self._refuse_misplaced(todo, before)
        loaded = time.perf_counter()
        changes = {user: step(before[user], events, self.config) for user, events in todo.items()}
        self._refuse_ahead(changes)
        stepped = time.perf_counter()
        self._write(self._bucket_writes(todo, before, changes, batch.ends))
        self._settle(before, changes, report)
        report.load_s = loaded - started
        report.step_s = stepped - loaded
        report.write_s = time.perf_counter() - stepped
        return report

    def advance_idle(self, ends: Mapping[int, int]) -> None:
        """Bring the checkpoints of buckets without events up to `ends` (partition: next offset).

        Also how a Redis that went back is noticed while nothing happens: a partition with nothing
        to advance is read and compared. Raises as `apply` does.
        """
        writes = [
            BucketWrite(bucket, self.source, partition, held, end, {})
            for partition, end in ends.items()
            for bucket, held in enumerate(self.checkpoints.get(partition, ()))
            if held < end
        ]
        self._write(writes)
        written = {write.partition for write in writes}
        self._compare(sorted((ends.keys() & self.checkpoints.keys()) - written))

    def _compare(self, partitions: Sequence[int]) -> None:
        for partition, found in self.states.read_checkpoints(self.source, partitions).items():
            if found != self.checkpoints[partition]:
                self.cache.clear()
                raise OutOfStepError(
                    f"partition {partition} does not stand where this worker left it: another "
                    "worker wrote, or Redis went back."
                )

    def _not_yet_applied(
        self, by_user: Mapping[int, list[Accepted]], report: Report
    ) -> dict[int, list[Accepted]]:
        """Leave out what the users' buckets already hold."""
        todo: dict[int, list[Accepted]] = {}
        for user, events in by_user.items():
            first = events[0].position
            applied = self.checkpoints[first.partition][bucket_of(user)]
            if first.offset < applied:
                kept = [event for event in events if event.position.offset >= applied]
                report.num_skipped += len(events) - len(kept)
                if kept:
                    todo[user] = kept
            else:
                todo[user] = events
        return todo

    def _states_of(self, user_ids: Mapping[int, object]) -> dict[int, UserState]:
        found = {user: self.cache.get(user) for user in user_ids}
        missing = [user for user, state in found.items() if state is None]
        loaded = self.states.load(missing) if missing else {}
        return {user: loaded[user] if state is None else state for user, state in found.items()}

    def _refuse_misplaced(
        self, todo: Mapping[int, Sequence[Accepted]], before: Mapping[int, UserState]
    ) -> None:
        """Raise if a user's first events of this topic lie in another partition than its key.

        Later ones are compared with the state's own partition (features/state.py).
        """
        if self.num_partitions is None:
            return
        new = [user for user, state in before.items() if _is_new(state, self.source)]
        belongs = partitions_of([b"%d" % user for user in new], self.num_partitions)
        for user, partition in zip(new, belongs, strict=True):
            found = todo[user][0].position.partition
            if found != partition:
                raise PartitionMovedError(
                    f"user {user} lies in partition {found} and belongs into {partition} of "
                    f"{self.num_partitions}"
                )

    def _refuse_ahead(self, changes: Mapping[int, Change]) -> None:
        """Raise if a row already holds events that its bucket's checkpoint, as known here, has not.

        Another worker wrote between the checkpoint and the row that were read. Were Redis to go
        back now to where the checkpoint is true again, the events would be passed over.
        """
        ahead = [user for user, change in changes.items() if change.num_skipped]
        if ahead:
            self.cache.clear()
            raise OutOfStepError(
                f"{len(ahead)} of {len(changes)} users (first: {ahead[0]}) are ahead of where this "
                "worker left them: another worker wrote."
            )

    def _bucket_writes(
        self,
        todo: Mapping[int, Sequence[Accepted]],
        before: Mapping[int, UserState],
        changes: Mapping[int, Change],
        ends: Mapping[int, int],
    ) -> Iterator[BucketWrite]:
        num_actions = len(self.config.actions)
        encode_write = self.states.row_format.encode_write
        users: dict[tuple[int, int], list[int]] = {}
        for user in changes:
            # Also where all were duplicates: the row that this was judged by has to be the one.
            place = (todo[user][0].position.partition, bucket_of(user))
            users.setdefault(place, []).append(user)
        for (partition, bucket), mine in users.items():
            yield BucketWrite(
                bucket,
                self.source,
                partition,
                self.checkpoints[partition][bucket],
                ends[partition],
                {user: encode_write(before[user], changes[user], num_actions) for user in mine},
            )

    def _write(self, writes: Iterable[BucketWrite]) -> None:
        writes, sent = tee(writes)
        try:
            replies = self.states.write_buckets(writes)
        except Exception:
            # Unknown how much was written: what is cached may be behind Redis.
            self.cache.clear()
            raise
        refused = []
        for write, reply in zip(sent, replies, strict=True):
            if reply == WRITTEN:
                self.checkpoints[write.partition][write.bucket] = write.advance_to
            else:
                refused.append(write)
        if refused:
            self.cache.clear()
            first = refused[0]
            raise OutOfStepError(
                f"{len(refused)} of {len(replies)} buckets do not stand where this worker left "
                f"them (first: bucket {first.bucket} of partition {first.partition}, left at "
                f"offset {first.expected}): another worker wrote, or Redis went back."
            )

    def _settle(
        self, before: Mapping[int, UserState], changes: Mapping[int, Change], report: Report
    ) -> None:
        for user, change in changes.items():
            report.num_applied += change.num_applied
            report.num_duplicates += change.num_duplicates
            late_before = 0 if change.forgets else before[user].num_late
            report.num_late += change.state.num_late - late_before
            if change.state.next_ordinal:
                self.cache.put(user, change.state)
            if change.chunks and self.chunk_cap is not None:
                self.chunk_cap.note(user, change)
