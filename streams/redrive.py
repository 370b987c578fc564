"""Dead letters sent into the events topic again: their own key, bytes and headers.

What was sent is remembered in the control topic, a record per reason with the next letter by
partition, so that a second redrive does not send it again. It is written after the broker has
acknowledged the letters: a crash in between sends up to BATCH_MAX of them once more, which changes
nothing, for event ids repeat. A letter that is refused again comes back as a new letter.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from streams.control import read_records, write_records
from streams.dead_letters import DELIVERY_TIMEOUT_S, read_letters
from streams.errors import DeliveryError
from streams.kafka import make_producer
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from streams.dead_letters import StoredLetter
    from streams.kafka import KafkaConfig, Producer
    from streams.topics import Topics

# Letters sent before it is remembered that they were.
BATCH_MAX: Final = 1_000
_KEY: Final = "redriven:"

# Next letter to send, by reason and by partition of the dead-letter topic.
Marks = dict[str, dict[int, int]]


@dataclass(kw_only=True)
class RedriveReport:
    """What a redrive did, or with `dry_run` would do.

    Attributes:
        sent: letters sent, by reason.
        num_before: letters left out because an earlier redrive has sent them.
        num_twins: left out because another letter is of the same record (two generations' workers
            each set it aside).
    """

    sent: Counter[str] = field(default_factory=Counter)
    num_before: int = 0
    num_twins: int = 0


def read_marks(kafka: KafkaConfig, topics: Topics) -> Marks:
    """Return up to where letters were sent again, by reason."""
    decode = msgspec.json.Decoder(dict[str, int]).decode
    return {
        key.decode().removeprefix(_KEY): {int(p): at for p, at in decode(value).items()}
        for key, value in read_records(kafka, topics).items()
        if key.startswith(_KEY.encode())
    }


def is_redriven(letter: StoredLetter, marks: Marks) -> bool:
    """Return whether an earlier redrive has sent the letter."""
    return letter.offset < marks.get(letter.reason, {}).get(letter.partition, 0)


def redrive(
    kafka: KafkaConfig,
    topics: Topics,
    *,
    reason: str | None = None,
    dry_run: bool = False,
    shown: bool = False,
) -> RedriveReport:
    """Return once every letter that is there now, and was not sent before, is in the events topic.

    Args:
        kafka: the cluster.
        topics: where letters are and events go.
        reason: only letters of this reason.
        dry_run: send nothing, count what would be sent.
        shown: a progress bar on stderr.

    Raises:
        DeliveryError: the broker did not take one; what was acknowledged before is remembered.
    """
    report, marks = RedriveReport(), read_marks(kafka, topics)
    letters = _choose(list(read_letters(kafka, topics)), marks, reason, report)
    if dry_run:
        report.sent.update(letter.reason for letter in letters)
        return report
    producer = make_producer(kafka)
    with progress_bar("redrive", total=len(letters), unit="letters", shown=shown) as advance:
        for at in range(0, len(letters), BATCH_MAX):
            batch = letters[at : at + BATCH_MAX]
            _send(producer, topics, batch)
            _remember(kafka, topics, marks, batch)
            report.sent.update(letter.reason for letter in batch)
            advance(len(batch))
    return report


def _choose(
    letters: Sequence[StoredLetter], marks: Marks, reason: str | None, report: RedriveReport
) -> list[StoredLetter]:
    """Return the letters to send, each record's once."""
    chosen: list[StoredLetter] = []
    records = {letter.source for letter in letters if is_redriven(letter, marks)}
    for letter in letters:
        if reason not in {None, letter.reason}:
            continue
        if is_redriven(letter, marks):
            report.num_before += 1
        elif letter.source in records and all(letter.source):
            report.num_twins += 1
        else:
            records.add(letter.source)
            chosen.append(letter)
    return chosen


def _send(producer: Producer, topics: Topics, letters: Sequence[StoredLetter]) -> None:
    failed: list[object] = []
    for letter in letters:
        producer.produce(
            topics.events,
            value=letter.value,
            key=letter.key,
            headers=list(letter.own_headers),
            on_delivery=lambda error, _: failed.append(error) if error else None,
        )
    left = producer.flush(DELIVERY_TIMEOUT_S)
    if left or failed:
        raise DeliveryError(
            f"{left + len(failed)} of {len(letters)} letters, {letters[0].place} to "
            f"{letters[-1].place}, were not acknowledged ({failed[:1]}). Look at the broker and "
            "repeat the command: it goes on from there.",
            retriable=True,
        )


def _remember(
    kafka: KafkaConfig, topics: Topics, marks: Marks, letters: Sequence[StoredLetter]
) -> None:
    changed: dict[str, Mapping[int, int]] = {}
    for letter in letters:
        ends = marks.setdefault(letter.reason, {})
        ends[letter.partition] = letter.offset + 1
        changed[letter.reason] = ends
    records = {
        f"{_KEY}{reason}".encode(): msgspec.json.encode({str(p): at for p, at in ends.items()})
        for reason, ends in changed.items()
    }
    write_records(kafka, topics, records)
