"""The numbered effects of one micro-batch.

What a crash between any two of them leaves, and how it heals: ARCHITECTURE.md, section 8.

  1. dead letters are acknowledged by the broker;
  2. domains are in Redis: whatever earlier Redis comes back has those of the states it has;
  3. states, with their source position and their bucket's checkpoint, are acknowledged by Redis;
  4. Kafka is told the offsets (the worker, now and then).
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from features.clock import now_ms
from streams.metrics import WorkerMetrics
from streams.micro_batch import sort_records

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from streams.micro_batch import DeadLetter, MicroBatch, Record
    from streams.processor import Processor, Report

log = logging.getLogger("moveline.worker")


class DeadLetters(Protocol):
    """Keeps records that are no events."""

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Return once they are safe."""
        ...


class Catalogue(Protocol):
    """What the worker writes besides states: `features.redis.CatalogueStore`."""

    def put_domains(self, domains: Mapping[int, str]) -> None:
        """Remember which text a domain hash stands for."""
        ...


@dataclass
class Effects:
    """Takes micro-batches through their effects, in order.

    Attributes:
        dead_from: by partition, the offset from which dead letters are to be sent: those before
            it were acknowledged before Kafka was told so, and are not sent twice.
        domains: hashes whose text is in Redis.
        seals: by partition, the offset of the record that ends it, once it was met.
    """

    processor: Processor
    catalogue: Catalogue
    dead_letters: DeadLetters
    metrics: WorkerMetrics = field(default_factory=WorkerMetrics)
    dead_from: dict[int, int] = field(default_factory=dict)
    domains: set[int] = field(default_factory=set)
    seals: dict[int, int] = field(default_factory=dict)
    clock: Callable[[], int] = now_ms

    def apply(self, records: Sequence[Record]) -> Report:
        """Return once effects 1 to 3 of these records have happened; raises as they do."""
        batch = sort_records(records, self.processor.config, self.processor.source)
        self.send_dead_letters(batch)
        report = self.apply_batch(batch)
        self.seals |= batch.seals
        return report

    def apply_batch(self, batch: MicroBatch) -> Report:
        """Effects 2 and 3 of a micro-batch that is sorted already."""
        new = {code: text for code, text in batch.domains.items() if code not in self.domains}
        self.catalogue.put_domains(new)
        report = self.processor.apply(batch)
        acknowledged_ms = self.clock()
        # Again, for new domains are rare: Redis may have gone back since, to where the states fit.
        self.catalogue.put_domains(new)
        self.domains |= new.keys()
        self._count(batch, report, acknowledged_ms)
        return report

    def forget(self) -> None:
        """Write everything again that Redis may have lost."""
        self.domains.clear()

    def send_dead_letters(self, batch: MicroBatch) -> None:
        """Effect 1 of a micro-batch that is sorted already."""
        letters = [
            letter
            for letter in batch.dead_letters
            if letter.record.offset >= self.dead_from.get(letter.record.partition, 0)
        ]
        self.dead_letters.send(letters)
        for letter in letters:
            self.metrics.dead_letters.labels(letter.reason.value).inc()
            # A second attempt at this micro-batch, for Redis was away, must not send it again.
            self.dead_from[letter.record.partition] = letter.record.offset + 1

    def _count(self, batch: MicroBatch, report: Report, acknowledged_ms: int) -> None:
        self.metrics.add(report)
        self.metrics.batch.observe(batch.num_records)
        self.metrics.outside.inc(batch.num_outside)
        if report.num_applied:
            oldest = min(events[0].append_time_ms for events in batch.by_user.values())
            self.metrics.freshness.observe(max(0, acknowledged_ms - oldest) / 1000)
