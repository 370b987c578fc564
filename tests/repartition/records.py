"""Records of one user as the broker hands them out, and micro-batches of them."""

from __future__ import annotations

from features.clock import now_ms
from features.events import Event, encode_event
from streams.micro_batch import MicroBatch, Record, sort_records
from streams.placement import partitions_of
from streams.seal import seal_headers
from tests.conftest import SMALL

NOW_MS = now_ms()
# Of 3 partitions: user 7 belongs into BELONGS.
USER = 7
BELONGS = partitions_of([b"7"], 3)[0]


def record(number: int, *, partition: int = BELONGS, user: int = USER) -> Record:
    """Return an event of a user at an offset."""
    event = Event(
        event_id=f"e-{user}-{number}",
        user_id=user,
        item_id=number,
        action="click",
        event_time_ms=NOW_MS,
    )
    return Record(partition, number, NOW_MS, b"%d" % user, encode_event(event), None)


def seal(number: int, partition: int = BELONGS) -> Record:
    """Return a seal at an offset."""
    return Record(partition, number, NOW_MS, None, None, list(seal_headers(0)))


def batch_of(*records: Record, source: int = 0) -> MicroBatch:
    """Return the micro-batch of these records of a topic of the log."""
    return sort_records(records, SMALL, source)
