"""Keeps Redis' pointers equal to the newest record of the control topic."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import msgspec

from features.redis import Pointers
from streams.control import POINTERS_KEY
from streams.nearline_metrics import NearlineMetrics

if TYPE_CHECKING:
    from features.redis import CatalogueStore
    from streams.log_reader import LogReader

# Records of the control topic read at once; it is compacted and small.
_RECORDS_MAX: Final = 1_000
# A pointer that moves on every time it is written to Redis: somebody promotes in a loop.
_TRIES_MAX: Final = 10


@dataclass
class PointerFollower:
    """Remembers how far the control topic is read, and what its newest pointers are."""

    reader: LogReader
    topic: str
    catalogue: CatalogueStore
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    next_offset: int = 0
    newest: Pointers | None = None

    def heal(self) -> bool:
        """Make Redis say what the topic says; return whether it had said something else.

        Whoever publishes writes the topic first and Redis after. So when the topic has not moved
        since Redis was put right, whatever is written to Redis later is newer.

        Raises:
            StoreError: Redis did not answer.
            StreamError: Kafka did not.
        """
        healed = False
        for _ in range(_TRIES_MAX):
            if not self._read_on() and healed:
                break
            if self.newest is None or self.newest == self.catalogue.get_pointers():
                break
            self.catalogue.put_pointers(self.newest)
            healed = True
        self.metrics.healed.inc(healed)
        return healed

    def _read_on(self) -> bool:
        """Read what is new; return whether there was anything."""
        low, high = self.reader.bounds(self.topic, 0)
        start = max(low, self.next_offset if self.next_offset <= high else 0)
        for messages, _ in self.reader.read(self.topic, 0, start, high, records_max=_RECORDS_MAX):
            for message in messages:
                if message.key() == POINTERS_KEY and message.value():
                    self.newest = msgspec.json.decode(message.value() or b"", type=Pointers)
        self.next_offset = high
        return start < high
