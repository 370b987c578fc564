"""`moveline repartition`: the event log goes on in a new topic with another number of partitions.

  1. the chain says that the topic is being sealed, from which offsets on, and how wide the next is;
  2. the next topic exists;
  3. each partition of the old topic has a seal: what comes after it does not count there;
  4. what does not count there is in the next topic, where it does;
  5. the chain says that the topic has ended, where, and that the next one takes events.
Each step finds out whether it was done before, so that the command can be repeated after a crash.
Nothing is copied but what 4 moves: the old events stay in the old topic and in the lake, and a
user's events there come before those in the next topic.

4 can be repeated later, for producers that were told of the new topic late.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from streams.chain import Chain, Source, known_chain, write_chain
from streams.control import read_records, write_records
from streams.errors import DeliveryError, RepartitionError, StreamError, TopicMissingError
from streams.kafka import end_offsets, ensure_topics, make_producer, watermarks
from streams.log_reader import LogReader
from streams.placement import partitions_of
from streams.progress import progress_bar
from streams.seal import is_seal, seal_headers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.redis import StateStore
    from streams.kafka import KafkaConfig, Message
    from streams.topics import Topics

log = logging.getLogger("moveline.repartition")

# Records looked at between two notes of how far that is.
STRETCH_RECORDS: Final = 5_000
DELIVERY_TIMEOUT_S: Final = 30.0
MOVED_HEADER: Final = "moveline-moved-from"
_KEY: Final = "moved:"


@dataclass(kw_only=True)
class RepartitionReport:
    """What one run did.

    Attributes:
        old: the topic that has ended; None: nothing was to be ended.
        new: the topic that takes events now.
        num_partitions: of it.
        num_moved: records that did not count in retired topics and were moved.
    """

    old: str | None
    new: str
    num_partitions: int
    num_moved: int = 0


@dataclass
class Repartition:
    """One run of the command.

    Attributes:
        topics: of the installation.
        replication: copies of the new topic.
        live: the live generation, whose checkpoints tell up to where everything lies where it
            belongs; None looks at all of the old topic.
    """

    kafka: KafkaConfig
    topics: Topics
    replication: int = 1
    live: StateStore | None = None
    shown: bool = False

    def run(self, num_partitions: int) -> RepartitionReport:
        """Return once the log goes on in a topic of so many partitions, and nothing is left behind.

        Raises:
            RepartitionError: another number of partitions was begun with.
            DeliveryError: the broker did not take a record; repeat the command.
            StreamError: Kafka does not answer or refuses.
        """
        # Ends before the chain: seals of a run that this one does not see yet lie behind them.
        number = known_chain(self.kafka, self.topics).current
        ends = end_offsets(self.kafka, self.topics.at(number).events)
        chain = known_chain(self.kafka, self.topics)
        if chain.current != number or not self._is_wanted(chain, len(ends), num_partitions):
            return self._report(chain, None, self.move_late())
        chain = self._begin(chain, ends, num_partitions)
        self._create(chain)
        sealed = _announced(chain, self._seal(chain))
        self._mark_moved(chain)
        # Before producers are told, so that older events come first.
        num_moved = self._move_from(sealed, number)
        self._refuse_another_run(chain)
        write_chain(self.kafka, self.topics, sealed)
        return self._report(sealed, self.topics.at(number).events, num_moved)

    def move_late(self) -> int:
        """Return how many records were moved that retired topics were sent since they ended.

        Raises:
            StreamError: as `run`.
        """
        chain = known_chain(self.kafka, self.topics)
        num_moved = 0
        for number in range(len(chain.retired)):
            try:
                num_moved += self._move_from(chain, number)
            except TopicMissingError:
                log.info("%s was deleted", self.topics.at(number).events)
        return num_moved

    def _report(self, chain: Chain, ended: str | None, num_moved: int) -> RepartitionReport:
        return RepartitionReport(
            old=ended,
            new=self.topics.at(chain.current).events,
            num_partitions=chain.newest.num_partitions,
            num_moved=num_moved,
        )

    def _is_wanted(self, chain: Chain, found: int, num_partitions: int) -> bool:
        """Return whether the newest topic is to end, or has begun to."""
        newest, topic = chain.newest, self.topics.at(chain.current).events
        if newest.sealing is not None:
            if newest.next_partitions != num_partitions:
                raise RepartitionError(
                    f"{topic} is being repartitioned to {newest.next_partitions} partitions, not "
                    f"to {num_partitions}. End that first: moveline repartition --partitions "
                    f"{newest.next_partitions}"
                )
            return True
        return (newest.num_partitions, found) != (num_partitions, num_partitions)

    def _begin(self, chain: Chain, ends: Mapping[int, int], num_partitions: int) -> Chain:
        if chain.newest.sealing is not None:
            return chain
        begun = msgspec.structs.replace(
            chain.newest, next_partitions=num_partitions, sealing=_as_text(ends)
        )
        chain = Chain((*chain.retired, begun))
        write_chain(self.kafka, self.topics, chain)
        return chain

    def _refuse_another_run(self, chain: Chain) -> None:
        if known_chain(self.kafka, self.topics) != chain:
            raise RepartitionError(
                f"another run of this command has changed where {self.topics.prefix}'s events go. "
                "Let it end, then repeat this one."
            )

    def _create(self, chain: Chain) -> None:
        topics = self.topics.at(chain.current + 1)
        assert chain.newest.next_partitions is not None
        specs = topics.specs(chain.newest.next_partitions, self.replication)
        ensure_topics(self.kafka, [spec for spec in specs if spec.name == topics.events])

    def _seal(self, chain: Chain) -> dict[int, int]:
        """Return the offset of each partition's first seal, after sending those that are missing.

        Two that seal at once send two; both find the first.
        """
        topic = self.topics.at(chain.current).events
        begins = {int(p): at for p, at in (chain.newest.sealing or {}).items()}
        seals = self._find_seals(topic, begins)
        missing = sorted(begins.keys() - seals.keys())
        if missing:
            self._send_seals(topic, chain.current, missing)
            seals |= self._find_seals(topic, {p: begins[p] for p in missing})
        unsealed = sorted(begins.keys() - seals.keys())
        if unsealed:
            raise StreamError(
                f"{topic} has no seal in partitions {unsealed} although they were acknowledged: "
                "the broker lost them. Repeat the command."
            )
        return seals

    def _find_seals(self, topic: str, begins: Mapping[int, int]) -> dict[int, int]:
        bounds = watermarks(self.kafka, topic)
        seals: dict[int, int] = {}
        with closing(LogReader.open(self.kafka)) as reader:
            for partition, begin in begins.items():
                low, high = bounds[partition]
                found = _first_seal(reader, topic, partition, (max(low, begin), high))
                if found is not None:
                    seals[partition] = found
        return seals

    def _send_seals(self, topic: str, source: int, partitions: Sequence[int]) -> None:
        producer, failed = make_producer(self.kafka), list[object]()
        for partition in partitions:
            producer.produce(
                topic,
                value=None,
                headers=list(seal_headers(source)),
                partition=partition,
                on_delivery=lambda error, _: failed.append(error) if error else None,
            )
        _flush(producer, failed, f"the seals of {topic}")

    def _mark_moved(self, chain: Chain) -> None:
        """Record from where records may lie in the wrong place, before anything is moved."""
        number = chain.current
        if self._moved_up_to(number) is not None:
            return
        starts = dict.fromkeys(range(chain.newest.num_partitions), 0)
        if self.live is not None:
            # No worker has passed a record that lies in the wrong partition.
            applied = self.live.read_checkpoints(number, list(starts))
            starts = {p: max(0, min(applied[p])) for p in starts}
        self._remember(number, starts)

    def _move_from(self, chain: Chain, number: int) -> int:
        """Send what does not count in a retired topic to the newest one; return how many."""
        source, topic = chain.sources[number], self.topics.at(number).events
        positions = self._moved_up_to(number) or {}
        bounds = watermarks(self.kafka, topic)
        starts = {p: max(low, positions.get(p, 0)) for p, (low, _) in bounds.items()}
        total = sum(max(0, high - starts[p]) for p, (_, high) in bounds.items())
        target = self.topics.at(chain.current).events
        num_moved = 0
        with (
            progress_bar(f"look through {topic}", total=total, shown=self.shown) as advance,
            closing(LogReader.open(self.kafka)) as reader,
        ):
            for partition, (_, high) in bounds.items():
                at = starts[partition]
                stretches = reader.read(topic, partition, at, high, records_max=STRETCH_RECORDS)
                for messages, end in stretches:
                    strays = _strays(messages, partition, source)
                    self._send(target, strays)
                    num_moved += len(strays)
                    advance(end - at)
                    at = end
                    if strays:
                        self._remember(number, positions | {partition: end})
                    positions[partition] = end
        self._remember(number, positions)
        return num_moved

    def _send(self, target: str, strays: Sequence[Message]) -> None:
        if not strays:
            return
        producer, failed = make_producer(self.kafka), list[object]()
        for message in strays:
            plain: Any = message
            place = f"{plain.topic()}/{plain.partition()}/{plain.offset()}".encode()
            while True:
                try:
                    producer.produce(
                        target,
                        value=plain.value(),
                        key=plain.key(),
                        headers=[*(plain.headers() or ()), (MOVED_HEADER, place)],
                        on_delivery=lambda error, _: failed.append(error) if error else None,
                    )
                    break
                except BufferError:
                    producer.poll(DELIVERY_TIMEOUT_S)
        _flush(producer, failed, f"{len(strays)} records for {target}")

    def _moved_up_to(self, number: int) -> dict[int, int] | None:
        recorded = read_records(self.kafka, self.topics).get(f"{_KEY}{number}".encode())
        if recorded is None:
            return None
        offsets = msgspec.json.decode(recorded, type=dict[str, int])
        return {int(partition): offset for partition, offset in offsets.items()}

    def _remember(self, number: int, positions: Mapping[int, int]) -> None:
        record = msgspec.json.encode(_as_text(positions))
        write_records(self.kafka, self.topics, {f"{_KEY}{number}".encode(): record})


def num_late(kafka: KafkaConfig, topics: Topics, chain: Chain) -> dict[str, int]:
    """Return by retired topic how many offsets `moveline repartition` has not looked at yet.

    One that was deleted is left out.
    """
    late: dict[str, int] = {}
    records = read_records(kafka, topics)
    for number in range(len(chain.retired)):
        recorded = records.get(f"{_KEY}{number}".encode(), b"{}")
        seen = msgspec.json.decode(recorded, type=dict[str, int])
        topic = topics.at(number).events
        try:
            ends = end_offsets(kafka, topic)
        except TopicMissingError:
            # Deleted: nothing can come into it any more.
            continue
        late[topic] = sum(max(0, end - seen.get(str(p), 0)) for p, end in ends.items())
    return late


def _announced(chain: Chain, ends: Mapping[int, int]) -> Chain:
    newest = chain.newest
    assert newest.next_partitions is not None
    # Partitions beyond the recorded number count nowhere: all they hold is moved.
    counted = {p: at for p, at in ends.items() if p < newest.num_partitions}
    retired = Source(num_partitions=newest.num_partitions, ends=_as_text(counted))
    return Chain((*chain.retired, retired, Source(num_partitions=newest.next_partitions)))


def _strays(messages: Sequence[Message], partition: int, source: Source) -> list[Message]:
    """Return the records of a retired topic's partition that do not count there, seals left out."""
    keys = [_key_of(message) for message in messages]
    belongs = partitions_of([key or b"" for key in keys], source.num_partitions)
    end = source.end_offsets.get(partition, 0)
    return [
        message
        for message, key, belonging in zip(messages, keys, belongs, strict=True)
        if ((message.offset() or 0) >= end or (key is not None and belonging != partition))
        and not is_seal(key, message.value(), message.headers())
    ]


def _first_seal(reader: LogReader, topic: str, partition: int, span: tuple[int, int]) -> int | None:
    for messages, _ in reader.read(topic, partition, *span, records_max=STRETCH_RECORDS):
        for message in messages:
            if is_seal(_key_of(message), message.value(), message.headers()):
                return message.offset()
    return None


def _key_of(message: Any) -> bytes | None:  # noqa: ANN401 - the library types it as text, too
    key: bytes | None = message.key()
    return key


def _flush(producer: Any, failed: list[object], what: str) -> None:  # noqa: ANN401 - the library's
    left = producer.flush(DELIVERY_TIMEOUT_S)
    if left or failed:
        raise DeliveryError(
            f"{what} were not all acknowledged within {DELIVERY_TIMEOUT_S:g} s ({failed[:1]}). "
            "Look at the broker and repeat the command: it goes on from there.",
            retriable=True,
        )


def _as_text(offsets: Mapping[int, int]) -> dict[str, int]:
    return {str(partition): offset for partition, offset in offsets.items()}
