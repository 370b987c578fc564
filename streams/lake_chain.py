"""The whole event log into the lake: each topic of its chain into a folder of its own."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final

from features.lake import next_offset
from streams.chain import checked_chain, known_chain
from streams.lake import FLUSH_S, LakeReport, LakeSink

if TYPE_CHECKING:
    from pathlib import Path
    from threading import Event as StopEvent

    from streams.chain import Chain
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

_LOG: Final = logging.getLogger("moveline.lake")
# How soon the sink goes over to the next topic after the end of one.
_CHAIN_INTERVAL_S: Final = 1.0


class LogSink:
    """Writes the topics of the log, one after the other, and follows the newest."""

    def __init__(
        self, kafka: KafkaConfig, topics: Topics, root: Path, *, flush_s: float = FLUSH_S
    ) -> None:
        """Say what goes where; nothing is opened yet. See `LakeSink`."""
        self._kafka = kafka
        self._topics = topics
        self._root = root
        self._flush_s = flush_s

    def run(
        self, stop: StopEvent, *, until_end: bool = False, progress: bool = False
    ) -> LakeReport:
        """Write events until `stop` is set, or with `until_end` up to what Kafka holds now.

        Raises:
            PartitionsChangedError: the newest topic has other partitions than it is recorded with.
            LakeError, StreamError: as `LakeSink.run`.
        """
        total, started_s = LakeReport(), time.monotonic()
        begin = 0
        while True:
            chain = checked_chain(self._kafka, self._topics)
            for number in range(begin, chain.current + 1):
                report = self._run_topic(
                    chain, number, stop, until_end=until_end, progress=progress
                )
                _add(total, report)
                if stop.is_set():
                    break
            if stop.is_set() or until_end:
                break
            begin = self._await_successor(chain, stop)
            if stop.is_set():
                break
        total.seconds = time.monotonic() - started_s
        return total

    def _run_topic(
        self, chain: Chain, number: int, stop: StopEvent, *, until_end: bool, progress: bool
    ) -> LakeReport:
        source, topic = chain.sources[number], self._topics.at(number).events
        ends = None if source.ends is None else source.end_offsets
        if ends is not None and all(
            (next_offset(self._root, topic, p) or 0) >= end for p, end in ends.items()
        ):
            # The topic may be gone from Kafka.
            return LakeReport(is_sealed=True)
        sink = LakeSink(
            self._kafka,
            topic,
            self._root,
            num_partitions=source.num_partitions,
            ends=ends,
            flush_s=self._flush_s,
        )
        return sink.run(stop, until_end=until_end or ends is not None, progress=progress)

    def _await_successor(self, chain: Chain, stop: StopEvent) -> int:
        """Return the topic to go on with, once the chain names it; the newest one has ended."""
        _LOG.info("%s has ended", self._topics.at(chain.current).events)
        while not stop.is_set():
            if known_chain(self._kafka, self._topics).current > chain.current:
                break
            stop.wait(_CHAIN_INTERVAL_S)
        return chain.current + 1


def _add(total: LakeReport, report: LakeReport) -> None:
    total.num_rows += report.num_rows
    total.num_flushes += report.num_flushes
    for reason, count in report.invalid.items():
        total.num_invalid += count
        total.invalid[reason] = total.invalid.get(reason, 0) + count
    total.ends, total.is_sealed = report.ends, report.is_sealed
