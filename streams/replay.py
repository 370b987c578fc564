"""`moveline replay`: the same steps, from the log, into another generation.

Positions are the bucket checkpoints of that generation in Redis, nothing else: a replay that was
stopped or killed goes on where it was by being started again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from features.errors import GenerationError, StoreUnavailableError
from features.generations import Built, Generations, start_field
from streams.chain import Chain, claimed_chain, settled_chain
from streams.chunk_cap import WAITING_CHUNKS_DEFAULT, keep_to_cap
from streams.control import read_pointers
from streams.effects import Effects
from streams.errors import OutOfStepError, StateContendedError
from streams.event_log import BATCH_MAX, EventLog, logs_of, num_missing
from streams.metrics import WorkerMetrics
from streams.processor import Processor
from streams.progress import progress_bar
from streams.retired import is_complete
from streams.worker import IDLE_INTERVAL_S, OUT_OF_STEP_MAX, RETRY_S

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path
    from threading import Event as StopEvent

    from features.redis import CatalogueStore, StateStore
    from streams.kafka import KafkaConfig
    from streams.micro_batch import DeadLetter, MicroBatch
    from streams.topics import Topics

log = logging.getLogger("moveline.replay")

# With a rate, a micro-batch holds this many seconds of it, so that the rate is even.
_PACE_S: Final = 0.1


@dataclass(frozen=True, kw_only=True)
class ReplayRequest:
    """What to replay.

    Attributes:
        origin: "earliest", "lake" (files first, whatever Kafka has), or "time".
        from_ms: with "time", the append time to start at.
        to_ms: the append time to end before; None ends where the log ends when it starts.
        users: only these; the generation can be compared then, never promoted.
        rate: events per second at most.
        batch_max: records in a micro-batch.
        lake: folder of the lake, for what Kafka has no more.
        waiting_chunks_max: chunks of a user that stay in Redis when the lake has older ones.
    """

    origin: str = "earliest"
    from_ms: int | None = None
    to_ms: int | None = None
    users: frozenset[int] | None = None
    rate: float | None = None
    batch_max: int = BATCH_MAX
    lake: Path | None = None
    waiting_chunks_max: int = WAITING_CHUNKS_DEFAULT

    def built(self, logs: Sequence[EventLog]) -> Built:
        """Return what is recorded of it."""
        users = None
        if self.users is not None:
            text = ",".join(map(str, sorted(self.users)))
            users = hashlib.sha256(text.encode()).hexdigest()[:16]
        return Built(
            # The first of the log's topics stands for all of them.
            topic=logs[0].topic,
            origin=self.origin,
            from_ms=self.from_ms,
            to_ms=self.to_ms,
            users=users,
            num_users=len(self.users or ()),
            starts={
                start_field(events.source, partition): offset
                for events in logs
                for partition, offset in self.starts(events).items()
            },
        )

    def logs(self, kafka: KafkaConfig, topics: Topics, chain: Chain) -> list[EventLog]:
        """Return the topics it reads, in this order."""
        from_lake = self.origin == "lake"
        return logs_of(kafka, topics, chain, lake=self.lake, prefer_lake=from_lake)

    def starts(self, events: EventLog) -> dict[int, int]:
        """Return the first offset by partition."""
        if self.from_ms is not None:
            return events.starts_at(self.from_ms)
        return dict.fromkeys(events.end_offsets(), 0)

    def ends(self, events: EventLog) -> dict[int, int]:
        """Return the offset to stop before, by partition."""
        if self.to_ms is not None:
            return events.starts_at(self.to_ms)
        return events.end_offsets()


@dataclass(kw_only=True)
class ReplayReport:
    """What one run of a replay did, and how far the generation is.

    Attributes:
        num_records: records read.
        num_applied: events that changed a state.
        num_missing: offsets left, because it was stopped; 0 when it is done.
        dead_letters: records that are no events under these rules, by reason. They are counted,
            not sent: the live workers have.
    """

    num_records: int = 0
    num_applied: int = 0
    num_duplicates: int = 0
    num_missing: int = 0
    dead_letters: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class _NoDeadLetters:
    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Send nothing: what is no event was set aside when it came in."""


@dataclass
class Replay:
    """One run of a replay into the generation of `store`, under the rules in `store.config`."""

    kafka: KafkaConfig
    topics: Topics
    store: StateStore
    catalogue: CatalogueStore
    request: ReplayRequest
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)

    def run(self, stop: StopEvent, *, shown: bool = False) -> ReplayReport:
        """Return at the end, or after the micro-batch during which `stop` was set.

        Args:
            stop: ends between two micro-batches; the same replay goes on from there.
            shown: a progress bar on stderr.

        Raises:
            GenerationError: the generation is live, kept by workers, or built by another replay.
            SchemaMismatchError: it was begun under other rules.
            StoreFullError: going on would take memory from live traffic.
            LogHoleError: offsets that neither Kafka nor the lake has.
            StateContendedError: somebody else writes this generation.
            StreamError: Kafka made going on impossible.
        """
        self.store.ping()
        self.store.refuse_eviction()
        claimed_chain(self.kafka, self.topics)
        chain, newest_ends = settled_chain(self.kafka, self.topics)
        logs = self.request.logs(self.kafka, self.topics, chain)
        built = self._claim(logs)
        if self.request.to_ms is None:
            ends = [*(source.end_offsets for source in chain.retired), newest_ends]
        else:
            ends = [self.request.ends(events) for events in logs]
        report, started_s = ReplayReport(), time.monotonic()
        spans = list(zip(logs, ends, strict=True))
        is_done = False
        while not is_done and not stop.is_set():
            is_done = self._run_topics(chain, spans, built, report, stop, shown=shown)
        report.seconds = time.monotonic() - started_s
        return report

    def _run_topics(
        self,
        chain: Chain,
        spans: list[tuple[EventLog, dict[int, int]]],
        built: Built,
        report: ReplayReport,
        stop: StopEvent,
        *,
        shown: bool,
    ) -> bool:
        """Read one topic after the other; False: Redis went back, so begin with the first again."""
        report.num_missing = 0
        is_cut = False
        for events, ends in spans:
            starts = {p: built.start_of(events.source, p) for p in ends}
            if is_cut:
                # Nothing of this one may be applied before the one before it has ended.
                report.num_missing += num_missing(starts, ends)
                continue
            processor = self._processor(events.source)
            effects = Effects(processor, self.catalogue, _NoDeadLetters(), self.metrics)
            before = Chain(chain.sources[: events.source + 1])
            try:
                _Run(self, events, effects, starts, ends, before, report).to_end(stop, shown=shown)
            except _EarlierTopicError:
                return False
            retired = chain.sources[events.source].ends
            is_cut = report.num_missing > 0 or (
                retired is not None and any(end < retired[str(p)] for p, end in ends.items())
            )
        return True

    def _processor(self, source: int) -> Processor:
        # Kept to here as well: a rebuild must not need more memory than what it rebuilds.
        cap = keep_to_cap(
            self.store,
            self.request.lake,
            self.topics.at(0).events,
            self.metrics,
            chunks_max=self.request.waiting_chunks_max,
        )
        store = self.store.as_recorded()
        return Processor(store, store.config, source=source, chunk_cap=cap)

    def _claim(self, logs: Sequence[EventLog]) -> Built:
        generation = self.store.generation
        live = read_pointers(self.kafka, self.topics)
        if live is not None and live.generation == generation:
            raise GenerationError(
                f"g{generation} is live: a replay builds another generation, which "
                "`moveline promote` then makes the live one."
            )
        built = Generations(self.store.client).claim(generation, self.request.built(logs))
        self.store.claim_generation()
        return built


class _EarlierTopicError(Exception):
    """Redis went back to where a topic before this one was not applied whole."""


@dataclass
class _Run:
    """One topic of the log; `chain` holds it and those before it, `report` is added to."""

    replay: Replay
    events: EventLog
    effects: Effects
    starts: Mapping[int, int]
    ends: dict[int, int]
    chain: Chain
    report: ReplayReport
    positions: dict[int, int] = field(default_factory=dict)
    num_records: int = 0
    num_out_of_step: int = 0
    kept_at: float = field(default_factory=time.monotonic)
    started_s: float = field(default_factory=time.monotonic)

    def to_end(self, stop: StopEvent, *, shown: bool) -> None:
        self._place()
        self._refuse_other_log()
        total = num_missing(self.positions, self.ends)
        name = f"replay {self.events.topic} into g{self.replay.store.generation}"
        with progress_bar(name, total=total, shown=shown) as advance:
            while num_missing(self.positions, self.ends) and not stop.is_set():
                try:
                    self._read(stop, total, advance)
                except OutOfStepError as error:
                    self._count_refusal(error)
                except StoreUnavailableError as error:
                    log.warning("waiting: %s", error)
                    stop.wait(RETRY_S)
                self._place_again(stop)
        self._finish()
        self.report.num_missing += num_missing(self.positions, self.ends)

    def _read(self, stop: StopEvent, total: int, advance: Callable[[int], None]) -> None:
        request, config = self.replay.request, self.effects.processor.config
        keep = None if request.users is None else request.users.__contains__
        batch_max = request.batch_max
        if request.rate is not None:
            batch_max = max(1, min(batch_max, int(request.rate * _PACE_S)))
        shown = total - num_missing(self.positions, self.ends)
        batches = self.events.batches(
            self.positions, self.ends, config, keep=keep, batch_max=batch_max
        )
        with closing(batches):
            for batch in batches:
                self._apply(batch)
                done = total - num_missing({**self.positions, **batch.ends}, self.ends)
                advance(max(0, done - shown))
                shown = max(shown, done)
                self._pace(stop)
                if stop.is_set():
                    self.positions.update(batch.ends)
                    return

    def _apply(self, batch: MicroBatch) -> None:
        report = self.effects.apply_batch(batch)
        self.num_out_of_step = 0
        self.num_records += batch.num_records
        self.report.num_records += batch.num_records
        self.report.num_applied += report.num_applied
        self.report.num_duplicates += report.num_duplicates
        self.report.dead_letters.update(letter.reason.value for letter in batch.dead_letters)
        if self.effects.processor.chunk_cap is not None:
            self.effects.processor.chunk_cap.drop()
        if time.monotonic() - self.kept_at > IDLE_INTERVAL_S:
            self.kept_at = time.monotonic()
            self.effects.processor.advance_idle({**self.positions, **batch.ends})
            generation = self.replay.store.generation
            Generations(self.replay.store.client).refuse_full(generation)

    def _pace(self, stop: StopEvent) -> None:
        rate = self.replay.request.rate
        if rate is not None:
            ahead_s = self.num_records / rate - (time.monotonic() - self.started_s)
            if ahead_s > 0:
                stop.wait(ahead_s)

    def _place(self) -> None:
        """Learn where the generation stands."""
        applied = self.effects.processor.assign(sorted(self.starts))
        self.positions = {p: max(start, applied[p]) for p, start in self.starts.items()}
        if self.events.source:
            self._begin()

    def _begin(self) -> None:
        """Leave checkpoints in a Redis that has the topics before this one whole.

        One that comes back older than now then refuses what is written.
        """
        try:
            self.effects.processor.begin(sorted(self.starts))
        except OutOfStepError as error:
            # Another writer; the next write is refused and counted.
            log.warning("%s", error)
        if not is_complete(self.replay.store, self.chain):
            raise _EarlierTopicError

    def _refuse_other_log(self) -> None:
        """Raise if the generation is further than Kafka: it was built from another log."""
        bounds = self.events.bounds()
        for partition, at in self.positions.items():
            high = bounds[partition][1]
            if at > high:
                name = f"g{self.replay.store.generation}"
                raise GenerationError(
                    f"{name} has partition {partition} of {self.events.topic} up to offset {at}, "
                    f"Kafka ends at {high}: it was built from another log. Point at "
                    f"the right broker, or start over: moveline drop {name}"
                )

    def _place_again(self, stop: StopEvent) -> None:
        if not num_missing(self.positions, self.ends) or stop.is_set():
            return
        while not stop.is_set():
            try:
                self._place()
            except StoreUnavailableError as error:
                log.warning("waiting: %s", error)
                stop.wait(RETRY_S)
            else:
                self.effects.forget()
                return

    def _count_refusal(self, error: OutOfStepError) -> None:
        log.warning("%s Reading the checkpoints again.", error)
        self.num_out_of_step += 1
        if self.num_out_of_step > OUT_OF_STEP_MAX:
            generation = self.replay.store.generation
            raise StateContendedError(
                f"writes were refused {OUT_OF_STEP_MAX} times in a row: another process writes "
                f"generation g{generation}, a worker or a second replay. Stop it, then repeat "
                "the command."
            ) from error

    def _finish(self) -> None:
        """Bring idle buckets up, so that lag is what it is and going on reads nothing twice."""
        try:
            self.effects.processor.advance_idle(self.positions)
        except (StoreUnavailableError, OutOfStepError) as error:
            log.warning("checkpoints of idle buckets stay behind: %s", error)
