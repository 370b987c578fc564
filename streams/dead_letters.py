"""Where records go that are no events: their own bytes and key, and headers that say why.

`DeadLetterProducer` is the worker's side, `read_letters` the operator's; streams/redrive.py sends
them again.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from streams.errors import DeadLetterError, NoLetterError
from streams.kafka import watermarks
from streams.log_reader import LogReader
from streams.micro_batch import dead_letter_headers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from streams.kafka import KafkaConfig, Producer
    from streams.micro_batch import DeadLetter
    from streams.topics import Topics

# A dead letter that cannot be delivered in this time stops the worker before its offset commits.
DELIVERY_TIMEOUT_S: Final = 30.0
# What the worker adds to a record's own headers (streams.micro_batch.dead_letter_headers).
OUR_HEADERS: Final = frozenset(
    f"moveline-{name}"
    for name in ("reason", "detail", "topic", "partition", "offset", "append-time-ms")
)
UNKNOWN_REASON: Final = "unknown"
_STALL_S: Final = 30.0


@dataclass
class DeadLetterProducer:
    """Sends dead letters and waits for the broker's word."""

    producer: Producer
    topics: Topics

    def send(self, letters: Sequence[DeadLetter]) -> None:
        """Return once every letter is acknowledged, so that its record may be passed over.

        Raises:
            DeadLetterError: some were not; nothing after them may be committed.
        """
        if not letters:
            return
        failed: list[object] = []
        for letter in letters:
            self._produce(letter, failed)
        left = self.producer.flush(DELIVERY_TIMEOUT_S)
        if left or failed:
            raise DeadLetterError(
                f"{left + len(failed)} of {len(letters)} dead letters were not acknowledged "
                f"within {DELIVERY_TIMEOUT_S:g} s ({failed[:1]}): stopping before their offsets "
                f"are committed. Check the topic {self.topics.dead_letters}, then start again."
            )

    def _produce(self, letter: DeadLetter, failed: list[object]) -> None:
        while True:
            try:
                self.producer.produce(
                    self.topics.dead_letters,
                    value=letter.record.value,
                    key=letter.record.key,
                    headers=list(dead_letter_headers(letter, self.topics.events)),
                    on_delivery=lambda error, _: failed.append(error) if error else None,
                )
            except BufferError:
                # The queue is full of letters on their way; make room.
                self.producer.poll(DELIVERY_TIMEOUT_S)
            else:
                return


@dataclass(frozen=True, kw_only=True)
class StoredLetter:
    """A record of the dead-letter topic.

    Attributes:
        partition, offset: where the letter lies.
        stored_ms: when the broker stored it.
        key, value: the refused record's own.
        own_headers: likewise, in order.
        facts: our headers as text, without "moveline-": reason, detail, topic, partition, offset,
            append-time-ms.
    """

    partition: int
    offset: int
    stored_ms: int
    key: bytes | None
    value: bytes | None
    own_headers: tuple[tuple[str, bytes | None], ...]
    facts: Mapping[str, str]

    @property
    def reason(self) -> str:
        """Return why it was refused."""
        return self.facts.get("reason", UNKNOWN_REASON)

    @property
    def place(self) -> str:
        """Return what `moveline dlq show` takes."""
        return f"{self.partition}:{self.offset}"

    @property
    def source(self) -> tuple[str, str, str]:
        """Return where the refused record stands: two generations' workers both set it aside."""
        facts = self.facts
        return facts.get("topic", ""), facts.get("partition", ""), facts.get("offset", "")


def read_letters(kafka: KafkaConfig, topics: Topics) -> Iterator[StoredLetter]:
    """Yield the letters the topic holds now, in offset order; joins no group.

    Raises:
        BrokerUnavailableError: the broker went silent before the end.
    """
    bounds = watermarks(kafka, topics.dead_letters)
    ends = {partition: high for partition, (low, high) in bounds.items() if low < high}
    starts = {partition: bounds[partition][0] for partition in ends}
    yield from _read_span(kafka, topics.dead_letters, starts, ends)


def read_letter(kafka: KafkaConfig, topics: Topics, partition: int, offset: int) -> StoredLetter:
    """Return one letter.

    Raises:
        NoLetterError: there is none at that place.
    """
    low, high = watermarks(kafka, topics.dead_letters).get(partition, (0, 0))
    if low <= offset < high:
        span = {partition: offset}, {partition: offset + 1}
        for letter in _read_span(kafka, topics.dead_letters, *span):
            return letter
    raise NoLetterError(
        f"there is no dead letter {partition}:{offset}; partition {partition} of "
        f"{topics.dead_letters} holds offsets {low}..{high - 1}: see moveline dlq list"
    )


def _read_span(
    kafka: KafkaConfig, topic: str, starts: Mapping[int, int], ends: Mapping[int, int]
) -> Iterator[StoredLetter]:
    reader = LogReader.open(kafka)
    try:
        with closing(reader.stretches(topic, starts, ends, timeout_s=_STALL_S)) as stretches:
            for stretch in stretches:
                yield from map(_to_letter, stretch.messages)
    finally:
        reader.close()


def _to_letter(message: Any) -> StoredLetter:  # noqa: ANN401 - the library calls all optional
    headers = message.headers() or []
    ours = {name: value for name, value in headers if name in OUR_HEADERS}
    return StoredLetter(
        partition=message.partition(),
        offset=message.offset(),
        stored_ms=message.timestamp()[1],
        key=message.key(),
        value=message.value(),
        own_headers=tuple(header for header in headers if header[0] not in OUR_HEADERS),
        facts={
            name.removeprefix("moveline-"): (value or b"").decode(errors="replace")
            for name, value in ours.items()
        },
    )
