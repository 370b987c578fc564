"""Made-up traffic, and what a generation's rows must say after it, worked out from the topic alone.

The generator knows which records are events; the expectation takes their order from the broker and
everything else from `step` run from nothing and from the oracle.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec
import numpy as np

from features import keys
from features.chunks import FIRST_FIELD
from features.clock import now_ms
from features.events import CONTENT_TYPE_HEADER, MSGPACK_TYPE, Event, encode_event
from features.oracle import oracle_state
from features.redis_client import scan
from features.row import encode_row
from features.state import EMPTY_STATE, RECORD, Accepted, step
from streams.kafka import make_producer
from streams.micro_batch import to_accepted
from streams.worker import to_record
from tests.streams.support import read_all

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from features.config import StateConfig
    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

_MSGPACK: Final = [(CONTENT_TYPE_HEADER, MSGPACK_TYPE)]
_HOUR_MS: Final = 3_600_000


class Sent(NamedTuple):
    """One record as a producer handed it over; `event` is None when it is not one."""

    key: bytes
    value: bytes
    headers: list[tuple[str, bytes]]
    event: Event | None


@dataclass
class Traffic:
    """Seeded records of many users: late events, repeats, impressions, both formats, garbage."""

    seed: int
    num_users: int = 300
    malformed_share: float = 0.01
    source: random.Random = field(init=False)
    newest: dict[int, list[Sent]] = field(default_factory=lambda: defaultdict(list))
    number: int = 0
    start_ms: int = field(default_factory=lambda: now_ms() - 4 * _HOUR_MS)

    def __post_init__(self) -> None:
        """Seed the source."""
        self.source = random.Random(self.seed)

    def make(self, count: int) -> list[Sent]:
        """Return the next records."""
        return [self._one() for _ in range(count)]

    def _one(self) -> Sent:
        source = self.source
        user = int(source.paretovariate(0.6)) % self.num_users
        sent_before = self.newest[user]
        kind = source.random()
        if kind < self.malformed_share:
            return self._garbage(user)
        if kind < self.malformed_share + 0.05 and sent_before:
            return source.choice(sent_before[-40:])
        self.number += 1
        sent = self._encoded(self._event(user))
        sent_before.append(sent)
        return sent

    def _event(self, user: int) -> Event:
        source = self.source
        time_ms = self.start_ms + self.number * 100
        if source.random() < 0.05:
            time_ms -= source.randrange(2 * _HOUR_MS)
        return Event(
            event_id=f"{self.seed}-{self.number}",
            user_id=user,
            item_id=source.choice([2**63 - 1, *range(50)]),
            action=source.choice(["impression", "click", "view", "purchase", "rating"]),
            event_time_ms=time_ms,
            domain=source.choice([None, "home", "brot & käse", "search"]),
            dwell_ms=source.choice([None, 0, 1200]),
            value=source.choice([None, 0.0, 4.5]),
        )

    def _encoded(self, event: Event) -> Sent:
        msgpack = self.source.random() < 0.3
        value = encode_event(event, msgpack=msgpack)
        return Sent(b"%d" % event.user_id, value, _MSGPACK if msgpack else [], event)

    def _garbage(self, user: int) -> Sent:
        wrong = msgspec.json.encode(
            {
                "event_id": f"bad-{self.source.random()}",
                "user_id": user,
                "item_id": 1,
                "action": "teleport",
                "event_time_ms": self.start_ms,
            }
        )
        value = self.source.choice([b"{broken", b"", b"[]", wrong])
        return Sent(b"%d" % user, value, [], None)


def publish(kafka: KafkaConfig, topic: str, records: Iterable[Sent]) -> None:
    """Return once the broker has acknowledged every record."""
    producer = make_producer(kafka)
    failed: list[object] = []
    for sent in records:
        producer.produce(
            topic,
            sent.value,
            sent.key,
            headers=list(sent.headers),
            on_delivery=lambda error, _: failed.append(error) if error else None,
        )
        producer.poll(0)
    assert not producer.flush(30)
    assert not failed


class Expected(NamedTuple):
    """What Redis must hold for one user."""

    row: bytes
    chunks: dict[bytes, bytes]


def accepted_of(
    kafka: KafkaConfig, topics: Topics, sent: Sequence[Sent], config: StateConfig
) -> dict[int, list[Accepted]]:
    """Return every user's valid streamed events in the order the topic has them.

    Which records are valid is the generator's word, not the decoder's.
    """
    events = {(one.key, one.value): one.event for one in sent}
    codes = {action: code for code, action in enumerate(config.actions)}
    by_user: dict[int, list[Accepted]] = defaultdict(list)
    messages = read_all(kafka, topics.events)
    assert len(messages) == len(sent)
    for message in messages:
        event = events[message.key() or b"", message.value() or b""]
        if event is not None and event.action in config.stream_actions:
            by_user[event.user_id].append(to_accepted(event, to_record(message), codes))
    return by_user


def expected_of(events: Sequence[Accepted], config: StateConfig) -> Expected:
    """Return a user's row and chunks by one step from nothing, after the oracle has agreed."""
    change = step(EMPTY_STATE, events, config)
    oracle = oracle_state(events, config)
    chunks = [np.frombuffer(chunk.records, RECORD) for chunk in change.chunks]
    assert change.state.records["ordinal"].tolist() == [n.ordinal for n in oracle.tail]
    assert [chunk["ordinal"].tolist() for chunk in chunks] == [
        [n.ordinal for n in chunk] for chunk in oracle.chunks
    ]
    assert change.state.next_ordinal == oracle.next_ordinal
    assert change.state.num_late == oracle.num_late
    current = change.state.user_session
    assert (current and current._asdict()) == oracle.session
    return Expected(
        encode_row(change.state, len(config.actions)),
        {b"%d" % chunk.number: chunk.records for chunk in change.chunks},
    )


def assert_equals_oracle(
    store: StateStore, kafka: KafkaConfig, topics: Topics, sent: Sequence[Sent]
) -> int:
    """Return the number of users, after comparing each one's row and chunks byte by byte."""
    return assert_holds(store, accepted_of(kafka, topics, sent, store.config))


def assert_holds(store: StateStore, by_user: Mapping[int, Sequence[Accepted]]) -> int:
    """Likewise, of events that were read before: the topic need not have them any more."""
    rows = dict(zip(by_user, store.read_rows(list(by_user)), strict=True))
    for user, events in by_user.items():
        expected = expected_of(events, store.config)
        assert rows[user] == expected.row, f"row of user {user}"
        held = store.client.hgetall(keys.chunks_key(store.generation, user))
        # The cap on waiting chunks may have dropped the oldest: exactly those that are marked.
        first = int(held.pop(FIRST_FIELD, 0))
        kept = {n: data for n, data in expected.chunks.items() if int(n) >= first}
        assert held == kept, f"chunks of user {user}"
        assert not first or kept, f"all chunks of user {user}"
    held_rows = scan(store.client, f"moveline:*:g{store.generation}:row:*", count=1_000)
    assert len(set(held_rows)) == len(by_user)
    return len(by_user)
