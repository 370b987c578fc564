"""Keeps Redis' pointers and live memory versions equal to what the control topic says."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from features.errors import StaleTokenError
from features.lifelong_store import get_live_memories, put_live_memories
from streams.control import MEMORIES_KEY, decode_memories, decode_pointers
from streams.nearline_metrics import NearlineMetrics

if TYPE_CHECKING:
    from features.lifelong import LiveMemory
    from features.redis import CatalogueStore, Pointers
    from streams.log_reader import LogReader

log = logging.getLogger("moveline.nearline")

# Records of the control topic read at once; it is compacted and small.
_RECORDS_MAX: Final = 1_000
# A pointer that moves on every time it is written to Redis: somebody promotes in a loop.
_TRIES_MAX: Final = 10


@dataclass
class PointerFollower:
    """Remembers how far the control topic is read, and what its newest records are."""

    reader: LogReader
    topic: str
    catalogue: CatalogueStore
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    next_offset: int = 0
    newest: Pointers | None = None
    memories: tuple[LiveMemory, ...] | None = None

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
            differs = self._put_pointers()
            if not (self._put_memories() or differs):
                break
            healed = True
        self.metrics.healed.inc(healed)
        return healed

    def _put_pointers(self) -> bool:
        """Make Redis name what is live; return whether it had named something else."""
        if self.newest is None or self.newest == self.catalogue.get_pointers():
            return False
        try:
            self.catalogue.put_pointers(self.newest)
        except StaleTokenError as error:
            # Whoever wrote those has written the topic before: reading on finds them. If not, the
            # topic has lost records, and which of the two is right is for a person to say.
            log.warning("Redis' pointers are left as they are: %s", error)
            return False
        return True

    def _put_memories(self) -> bool:
        """Likewise, the memory versions that are kept up to date."""
        client = self.catalogue.client
        if self.memories is None or self.memories == get_live_memories(client):
            return False
        put_live_memories(client, self.memories)
        return True

    def _read_on(self) -> bool:
        """Read what is new; return whether there was anything."""
        low, high = self.reader.bounds(self.topic, 0)
        if self.next_offset > high:
            # Another topic of that name: what the one before said is no longer said.
            self.next_offset, self.newest, self.memories = 0, None, None
        start = max(low, self.next_offset)
        for messages, _ in self.reader.read(self.topic, 0, start, high, records_max=_RECORDS_MAX):
            for message in messages:
                found = decode_pointers(message.key(), message.value())
                if found is not None:
                    # A smaller token is that of somebody who came too late.
                    if self.newest is None or found.token >= self.newest.token:
                        self.newest = found
                elif message.key() == MEMORIES_KEY and message.value():
                    self.memories = decode_memories(message.value() or b"")
        self.next_offset = high
        return start < high
