"""What a generation still lacks of the log's retired topics, applied before their successor.

The order of a user's events over two topics is: all of the older one first. So no event of the
newest topic is applied before every bucket's checkpoints of the older ones stand at their ends.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from streams.dead_letters import DeadLetterProducer
from streams.effects import Effects
from streams.errors import OutOfStepError
from streams.event_log import logs_of
from streams.kafka import committed, make_producer
from streams.worker import group_of

if TYPE_CHECKING:
    from collections.abc import Collection, Generator, Mapping

    from streams.chain import Chain, Source
    from streams.micro_batch import MicroBatch
    from streams.processor import Processor, States
    from streams.worker import Worker

log = logging.getLogger("moveline.worker")

# A step ends after this long, so that the worker polls well within its interval.
BUDGET_S: Final = 1.0
# A worker that is still at the old topic completes it faster when nobody writes beside it.
CONTENDED_S: Final = 2.0


def missing_of(states: States, number: int, source: Source) -> dict[int, int]:
    """Return by partition of a retired topic how many of its offsets some bucket lacks."""
    ends = source.end_offsets
    applied = states.read_checkpoints(number, sorted(ends))
    missing = {p: end - max(0, min(applied[p])) for p, end in ends.items()}
    return {p: count for p, count in missing.items() if count > 0}


def is_complete(states: States, chain: Chain) -> bool:
    """Return whether everything of the retired topics is applied to every bucket."""
    return not any(missing_of(states, n, source) for n, source in enumerate(chain.retired))


@dataclass
class CatchUp:
    """A worker's part in completing the retired topics.

    A retired topic's partitions are dealt out by the newest topic's, which the group deals out
    among workers: two that share one all the same refuse each other's writes, and go on.

    Attributes:
        worker: whose generation it is, with the topics of the newest source.
        chain: the log's topics.
        mine: the retired partitions that the open batches are of.
        paused_until: another worker was met there; it is left alone for a while.
    """

    worker: Worker
    chain: Chain
    batches: Generator[MicroBatch, None, None] | None = None
    effects: Effects | None = None
    mine: tuple[int, ...] = ()
    is_done: bool = False
    paused_until: float = float("-inf")
    waiting_for: Collection[int] = field(default_factory=tuple)

    def reset(self) -> None:
        """Look again from the start: Redis may be another than before."""
        self.is_done = False
        self._close()

    def step(self, owned: Collection[int]) -> bool:
        """Apply some of what is missing; return whether nothing is.

        Args:
            owned: partitions of the newest topic that are this worker's.

        Raises:
            StoreError: Redis is away or full.
            StreamError: the topic's events are in neither Kafka nor the lake.
        """
        if self.is_done:
            return True
        if time.monotonic() < self.paused_until:
            return False
        for number, source in enumerate(self.chain.retired):
            missing = missing_of(self.worker.store, number, source)
            for partition in source.end_offsets:
                lag = self.worker.metrics.lag.labels(f"{number}:{partition}")
                lag.set(missing.get(partition, 0))
            if missing:
                self._advance(number, missing, owned)
                return False
        self._close()
        self.is_done = True
        return True

    def confirm(self, processor: Processor, partitions: Collection[int]) -> bool:
        """Return whether the newest topic can be read from where the processor found it.

        Its checkpoints exist afterwards, in a Redis that has the retired topics whole: one that
        comes back older than now refuses this worker.
        """
        processor.begin(partitions)
        if is_complete(self.worker.store, self.chain):
            return True
        self.reset()
        return False

    def _advance(self, number: int, missing: Mapping[int, int], owned: Collection[int]) -> None:
        num_newest = self.chain.newest.num_partitions
        mine = tuple(p for p in sorted(missing) if p % num_newest in owned)
        if not mine:
            self._wait_for(missing)
            return
        try:
            self._apply_some(number, mine)
        except OutOfStepError as error:
            # Whoever was faster has made progress; that is no reason to give up, ever.
            log.info("%s Going on with what it leaves.", error)
            self.worker.metrics.refused.inc()
            self.paused_until = time.monotonic() + CONTENDED_S
            self._close()
        except Exception:
            # What was read and not applied has to be read again.
            self._close()
            raise

    def _apply_some(self, number: int, mine: tuple[int, ...]) -> None:
        if self.batches is None or mine != self.mine:
            self._open(number, mine)
        assert self.batches is not None
        assert self.effects is not None
        deadline = time.monotonic() + BUDGET_S
        for batch in self.batches:
            self.effects.send_dead_letters(batch)
            self.effects.apply_batch(batch)
            if time.monotonic() > deadline:
                # Or a failure would set all the way back: idle buckets' checkpoints count too.
                self.effects.processor.advance_idle(batch.ends)
                return
        ends = self.chain.sources[number].end_offsets
        self.effects.processor.advance_idle({p: ends[p] for p in mine})
        self._close()

    def _open(self, number: int, mine: tuple[int, ...]) -> None:
        self._close()
        worker = self.worker
        topics = worker.topics.at(number)
        source = self.chain.sources[number]
        events = logs_of(worker.kafka, topics, self.chain, lake=worker.config.lake)[number]
        processor = worker.processor(self.chain, number)
        letters = DeadLetterProducer(make_producer(worker.kafka), topics)
        # Dead letters before what Kafka was told are safe.
        group = group_of(topics, worker.store.generation)
        told = committed(worker.kafka, group, topics.events)
        self.effects = Effects(processor, worker.catalogue, letters, worker.metrics, dead_from=told)
        starts = processor.assign(mine)
        ends = {p: source.end_offsets[p] for p in mine}
        log.info("completing %s: %s up to %s", topics.events, starts, ends)
        self.mine = mine
        self.batches = events.batches(starts, ends, worker.store.config)

    def _wait_for(self, missing: Mapping[int, int]) -> None:
        if sorted(missing) != sorted(self.waiting_for):
            log.info("waiting for others to complete partitions %s", sorted(missing))
            self.waiting_for = tuple(missing)

    def _close(self) -> None:
        if self.batches is not None:
            self.batches.close()
        self.batches = self.effects = None
        self.mine = ()
