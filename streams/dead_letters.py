"""Where records go that are no events: their own bytes and key, and headers that say why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from streams.errors import DeadLetterError
from streams.micro_batch import dead_letter_headers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streams.kafka import Producer
    from streams.micro_batch import DeadLetter
    from streams.topics import Topics

# A dead letter that cannot be delivered in this time stops the worker before its offset commits.
DELIVERY_TIMEOUT_S: Final = 30.0


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
