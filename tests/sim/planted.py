"""Bugs on purpose: each is a line that could be wrong, and some seed must tell.

A bug is planted by replacing what is named in `swaps`; the expectations of tests/sim/traffic.py are
never touched by it.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final
from unittest.mock import patch

from features.chunks import FIRST_FIELD, Drop
from features.redis import WRITTEN
from features.state import Chunk, _Work, step
from streams import processor
from streams.chunk_cap import LakeEnds
from streams.dead_letters import DeadLetterProducer
from streams.effects import Effects
from streams.kafka import KafkaException, TopicPartition
from streams.micro_batch import sort_records
from streams.processor import Processor, StateCache
from streams.worker import _Run
from tests.sim.store import SimRedis, SimStore

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from features.config import StateConfig
    from features.redis import BucketWrite
    from features.state import Accepted, Change, UserState
    from streams.kafka import Consumer
    from streams.micro_batch import DeadLetter, MicroBatch, Record
    from streams.processor import Report
    from streams.worker import Place

# Seeds looked through before a planted bug counts as missed.
SEEDS_MAX: Final = 600


@dataclass(frozen=True)
class Plant:
    """One bug.

    Attributes:
        story: what is wrong.
        swaps: (owner, attribute, replacement).
        seed: one that is known to tell; tried first, then the others in order.
    """

    story: str
    swaps: tuple[tuple[object, str, Any], ...]
    seed: int = 0

    @contextmanager
    def planted(self) -> Iterator[None]:
        """The bug is in the code inside the block."""
        with ExitStack() as stack:
            for owner, name, replacement in self.swaps:
                stack.enter_context(patch.object(owner, name, replacement))
            yield

    def seeds(self) -> Iterable[int]:
        """Return the seeds to try, in order."""
        return [self.seed, *range(SEEDS_MAX)]


def _never(*_: object) -> bool:
    return False


def _nothing(*_: object) -> None:
    return None


# The state machine.


def _stepping(work: type[_Work]) -> Callable[..., Change]:
    def planted(state: UserState, events: Sequence[Accepted], config: StateConfig) -> Change:
        scratch = work(state, config)
        for event in events:
            scratch.apply(event)
        return scratch.change()

    return planted


def _step_under(**wrong: int) -> Callable[..., Change]:
    def planted(state: UserState, events: Sequence[Accepted], config: StateConfig) -> Change:
        changed = {name: getattr(config, name) + by for name, by in wrong.items()}
        return step(state, events, replace(config, **changed))

    return planted


class _LateAppended(_Work):
    def _insert_late(self, record: bytes, time_ms: int) -> None:
        del time_ms
        self.tail += record


class _OrdinalsRestarted(_Work):
    def _depart(self) -> None:
        super()._depart()
        self.ordinal = 0


class _ChunksNotForgotten(_Work):
    def _forget(self, event: Accepted) -> None:
        super()._forget(event)
        self.forgets = False


class _WindowNotForgotten(_Work):
    def _forget(self, event: Accepted) -> None:
        window = self.window
        super()._forget(event)
        self.window = window


class _ChunkOverwritten(_Work):
    def _depart(self) -> None:
        super()._depart()
        self.chunks = [Chunk(0, chunk.records) for chunk in self.chunks]


# Redis.


def _checkpoint_first(self: SimStore, write: BucketWrite) -> int:
    reply = self.redis.run_script(write._replace(rows={}))
    if reply != WRITTEN:
        return reply
    self.hooks.at("between checkpoint and rows")
    return self.redis.run_script(write._replace(expected=write.advance_to))


def _items_position_blindly(self: SimStore, partition: int, *, expected: int, offset: int) -> bool:
    del expected
    self.put_items_read(partition, offset)
    return True


# The processor.


def _assign_from_max(self: Processor, partitions: Sequence[int]) -> dict[int, int]:
    self.cache.clear()
    self.checkpoints.update(self.states.read_checkpoints(self.source, partitions))
    return {partition: max(0, *self.checkpoints[partition]) for partition in partitions}


def _assign_with_cache(self: Processor, partitions: Sequence[int]) -> dict[int, int]:
    self.checkpoints.update(self.states.read_checkpoints(self.source, partitions))
    return {partition: max(0, min(self.checkpoints[partition])) for partition in partitions}


def _revoke_with_cache(self: Processor, partitions: Iterable[int]) -> None:
    for partition in partitions:
        self.checkpoints.pop(partition, None)


def _write_and_hope(self: Processor, writes: Iterable[BucketWrite]) -> None:
    made = list(writes)
    self.states.write_buckets(made)
    for write in made:
        self.checkpoints[write.partition][write.bucket] = write.advance_to


def _all_todo(
    self: Processor, by_user: Mapping[int, list[Accepted]], report: Report
) -> dict[int, list[Accepted]]:
    del self, report
    return dict(by_user)


_BUCKET_WRITES: Final = Processor._bucket_writes


def _changed_rows_only(
    self: Processor,
    todo: Mapping[int, Sequence[Accepted]],
    before: Mapping[int, UserState],
    changes: Mapping[int, Change],
    ends: Mapping[int, int],
) -> list[BucketWrite]:
    return [
        write._replace(
            rows={user: row for user, row in write.rows.items() if changes[user].num_applied}
        )
        for write in _BUCKET_WRITES(self, todo, before, changes, ends)
    ]


_ADVANCE_IDLE: Final = Processor.advance_idle


def _idle_too_far(self: Processor, ends: Mapping[int, int]) -> None:
    _ADVANCE_IDLE(self, {partition: end + 1 for partition, end in ends.items()})


# Effects and dead letters.


def _states_before_letters(self: Effects, records: Iterable[Record]) -> Report:
    batch = sort_records(records, self.processor.config)
    report = self.apply_batch(batch)
    self.send_dead_letters(batch)
    return report


def _domains_after_states(self: Effects, batch: MicroBatch) -> Report:
    report = self.processor.apply(batch)
    new = {code: text for code, text in batch.domains.items() if code not in self.domains}
    self.catalogue.put_domains(new)
    self.domains |= new.keys()
    return report


def _letters_not_awaited(self: DeadLetterProducer, letters: Sequence[DeadLetter]) -> None:
    for letter in letters:
        self._produce(letter, [])


# The worker.

_TAKE: Final = _Run._take
_UNPLACE: Final = _Run._unplace
_GIVE_UP: Final = _Run._give_up


def _commit_first(self: _Run, consumer: Consumer, messages: Iterable[Any]) -> None:
    _TAKE(self, consumer, messages)
    ends = {place: waiting[-1].offset() + 1 for place, waiting in self.pending.items()}
    try:
        consumer.commit(
            offsets=[TopicPartition(*place, end) for place, end in ends.items()],
            asynchronous=False,
        )
    except KafkaException:
        return


def _start_at_committed(_: _Run, consumer: Consumer, starts: dict[Place, int]) -> None:
    asked = [TopicPartition(*place) for place in starts]
    for known in consumer.committed(asked, timeout=1.0):
        if known.offset >= 0:
            starts[known.topic, known.partition] = known.offset


def _unplace_keeping(self: _Run, consumer: Consumer, places: Iterable[Place]) -> None:
    pending = dict(self.pending)
    _UNPLACE(self, consumer, places)
    self.pending = pending


def _give_up_keeping(self: _Run, partitions: list[TopicPartition]) -> None:
    pending = dict(self.pending)
    _GIVE_UP(self, partitions)
    self.pending = pending


# The cap on waiting chunks.

_DROP_CHUNKS: Final = SimRedis.drop_chunks


def _unmarked(self: SimRedis, user: int, drop: Drop) -> int:
    dropped = _DROP_CHUNKS(self, user, drop)
    self.data.pop(("chunk", user, FIRST_FIELD), None)
    return dropped


def _marked_blindly(self: SimRedis, user: int, drop: Drop) -> int:
    self.write({("chunk", user, FIRST_FIELD): b"%d" % drop.keep_from})
    return 0


def _everything(*_: object) -> int:
    return 2**62


PLANTED: Final = {
    "no-compare-and-set": Plant(
        "Redis takes whatever comes",
        ((SimRedis, "checkpoint_differs", _never), (SimRedis, "row_differs", _never)),
    ),
    "checkpoint-not-compared": Plant(
        "only rows are compared", ((SimRedis, "checkpoint_differs", _never),)
    ),
    "checkpoint-before-rows": Plant(
        "the checkpoint is a command of its own, sent first",
        ((SimStore, "run", _checkpoint_first),),
    ),
    "replies-ignored": Plant(
        "checkpoints move on though a bucket's write was refused, and are not read again",
        ((Processor, "_write", _write_and_hope), (Processor, "_compare", _nothing)),
    ),
    "commit-before-write": Plant(
        "offsets are committed when read, and read from after a restart",
        ((_Run, "_take", _commit_first), (_Run, "_learn_committed", _start_at_committed)),
    ),
    "start-at-committed": Plant(
        "Kafka's offset is believed", ((_Run, "_learn_committed", _start_at_committed),)
    ),
    "start-at-max": Plant(
        "reading starts at the largest checkpoint", ((Processor, "assign", _assign_from_max),)
    ),
    "cache-never-dropped": Plant(
        "what is cached survives a refusal", ((StateCache, "clear", _nothing),)
    ),
    "cache-kept-across-rebalance": Plant(
        "what is cached survives a rebalance; no row is compared, which would heal it",
        (
            (Processor, "assign", _assign_with_cache),
            (Processor, "revoke", _revoke_with_cache),
            (Processor, "_refuse_ahead", _nothing),
            (SimRedis, "row_differs", _never),
        ),
    ),
    "redelivered-not-skipped": Plant(
        "a bucket's checkpoint is not looked at before stepping",
        ((Processor, "_not_yet_applied", _all_todo),),
    ),
    "idle-too-far": Plant(
        "idle checkpoints pass the next offset", ((Processor, "advance_idle", _idle_too_far),)
    ),
    "idle-redis-not-read": Plant(
        "a Redis that went back is seen by writes only", ((Processor, "_compare", _nothing),)
    ),
    "late-appended": Plant(
        "a late event goes to the end", ((processor, "step", _stepping(_LateAppended)),)
    ),
    "window-off-by-one": Plant(
        "the oldest id of the duplicate window is not compared",
        ((processor, "step", _step_under(dedup_window=-1)),),
    ),
    "gap-exclusive": Plant(
        "an event exactly one gap later opens a session",
        ((processor, "step", _step_under(session_gap_ms=-1)),),
    ),
    "ordinals-restarted": Plant(
        "ordinals start again after a chunk left",
        ((processor, "step", _stepping(_OrdinalsRestarted)),),
    ),
    "chunks-not-forgotten": Plant(
        "a forget leaves the waiting chunks", ((processor, "step", _stepping(_ChunksNotForgotten)),)
    ),
    "window-not-forgotten": Plant(
        "a forget leaves the duplicate window",
        ((processor, "step", _stepping(_WindowNotForgotten)),),
    ),
    "chunk-overwritten": Plant(
        "every chunk is chunk 0", ((processor, "step", _stepping(_ChunkOverwritten)),)
    ),
    "chunks-dropped-early": Plant(
        "the lake is not asked before a chunk leaves Redis", ((LakeEnds, "__call__", _everything),)
    ),
    "hole-unmarked": Plant("dropped chunks leave no mark", ((SimRedis, "drop_chunks", _unmarked),)),
    "hole-marked-blindly": Plant(
        "the mark is set, whatever is there", ((SimRedis, "drop_chunks", _marked_blindly),)
    ),
    "letters-not-awaited": Plant(
        "a dead letter counts as sent when it is queued",
        ((DeadLetterProducer, "send", _letters_not_awaited),),
    ),
    "domains-after-states": Plant(
        "a domain's text is written after the states",
        ((Effects, "apply_batch", _domains_after_states),),
        seed=2954,
    ),
    "domains-remembered": Plant(
        "a domain once written is never written again", ((Effects, "forget", _nothing),)
    ),
    "pending-kept": Plant(
        "what was read before a rebalance is applied after it",
        ((_Run, "_unplace", _unplace_keeping), (_Run, "_give_up", _give_up_keeping)),
    ),
    "end-deleted-not-noticed": Plant(
        "records deleted up to the end of their partition are waited for",
        ((_Run, "_leave_gap", _nothing),),
        seed=9918,
    ),
    "retention-not-noticed": Plant(
        "records that Kafka deleted before they were read are passed over",
        ((_Run, "_has_jumped", _never),),
    ),
    "items-written-blindly": Plant(
        "the catalogue's position is written, whatever it was",
        ((SimStore, "advance_items_read", _items_position_blindly),),
    ),
}

# So rare that thousands of seeds may miss them: tests/sim/test_moments.py forces the moment.
BY_HAND: Final = {
    "row-not-compared": Plant(
        "the script compares checkpoints only", ((SimRedis, "row_differs", _never),)
    ),
    "ahead-not-refused": Plant(
        "a row ahead of its checkpoint is taken for redelivery, and left out of the write",
        (
            (Processor, "_refuse_ahead", _nothing),
            (Processor, "_bucket_writes", _changed_rows_only),
        ),
    ),
    "letters-after-states": Plant(
        "dead letters are sent after the states", ((Effects, "apply", _states_before_letters),)
    ),
}
