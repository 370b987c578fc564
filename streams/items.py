"""The items topic into the catalogue: the last entry of an item wins.

Entries and the position that says up to where they are applied are several commands. The position
follows its entries, moves only from where this worker left it, and entries are read back: a Redis
that went back, or another worker's newer entries, end in reading the topic again from where Redis
stands.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from features.catalogue import Item, decode_item
from streams.errors import OutOfStepError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from streams.kafka import Message
    from streams.metrics import WorkerMetrics

log = logging.getLogger("moveline.worker")


class Catalogue(Protocol):
    """What is asked of Redis: `features.redis.CatalogueStore`."""

    def put_items(self, items: Iterable[Item]) -> None:
        """Store entries."""
        ...

    def get_items(self, item_ids: Sequence[int]) -> list[Item | None]:
        """Return entries in the order asked."""
        ...

    def get_items_read(self) -> dict[int, int]:
        """Return the position by partition."""
        ...

    def put_items_read(self, partition: int, offset: int) -> None:
        """Set the position."""
        ...

    def advance_items_read(self, partition: int, *, expected: int, offset: int) -> bool:
        """Set the position if it stands at `expected`; return whether it did."""
        ...


@dataclass
class ItemsReader:
    """Applies the records of the items topic.

    Attributes:
        left: by partition, the position as this worker left it in Redis.
    """

    catalogue: Catalogue
    metrics: WorkerMetrics
    left: dict[int, int] = field(default_factory=dict)

    def assign(self, partitions: Sequence[int]) -> dict[int, int]:
        """Learn where Redis stands; return the offset to read each partition from."""
        starts = self._stands_at(partitions)
        self.left |= starts
        return starts

    def apply(self, messages: Sequence[Message]) -> None:
        """Return once one partition's next records are in the catalogue.

        Raises:
            StoreError: Redis is away or full.
            OutOfStepError: Redis does not stand where this worker left it.
        """
        items = list(self._readable(messages))
        newest = {item.item_id: item for item in items}
        self.catalogue.put_items(newest.values())
        last: Any = messages[-1]
        partition, end = int(last.partition()), int(last.offset()) + 1
        left = self.left[partition]
        is_written = self.catalogue.advance_items_read(partition, expected=left, offset=end)
        if not is_written or self.catalogue.get_items(list(newest)) != list(newest.values()):
            at = self._stands_at([partition])[partition]
            # Newer entries may just have been overwritten: whoever owns the topic reads them again.
            self.catalogue.put_items_read(partition, min(at, left))
            raise _out_of_step(at, left)
        self.left[partition] = end
        self.metrics.items.inc(len(items))

    def check(self, partitions: Sequence[int]) -> None:
        """Return if Redis stands where this worker left it; raises as `apply` does."""
        for partition, at in self._stands_at(partitions).items():
            if at != self.left[partition]:
                raise _out_of_step(at, self.left[partition])

    def _stands_at(self, partitions: Sequence[int]) -> dict[int, int]:
        if not partitions:
            return {}
        read = self.catalogue.get_items_read()
        return {partition: read.get(partition, 0) for partition in partitions}

    def _readable(self, messages: Iterable[Message]) -> Iterable[Item]:
        for message in messages:
            try:
                yield to_item(message)
            except (msgspec.MsgspecError, ValueError) as error:
                log.warning("item at offset %s is not readable: %s", message.offset(), error)
                self.metrics.dead_letters.labels("malformed_item").inc()


def to_item(message: Message) -> Item:
    """Return the catalogue entry in a record; a tombstone withdraws its item."""
    raw, key = message.value(), message.key()
    if raw is not None:
        return decode_item(raw)
    if key is None or not key.isdigit():
        raise ValueError(f"tombstone with key {key!r}; an item's key is its decimal id")
    return Item(item_id=int(key), name="", available=False)


def _out_of_step(at: int, left: int) -> OutOfStepError:
    return OutOfStepError(
        f"the catalogue stands at offset {at} of the items topic, this worker left it at {left}: "
        "another worker wrote, or Redis went back."
    )
