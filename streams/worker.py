"""`moveline worker`: Kafka in, Redis out, offsets last. Wiring; the work is in processor.py."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import msgspec

from features.catalogue import Item, decode_item
from features.clock import now_ms
from features.errors import StoreFullError, StoreUnavailableError
from streams.control import read_pointers
from streams.errors import DeadLetterError
from streams.kafka import (
    KafkaConfig,
    KafkaException,
    TopicPartition,
    as_stream_error,
    is_fatal,
    make_consumer,
    make_producer,
)
from streams.metrics import WorkerMetrics
from streams.micro_batch import MicroBatch, Record, dead_letter_headers, sort_records
from streams.processor import Processor

if TYPE_CHECKING:
    from collections.abc import Sequence
    from threading import Event as StopEvent

    from features.redis import CatalogueStore, StateStore
    from streams.kafka import Consumer, Message, Producer
    from streams.topics import Topics

log = logging.getLogger("moveline.worker")

# While Redis is away nothing is consumed; this is how often it is asked again.
RETRY_S: Final = 0.5
# Offsets are a restart hint (positions live with the state), so they need no commit per batch.
COMMIT_INTERVAL_S: Final = 0.5
LAG_INTERVAL_S: Final = 2.0
# A dead letter that cannot be delivered in this time stops the worker before its offset commits.
DEAD_LETTER_TIMEOUT_S: Final = 30.0


def group_of(topics: Topics, generation: int) -> str:
    """Return the consumer group that keeps a generation of an installation up to date."""
    return f"{topics.prefix}-g{generation}"


@dataclass(frozen=True, kw_only=True)
class WorkerConfig:
    """How a worker consumes.

    Attributes:
        instance: static member id, unique per worker and stable across its restarts.
        batch_max: records per micro-batch at most.
        batch_wait_s: how long a micro-batch may wait to fill: the floor of freshness.
    """

    instance: str | None = None
    batch_max: int = 10_000
    batch_wait_s: float = 0.01


@dataclass
class Worker:
    """One hot worker: a consumer, a processor, a dead-letter producer."""

    kafka: KafkaConfig
    topics: Topics
    store: StateStore
    catalogue: CatalogueStore
    config: WorkerConfig
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    def run(self, stop: StopEvent) -> None:
        """Consume until `stop` is set, then commit and leave the group.

        Raises:
            UnsafeStoreError: Redis may evict state.
            SchemaMismatchError: the generation was built under other rules.
            StreamError: Kafka or another writer made going on unsafe.
        """
        self.store.ping()
        self.store.refuse_eviction()
        self.store.claim_generation()
        self._restore_pointers()
        run = _Run(self, Processor(self.store, self.store.config), make_producer(self.kafka))
        group = group_of(self.topics, self.store.generation)
        consumer = make_consumer(self.kafka, group=group, instance=self.config.instance)
        topics = [self.topics.events, self.topics.items]
        consumer.subscribe(
            topics, on_assign=run.on_assign, on_revoke=run.on_revoke, on_lost=run.on_lost
        )
        log.info("consuming %s as group %s", topics, group)
        try:
            while not stop.is_set():
                run.turn(consumer, stop)
            run.commit(consumer)
        except KafkaException as error:
            raise as_stream_error(error, self.kafka) from error
        finally:
            consumer.close()
            log.info("left group %s", group)

    def _restore_pointers(self) -> None:
        """Make Redis agree with the control topic: a restored Redis may hold older pointers."""
        pointers = read_pointers(self.kafka, self.topics)
        if pointers is not None and pointers != self.catalogue.get_pointers():
            self.catalogue.put_pointers(pointers)


@dataclass
class _Run:
    """What changes while a worker runs.

    Attributes:
        owned: partitions that the group has given to this worker.
        done: of those, the offsets after the last record in Redis that Kafka has not been told.
        backlog: records that a rebalance delivered while the worker was paused.
    """

    worker: Worker
    processor: Processor
    producer: Producer
    owned: set[tuple[str, int]] = field(default_factory=set)
    done: dict[tuple[str, int], int] = field(default_factory=dict)
    backlog: list[Message] = field(default_factory=list)
    committed_at: float = field(default_factory=time.monotonic)
    lag_at: float = 0.0
    domains: set[int] = field(default_factory=set)

    def turn(self, consumer: Consumer, stop: StopEvent) -> None:
        """Take one micro-batch through every effect, or wait for one."""
        config = self.worker.config
        waiting, self.backlog = self.backlog, []
        messages = consumer.consume(config.batch_max, config.batch_wait_s)
        records, items = self._split([*waiting, *messages])
        if records or items:
            self._apply_when_possible(consumer, records, items, stop)
        now = time.monotonic()
        if now - self.committed_at > COMMIT_INTERVAL_S:
            self.commit(consumer)
        if now - self.lag_at > LAG_INTERVAL_S:
            self._measure_lag(consumer)

    def _split(self, messages: Sequence[Message]) -> tuple[list[Record], list[Message]]:
        records: list[Record] = []
        items: list[Message] = []
        for message in messages:
            error = message.error()
            if error is not None:
                if is_fatal(error):
                    raise KafkaException(error)
                log.warning("Kafka: %s", error)
                continue
            if message.topic() == self.worker.topics.items:
                items.append(message)
            else:
                records.append(to_record(message))
        return records, items

    def _apply_when_possible(
        self,
        consumer: Consumer,
        records: list[Record],
        items: list[Message],
        stop: StopEvent,
    ) -> None:
        """Apply the micro-batch; while Redis is away or full, pause, keep polling, try again."""
        paused = False
        while not stop.is_set():
            try:
                self._apply(records, items)
            except (StoreUnavailableError, StoreFullError) as error:
                if not paused:
                    log.warning("paused: %s", error)
                    self.worker.metrics.pauses.inc()
                    paused = True
                # Every time: a rebalance may have brought partitions that are not paused yet.
                consumer.pause(consumer.assignment())
                # Polling keeps the group membership; what such a partition hands out is kept.
                message = consumer.poll(RETRY_S)
                if message is not None:
                    self.backlog.append(message)
            else:
                break
        if paused:
            consumer.resume(consumer.assignment())
            log.info("resumed")

    def _apply(self, records: list[Record], items: list[Message]) -> None:
        batch = sort_records(records, self.worker.store.config)
        report = self.processor.apply(batch.by_user)
        acknowledged_ms = now_ms()
        self._put_new_domains(batch)
        self._apply_items(items)
        self._send_dead_letters(batch)
        for record in records:
            self._note_done(self.worker.topics.events, record.partition, record.offset)
        for message in items:
            at: tuple[Any, Any] = message.partition(), message.offset()
            self._note_done(self.worker.topics.items, *at)
        self._count(batch, report.num_applied, acknowledged_ms)
        self.worker.metrics.add(report)

    def _note_done(self, topic: str, partition: int, offset: int) -> None:
        """Have the next commit carry the record, unless its partition is somebody else's now."""
        if (topic, partition) in self.owned:
            self.done[topic, partition] = offset + 1

    def _put_new_domains(self, batch: MicroBatch) -> None:
        new = {code: text for code, text in batch.domains.items() if code not in self.domains}
        self.worker.catalogue.put_domains(new)
        # Only now: a write that failed has to be tried again.
        self.domains |= new.keys()

    def _apply_items(self, messages: list[Message]) -> None:
        items: list[Item] = []
        for message in messages:
            raw = message.value()
            try:
                items.append(decode_item(raw) if raw is not None else _withdrawn(message.key()))
            except (msgspec.MsgspecError, ValueError) as error:
                log.warning("item at offset %d is not readable: %s", message.offset(), error)
                self.worker.metrics.dead_letters.labels("malformed_item").inc()
        if items:
            self.worker.catalogue.put_items(items)
            self.worker.metrics.items.inc(len(items))

    def _send_dead_letters(self, batch: MicroBatch) -> None:
        """Return once every dead letter is acknowledged, so that its offset may be committed."""
        if not batch.dead_letters:
            return
        topics, failed = self.worker.topics, []
        for letter in batch.dead_letters:
            self.producer.produce(
                topics.dead_letters,
                value=letter.record.value,
                key=letter.record.key,
                headers=list(dead_letter_headers(letter, topics.events)),
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
            self.worker.metrics.dead_letters.labels(letter.reason.value).inc()
        left = self.producer.flush(DEAD_LETTER_TIMEOUT_S)
        if left or failed:
            raise DeadLetterError(
                f"{left + len(failed)} of {len(batch.dead_letters)} dead letters were not "
                f"acknowledged within {DEAD_LETTER_TIMEOUT_S} s ({failed[:1]}): stopping before "
                "their offsets are committed. Check the dead-letter topic, then start again."
            )

    def _count(self, batch: MicroBatch, num_applied: int, acknowledged_ms: int) -> None:
        metrics = self.worker.metrics
        metrics.batch.observe(batch.num_records)
        metrics.outside.inc(batch.num_outside)
        if num_applied:
            oldest = min(events[0].append_time_ms for events in batch.by_user.values())
            metrics.freshness.observe(max(0, acknowledged_ms - oldest) / 1000)

    def commit(self, consumer: Consumer) -> None:
        """Tell Kafka what is in Redis. A crash before this replays what Redis then skips.

        A commit that the group refuses in the middle of a rebalance is made up for by the next
        one, or by whoever gets the partition: it skips what the rows' positions say is in.
        """
        self.committed_at = time.monotonic()
        if not self.done:
            return
        offsets = [TopicPartition(topic, p, offset) for (topic, p), offset in self.done.items()]
        try:
            consumer.commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            if is_fatal(error.args[0]):
                raise
            log.warning("offsets not committed: %s", error)
            return
        self.done = {}

    def _measure_lag(self, consumer: Consumer) -> None:
        self.lag_at = time.monotonic()
        for assigned in consumer.position(consumer.assignment()):
            if assigned.topic != self.worker.topics.events:
                continue
            _, high = consumer.get_watermark_offsets(assigned, cached=True)
            lag = max(0, high - max(0, assigned.offset))
            self.worker.metrics.lag.labels(str(assigned.partition)).set(lag)

    def on_assign(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Log the assignment; states are read again when their users appear."""
        self.owned |= {(p.topic, p.partition) for p in partitions}
        log.info("assigned %s", [f"{p.topic}[{p.partition}]" for p in partitions])

    def on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Commit what is done before the partitions go; the next owner starts right there."""
        log.info("revoked %s", [f"{p.topic}[{p.partition}]" for p in partitions])
        self.commit(consumer)
        self._give_up(partitions)

    def on_lost(self, _consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Forget what was done on partitions that are no longer ours; committing is not ours."""
        log.warning("lost %s", [f"{p.topic}[{p.partition}]" for p in partitions])
        self._give_up(partitions)

    def _give_up(self, partitions: list[TopicPartition]) -> None:
        for gone in partitions:
            self.owned.discard((gone.topic, gone.partition))
            self.done.pop((gone.topic, gone.partition), None)
        self.processor.cache.clear()


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


def _withdrawn(key: bytes | None) -> Item:
    """Return the withdrawn item a tombstone stands for."""
    if key is None or not key.isdigit():
        raise ValueError(f"tombstone with key {key!r}; an item's key is its decimal id")
    return Item(item_id=int(key), name="", available=False)
