"""The record that ends a partition of the event log: what comes after it does not count there.

`moveline repartition` puts one at the end of every partition. Because it is a record of the log,
every reader, now and in a replay, ends at the same offset, and no clock and no message between
processes has a part in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterable

    from streams.micro_batch import Record

SEAL_HEADER: Final = "moveline-seal"


def seal_headers(source: int) -> list[tuple[str, bytes]]:
    """Return the headers of a seal of the event log's n-th topic; it has no key and no value."""
    return [(SEAL_HEADER, b"%d" % source)]


def is_seal(key: bytes | None, value: bytes | None, headers: object) -> bool:
    """Return whether a record is a seal; no event can be one, for events have a key."""
    if key is not None or value is not None or not headers:
        return False
    plain: Any = headers
    return any(name == SEAL_HEADER for name, _ in plain)


def cut_at_seals(records: Iterable[Record]) -> tuple[list[Record], dict[int, int]]:
    """Return the records before the first seal of their partition, and where those seals are."""
    kept: list[Record] = []
    seals: dict[int, int] = {}
    for record in records:
        if record.partition in seals:
            continue
        if is_seal(record.key, record.value, record.headers):
            seals[record.partition] = record.offset
        else:
            kept.append(record)
    return kept, seals
