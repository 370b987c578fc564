"""`moveline worker`: which partitions, from which offset, and when to pause. Wiring only.

What happens to records is in effects.py; what state is, in features/state.py.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from features.errors import StaleTokenError, StoreFullError, StoreUnavailableError
from features.state import PartitionMovedError
from streams.chain import claimed_chain
from streams.chunk_cap import WAITING_CHUNKS_DEFAULT, keep_to_cap
from streams.control import read_pointers
from streams.dead_letters import DeadLetterProducer
from streams.effects import Effects
from streams.errors import OutOfStepError, StateContendedError, WorkerStuckError
from streams.items import ItemsReader
from streams.kafka import (
    KafkaConfig,
    KafkaException,
    TopicPartition,
    as_stream_error,
    is_fatal,
    is_not_ready,
    make_consumer,
    make_producer,
)
from streams.lake_fill import fill_from_lake
from streams.log_watch import LogWatch
from streams.metrics import WorkerMetrics
from streams.micro_batch import Record
from streams.processor import CACHE_BYTES_DEFAULT, Processor, StateCache

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable
    from pathlib import Path
    from threading import Event as StopEvent

    from features.redis import CatalogueStore, StateStore
    from streams.chain import Chain
    from streams.kafka import Consumer, KafkaError, Message
    from streams.topics import Topics

log = logging.getLogger("moveline.worker")

# While Redis is away nothing is consumed; this is how often it is asked again.
RETRY_S: Final = 0.5
# Kafka's offsets are for people and for dead letters; where to read from is in Redis.
COMMIT_INTERVAL_S: Final = 0.5
# How far behind an idle bucket's checkpoint may be: what a restart reads again, at most.
IDLE_INTERVAL_S: Final = 5.0
LAG_INTERVAL_S: Final = 2.0
# Two workers that both believe they own a partition refuse each other's writes. A rebalance ends
# that within the session time-out; past this many refusals in a row nobody is moving.
OUT_OF_STEP_MAX: Final = 50
# Lag that does not shrink by a single record for this long: exit, so that a supervisor can act.
STUCK_S: Final = 30.0

Place = tuple[str, int]


def group_of(topics: Topics, generation: int) -> str:
    """Return the consumer group that keeps a generation up to date from the topic of the log.

    One a topic: a static member that comes back with another subscription is given the partitions
    it had, of the topic that has ended.
    """
    return f"{topics.prefix}-g{generation}" + (f"-{topics.source}" if topics.source else "")


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How a worker consumes.

    Attributes:
        instance: static member id, unique per worker and stable across its restarts.
        batch_max: records per micro-batch at most.
        batch_wait_s: how long a micro-batch may wait to fill: the floor of freshness.
        session_timeout_ms: silence after which the group gives this worker's partitions away.
        lake: folder of the event log, for what Kafka no longer has; None does without.
        waiting_chunks_max: chunks of a user that stay in Redis when the lake has older ones.
        cache_bytes_max: states kept in memory, as the cache counts them.
    """

    instance: str | None = None
    batch_max: int = 30_000
    batch_wait_s: float = 0.01
    session_timeout_ms: int = 10_000
    lake: Path | None = None
    waiting_chunks_max: int = WAITING_CHUNKS_DEFAULT
    cache_bytes_max: int = CACHE_BYTES_DEFAULT


@dataclass
class Worker:
    """One hot worker: a consumer, and the effects of what it reads."""

    kafka: KafkaConfig
    topics: Topics
    store: StateStore
    catalogue: CatalogueStore
    config: WorkerConfig
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    clock: Callable[[], float] = time.monotonic

    def run(self, stop: StopEvent) -> None:
        """Consume until `stop` is set, then bring every checkpoint up and leave the group.

        Raises:
            UnsafeStoreError: Redis may evict state.
            SchemaMismatchError: the generation was built under other rules.
            StreamError: Kafka or another writer made going on unsafe.
        """
        self.store.ping()
        self.store.refuse_eviction()
        self.store.claim_generation()
        self._restore_pointers()
        while True:
            chain = claimed_chain(self.kafka, self.topics)
            here = replace(self, topics=self.topics.at(chain.current))
            if not here.consume(chain, stop):
                return
            for partition in range(chain.newest.num_partitions):
                # The next topic may be narrower: nothing is behind in a partition it lacks.
                self.metrics.lag.labels(str(partition)).set(0)

    def consume(self, chain: Chain, stop: StopEvent) -> bool:
        """Consume one topic of the log; return whether it goes on in another. See `run`."""
        from streams.retired import CatchUp  # noqa: PLC0415 - it reads as a worker does

        processor = self.processor(chain, chain.current)
        letters = DeadLetterProducer(make_producer(self.kafka), self.topics)
        group = group_of(self.topics, self.store.generation)
        run = _Run(
            self,
            Effects(processor, self.catalogue, letters, self.metrics),
            LogWatch(
                self.kafka,
                self.topics,
                chain,
                CatchUp(self, chain) if chain.retired else None,
                asked_at=self.clock(),
            ),
        )
        consumer = make_consumer(
            self.kafka,
            group=group,
            instance=self.config.instance,
            session_timeout_ms=self.config.session_timeout_ms,
            # The next micro-batch is fetched while this one is applied.
            prefetch_messages=2 * self.config.batch_max,
            on_commit=run.on_commit,
        )
        topics = [self.topics.events, self.topics.items]
        consumer.subscribe(
            topics, on_assign=run.on_assign, on_revoke=run.on_revoke, on_lost=run.on_lost
        )
        log.info("consuming %s as group %s", topics, group)
        try:
            while not stop.is_set() and not run.is_over:
                run.turn(consumer)
            run.finish(consumer)
        except KafkaException as error:
            raise as_stream_error(error, self.kafka) from error
        finally:
            consumer.close()
            log.info("left group %s", group)
        return run.is_over

    def processor(self, chain: Chain, source: int) -> Processor:
        """Return what applies events of one of the log's topics to the generation."""
        store, config = self.store.as_recorded(), self.config
        cap = keep_to_cap(
            store,
            config.lake,
            self.topics.at(0).events,
            self.metrics,
            chunks_max=config.waiting_chunks_max,
        )
        cache = StateCache(config.cache_bytes_max)
        return Processor(
            store,
            store.config,
            source=source,
            num_partitions=chain.sources[source].num_partitions,
            cache=cache,
            chunk_cap=cap,
        )

    def _restore_pointers(self) -> None:
        """Make Redis agree with the control topic: a restored Redis may hold older pointers."""
        pointers = read_pointers(self.kafka, self.topics)
        if pointers is not None and pointers != self.catalogue.get_pointers():
            try:
                self.catalogue.put_pointers(pointers)
            except StaleTokenError as error:
                log.warning("Redis' pointers are left as they are: %s", error)


@dataclass
class _Run:
    """What changes while a worker runs.

    Attributes:
        owned: partitions that the group has given to this worker.
        unplaced: of those, the ones whose offset to read from is not known yet; they are paused.
        pending: by place, records read and not applied yet: the next ones, or Redis was away.
        idle_next: partitions whose buckets without events are still to be looked after this round.
        done: the offset after the last applied record of each placed partition, of no other.
        told: what Kafka was told of `done`.
        items: what applies the items topic.
        watch: what is watched of the log's topics, the newest of which is read; None: nothing.
        sealed: partitions of events that have ended.
        is_over: the log goes on in another topic.
        stood_at: by partition, its place when lag was measured last.
    """

    worker: Worker
    effects: Effects
    watch: LogWatch | None = None
    owned: set[Place] = field(default_factory=set)
    unplaced: set[Place] = field(default_factory=set)
    pending: dict[Place, list[Message]] = field(default_factory=dict)
    done: dict[Place, int] = field(default_factory=dict)
    told: dict[Place, int] = field(default_factory=dict)
    items: ItemsReader = field(init=False)
    sealed: set[Place] = field(default_factory=set)
    is_over: bool = False
    is_paused: bool = False
    num_out_of_step: int = 0
    committed_at: float = field(init=False)
    idle_at: float = field(init=False)
    idle_next: list[int] = field(default_factory=list)
    lag_at: float = float("-inf")
    progress_at: float = field(init=False)
    stood_at: dict[int, int] = field(default_factory=dict)
    last_total: int = -1

    def __post_init__(self) -> None:
        """Nothing is due yet."""
        self.items = ItemsReader(self.worker.catalogue, self.worker.metrics)
        self.committed_at = self.idle_at = self.progress_at = self.worker.clock()

    def turn(self, consumer: Consumer) -> None:
        """Take what there is through every effect; while Redis is away, wait for it."""
        try:
            # First: chunks that leave make room in a Redis that is full.
            self._drop_chunks()
            self._place(consumer)
            self._apply()
            self._resume(consumer)
            self._keep_checkpoints(consumer)
        except (StoreUnavailableError, StoreFullError) as error:
            self._pause(consumer, error)
            # Polling keeps the membership. A record that comes all the same is kept.
            message = consumer.poll(RETRY_S)
            self._take(consumer, [] if message is None else [message])
            return
        except OutOfStepError as error:
            self._lose_place(consumer, error)
            return
        config = self.worker.config
        self._take(consumer, consumer.consume(config.batch_max, config.batch_wait_s))
        if self.worker.clock() - self.committed_at > COMMIT_INTERVAL_S:
            self._commit(consumer, wait=False)
        if self.worker.clock() - self.lag_at > LAG_INTERVAL_S:
            self._measure_lag(consumer)
        if self.watch is not None and (self.sealed or not self.owned):
            self.is_over = self.watch.has_successor(self.worker.clock())

    def finish(self, consumer: Consumer) -> None:
        """Leave checkpoints and offsets where the next worker can go on without reading again."""
        try:
            self.effects.processor.advance_idle(self._event_ends())
        except (StoreUnavailableError, StoreFullError, OutOfStepError) as error:
            log.warning("checkpoints of idle buckets stay behind: %s", error)
        self._commit(consumer, wait=True)

    def _take(self, consumer: Consumer, messages: Iterable[Message]) -> None:
        """Keep the records that continue what was applied.

        A rebalance while they were fetched may have taken their partition and given it back, to be
        read from elsewhere: only what was read since its place was found counts.
        """
        for message in messages:
            error = message.error()
            if error is not None:
                self._refuse_fatal(error)
                continue
            place = _place_of(message)
            if place in self.done and place not in self.sealed:
                self.pending.setdefault(place, []).append(message)
        jumped = [place for place in self.pending if self._has_jumped(consumer, place)]
        if jumped:
            log.warning("Kafka no longer has the next offsets of %s", jumped)
            self._unplace(consumer, jumped)

    def _has_jumped(self, consumer: Consumer, place: Place) -> bool:
        """Return whether Kafka deleted records before they were read: the consumer skips those.

        Offsets that hold no record (transaction markers) look alike, hence the question to Kafka.
        """
        if place[0] != self.worker.topics.events:
            return False
        waiting, start = self.pending[place], self.done[place]
        if _offset_of(waiting[-1]) + 1 - start == len(waiting):
            return False
        low, _ = consumer.get_watermark_offsets(TopicPartition(*place), timeout=RETRY_S * 20)
        return low > start

    def _apply(self) -> None:
        events = self.worker.topics.events
        records = [
            to_record(message)
            for place, messages in self.pending.items()
            if place[0] == events
            for message in messages
        ]
        if records:
            try:
                self.effects.apply(records)
            except PartitionMovedError as error:
                if self.watch is None:
                    raise
                raise self.watch.misplaced(error) from error
            self.num_out_of_step = 0
        for place, messages in self.pending.items():
            if place[0] != events:
                self.items.apply(messages)
            self.done[place] = _offset_of(messages[-1]) + 1
        self.pending = {}
        self._end_sealed()

    def _end_sealed(self) -> None:
        """Leave partitions that have ended at their seal: whoever reads on there has to meet it."""
        events = self.worker.topics.events
        for partition, offset in self.effects.seals.items():
            place = events, partition
            if place in self.done and place not in self.sealed:
                log.info(
                    "%s[%d] has ended at offset %d; waiting for moveline repartition to say where "
                    "the log goes on",
                    *place,
                    offset,
                )
                self.done[place] = offset
                self.sealed.add(place)

    def _drop_chunks(self) -> None:
        if self.effects.processor.chunk_cap is not None:
            self.effects.processor.chunk_cap.drop()

    def _refuse_fatal(self, error: KafkaError) -> None:
        if is_fatal(error):
            raise KafkaException(error)
        log.warning("Kafka: %s", error)

    def _place(self, consumer: Consumer) -> None:
        """Find out where Redis stands and read every unplaced partition from there."""
        if not self.unplaced:
            return
        topics = self.worker.topics
        owned, _ = self._partitions(self.owned)
        catch_up = None if self.watch is None else self.watch.catch_up
        if catch_up is not None and not catch_up.step(owned):
            return
        self._check_width(consumer)
        # Redis may be an older one: what it is read from again is written again.
        self.effects.forget()
        events, items = self._partitions(self.unplaced)
        starts = {
            **{(topics.events, p): at for p, at in self.effects.processor.assign(events).items()},
            **{(topics.items, p): at for p, at in self.items.assign(items).items()},
        }
        if catch_up is not None and not catch_up.confirm(self.effects.processor, events):
            return
        self._learn_committed(consumer, starts)
        sought = {place: self._seek(consumer, place, at) for place, at in starts.items()}
        placed = {place: at for place, at in sought.items() if at is not None}
        self.done |= placed
        consumer.resume([TopicPartition(*place) for place in placed])
        self.unplaced -= placed.keys()
        if placed:
            self.progress_at = self.worker.clock()

    def _check_width(self, consumer: Consumer) -> None:
        if self.watch is not None:
            self.watch.check_width(consumer)

    def _learn_committed(self, consumer: Consumer, starts: dict[Place, int]) -> None:
        """Read again what Kafka was not told of; dead letters before that are known to be safe."""
        asked = [TopicPartition(*place) for place in starts]
        for known in consumer.committed(asked, timeout=RETRY_S * 20):
            place = known.topic, known.partition
            if known.offset >= 0:
                self.told[place] = known.offset
                if place[0] == self.worker.topics.events:
                    self.effects.dead_from[known.partition] = known.offset
                    starts[place] = min(starts[place], known.offset)

    def _seek(self, consumer: Consumer, place: Place, start: int) -> int | None:
        """Read a partition from an offset; None: it is too early, ask again the next turn."""
        at = TopicPartition(*place, start)
        low, _ = consumer.get_watermark_offsets(at, timeout=RETRY_S * 20)
        if start < low and place[0] == self.worker.topics.events:
            low = fill_from_lake(self.effects, self.worker.config.lake, place, start=start, low=low)
        at.offset = max(start, low)
        try:
            consumer.seek(at)
        except KafkaException as error:
            if is_not_ready(error.args[0]):
                return None
            raise
        log.info("reading %s[%d] from offset %d", *place, at.offset)
        return at.offset

    def _lose_place(self, consumer: Consumer, error: OutOfStepError) -> None:
        """Drop what was read and cached; the next turn starts from where Redis stands."""
        log.warning("%s Reading the checkpoints again.", error)
        self.worker.metrics.refused.inc()
        self.num_out_of_step += 1
        # Only a whole round in which nobody refused says that nobody moves.
        self.idle_next = []
        if self.num_out_of_step > OUT_OF_STEP_MAX:
            raise StateContendedError(
                f"writes were refused {OUT_OF_STEP_MAX} times in a row: another process writes "
                f"generation g{self.worker.store.generation}. Look for a second group or a "
                "replay into it with `moveline status`."
            ) from error
        self._unplace(consumer, self.owned)

    def _unplace(self, consumer: Consumer, places: Iterable[Place]) -> None:
        gone = set(places)
        self.unplaced |= gone
        if self.watch is not None and self.watch.catch_up is not None:
            self.watch.catch_up.reset()
        for place in gone:
            self.done.pop(place, None)
            self.pending.pop(place, None)
        self._reopen(gone)
        consumer.pause([TopicPartition(*place) for place in gone])

    def _reopen(self, places: Iterable[Place]) -> None:
        """Forget where partitions ended: read again, they end there again."""
        for place in self.sealed.intersection(places):
            self.sealed.discard(place)
            self.effects.seals.pop(place[1], None)

    def _pause(self, consumer: Consumer, error: Exception) -> None:
        if not self.is_paused:
            log.warning("paused: %s", error)
            self.worker.metrics.pauses.inc()
            self.is_paused = True
        # Every time: a rebalance may have brought partitions that are not paused yet.
        consumer.pause(consumer.assignment())

    def _resume(self, consumer: Consumer) -> None:
        if self.is_paused:
            consumer.resume(consumer.assignment())
            self.is_paused = False
            self.progress_at = self.worker.clock()
            log.info("resumed")

    def _keep_checkpoints(self, consumer: Consumer) -> None:
        """Look after one partition at a time: no micro-batch waits for the buckets of all."""
        ends = self._event_ends()
        if self.worker.clock() - self.idle_at <= IDLE_INTERVAL_S / max(1, len(ends)):
            return
        self.idle_at = self.worker.clock()
        if not self.idle_next:
            self.idle_next = sorted(ends)
            self._check_width(consumer)
            self.items.check(self._partitions(self.done)[1])
        if self.idle_next:
            partition = self.idle_next.pop(0)
            if partition in ends:
                self.effects.processor.advance_idle({partition: ends[partition]})
        if not self.idle_next:
            self.num_out_of_step = 0

    def _partitions(self, places: Collection[Place]) -> tuple[list[int], list[int]]:
        """Return the partitions of the events topic among the places, and of the items topic."""
        topic_of_events = self.worker.topics.events
        events = [partition for topic, partition in places if topic == topic_of_events]
        return events, [partition for topic, partition in places if topic != topic_of_events]

    def _event_ends(self) -> dict[int, int]:
        events = self.worker.topics.events
        return {partition: end for (topic, partition), end in self.done.items() if topic == events}

    def _commit(self, consumer: Consumer, *, wait: bool) -> None:
        """Tell Kafka what is in Redis.

        A commit that the group refuses in the middle of a rebalance is made up for by the next
        one, or by whoever gets the partition: where to read from is in Redis.

        Args:
            consumer: of the group.
            wait: for the broker's word, where there may be no next commit. It can take 150 ms,
                which events that have arrived meanwhile would wait too.
        """
        self.committed_at = self.worker.clock()
        news = {p: end for p, end in self.done.items() if wait or self.told.get(p) != end}
        if not news:
            return
        offsets = [TopicPartition(*place, end) for place, end in news.items()]
        try:
            if wait:
                consumer.commit(offsets=offsets, asynchronous=False)
            else:
                consumer.commit(offsets=offsets, asynchronous=True)
        except KafkaException as error:
            if is_fatal(error.args[0]):
                raise
            log.warning("offsets not committed: %s", error)
        else:
            self.told |= news

    def on_commit(self, error: KafkaError | None, offsets: list[TopicPartition]) -> None:
        """Forget that Kafka was told what it did not take: the next commit says it again."""
        for one in offsets:
            if error is not None or one.error is not None:
                log.warning(
                    "%s[%d] not committed: %s", one.topic, one.partition, one.error or error
                )
                self.told.pop((one.topic, one.partition), None)

    def _measure_lag(self, consumer: Consumer) -> None:
        self.lag_at = self.worker.clock()
        behind = 0
        for partition, end in self._event_ends().items():
            at = TopicPartition(self.worker.topics.events, partition)
            _, high = consumer.get_watermark_offsets(at, cached=True)
            is_ended = (at.topic, partition) in self.sealed
            lag = 0 if is_ended else max(0, high - end)
            behind += lag
            self.worker.metrics.lag.labels(str(partition)).set(lag)
            if lag and self.stood_at.get(partition) == end and not self.pending:
                self._leave_gap(consumer, at, end)
            self.stood_at[partition] = end
        self._refuse_standstill(behind)

    def _leave_gap(self, consumer: Consumer, at: TopicPartition, end: int) -> None:
        """Find a partition's place anew if all that was to be read next has been deleted.

        No later record comes that would show it; the end of what is there is not told.
        """
        low, _ = consumer.get_watermark_offsets(at, timeout=RETRY_S * 20)
        if low > end:
            log.warning("Kafka no longer has the next offsets of %s[%d]", at.topic, at.partition)
            self._unplace(consumer, [(at.topic, at.partition)])

    def _refuse_standstill(self, behind: int) -> None:
        """Raise if there are records to read and none has been read for too long."""
        total = sum(self._event_ends().values())
        # What is pending has been read; a process that was stopped for long has some when it wakes.
        if behind == 0 or self.pending or total != self.last_total:
            self.progress_at = self.worker.clock()
        self.last_total = total
        if self.worker.clock() - self.progress_at > STUCK_S:
            raise WorkerStuckError(
                f"{behind} records wait and none was applied for {STUCK_S:g} s: exiting so that "
                "a supervisor can start a fresh worker. See the broker with `moveline status`."
            )

    def on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Take partitions, paused until it is known where to read them from."""
        log.info("assigned %s", [f"{p.topic}[{p.partition}]" for p in partitions])
        consumer.incremental_assign(partitions)
        places = {(p.topic, p.partition) for p in partitions}
        self.owned |= places
        self._unplace(consumer, places)

    def on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Commit what is done before the partitions go."""
        log.info("revoked %s", [f"{p.topic}[{p.partition}]" for p in partitions])
        self._commit(consumer, wait=True)
        self._give_up(partitions)
        consumer.incremental_unassign(partitions)

    def on_lost(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Forget partitions that are somebody else's already; committing is not ours."""
        log.warning("lost %s", [f"{p.topic}[{p.partition}]" for p in partitions])
        self._give_up(partitions)
        consumer.incremental_unassign(partitions)

    def _give_up(self, partitions: list[TopicPartition]) -> None:
        gone = {(p.topic, p.partition) for p in partitions}
        self.owned -= gone
        self.unplaced -= gone
        for place in gone:
            self.done.pop(place, None)
            self.told.pop(place, None)
            self.pending.pop(place, None)
        self._reopen(gone)
        events = [p for topic, p in gone if topic == self.worker.topics.events]
        self.effects.processor.revoke(events)


def to_record(message: Message) -> Record:
    """Return the plain record in a Kafka message."""
    plain: Any = message
    return Record(
        plain.partition(),
        plain.offset(),
        plain.timestamp()[1],
        plain.key(),
        plain.value(),
        plain.headers(),
    )


def _place_of(message: Any) -> Place:  # noqa: ANN401 - the library calls both optional
    return message.topic(), message.partition()


def _offset_of(message: Any) -> int:  # noqa: ANN401 - the library calls it optional
    return int(message.offset())
