"""Whatever breaks the event contract is set aside with its bytes and its reason; work goes on."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from features.clock import now_ms
from features.errors import Reason
from features.events import VALUE_BYTES_MAX, VALUE_MAX, Event, encode_event
from streams.kafka import make_producer
from tests.streams.support import read_all
from tests.worker.running import running, wait_caught_up

if TYPE_CHECKING:
    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

MSGPACK = [("content-type", b"application/msgpack"), ("trace", b"\x00\xff")]


def json_event(**changes: Any) -> bytes:  # noqa: ANN401 - also wrong types, on purpose
    fields: dict[str, Any] = {
        "event_id": "e",
        "user_id": 7,
        "item_id": 1,
        "action": "click",
        "event_time_ms": 1_763_700_000_000,
    }
    merged = {**fields, **changes}
    return msgspec.json.encode({key: value for key, value in merged.items() if value is not None})


def huge() -> bytes:
    return json_event(request_id="x" * VALUE_BYTES_MAX)


CASES: list[tuple[Reason, bytes | None, bytes | None, list[tuple[str, bytes]]]] = [
    (Reason.TOO_LARGE, b"7", huge(), []),
    (Reason.MALFORMED, b"7", b"{broken", []),
    (Reason.MALFORMED, b"7", b"", []),
    (Reason.MALFORMED, b"7", None, []),
    (Reason.MALFORMED, b"7", b'{"event_id":"\xff"}', []),
    (Reason.MALFORMED, b"7", json_event().replace(b'"e"', b'"\\ud800"'), []),
    (Reason.MALFORMED, b"7", b"\xc1", MSGPACK),
    (Reason.WRONG_TYPE, b"7", json_event(item_id="one"), []),
    (Reason.WRONG_TYPE, b"7", json_event(event_id=None), []),
    (Reason.WRONG_TYPE, b"7", json_event(user_id=7.5), []),
    (Reason.WRONG_TYPE, b"7", json_event(dwell_ms=-1), []),
    (Reason.WRONG_TYPE, b"7", json_event(value=1e300), []),
    (Reason.WRONG_TYPE, b"7", b"[1, 2]", []),
    (Reason.UNSUPPORTED_VERSION, b"7", json_event(v=2), []),
    (Reason.ID_OUT_OF_RANGE, b"-7", json_event(user_id=-7), []),
    (Reason.ID_OUT_OF_RANGE, b"7", json_event(item_id=2**63), []),
    (Reason.KEY_MISMATCH, b"8", json_event(), []),
    (Reason.KEY_MISMATCH, None, json_event(), []),
    (Reason.KEY_MISMATCH, b"07", json_event(), []),
    (Reason.UNKNOWN_ACTION, b"7", json_event(action="teleport"), []),
    (Reason.TIME_OUT_OF_RANGE, b"7", json_event(event_time_ms=-1), []),
    (Reason.TIME_OUT_OF_RANGE, b"7", json_event(event_time_ms=10**16), []),
    (Reason.TIME_IN_FUTURE, b"7", json_event(event_time_ms=now_ms() + 3_600_000), []),
]


def test_every_reason_has_a_case() -> None:
    assert {case[0] for case in CASES} == set(Reason)


@pytest.fixture
def letters(kafka: KafkaConfig, topics: Topics, store: StateStore) -> list[Any]:
    """The dead letters of all cases, which a worker met between two good events."""
    producer = make_producer(kafka)
    good = [
        Event(event_id=f"good-{i}", user_id=7, item_id=i, action="click", event_time_ms=1_000 + i)
        for i in range(2)
    ]
    producer.produce(topics.events, encode_event(good[0]), b"7")
    for number, (_, key, value, headers) in enumerate(CASES):
        extra = [*headers, ("case", b"%d" % number)]
        producer.produce(topics.events, value, key, headers=extra)
    producer.produce(topics.events, encode_event(good[1]), b"7")
    assert not producer.flush(30)
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)
    expected = Counter(case[0].value for case in CASES)
    for reason in Reason:
        assert worker.counted("dead_letters_total", reason=reason.value) == expected[reason.value]
    assert store.load([7])[7].records["item_id"].tolist() == [0, 1]
    return read_all(kafka, topics.dead_letters)


def test_every_dead_letter_carries_bytes_reason_and_origin(
    letters: list[Any], kafka: KafkaConfig, topics: Topics
) -> None:
    assert len(letters) == len(CASES)
    sources = {(m.partition(), m.offset()): m for m in read_all(kafka, topics.events)}
    seen = set()
    for letter in letters:
        headers = dict(letter.headers())
        number = int(headers["case"])
        reason, key, value, sent_headers = CASES[number]
        assert headers["moveline-reason"] == reason.value.encode(), number
        # librdkafka hands an empty value out as it was sent: empty is not absent.
        assert (letter.key(), letter.value()) == (key, value), number
        for name, raw in sent_headers:
            assert headers[name] == raw
        assert headers["moveline-detail"]
        assert headers["moveline-topic"] == topics.events.encode()
        place = int(headers["moveline-partition"]), int(headers["moveline-offset"])
        source = sources[place]
        assert (source.key(), source.value()) == (key, value)
        assert int(headers["moveline-append-time-ms"]) == source.timestamp()[1]
        seen.add(number)
    assert seen == set(range(len(CASES)))


@pytest.mark.parametrize("value", [VALUE_MAX, -VALUE_MAX, 0.0])
def test_the_largest_values_are_taken(
    kafka: KafkaConfig, topics: Topics, store: StateStore, value: float
) -> None:
    producer = make_producer(kafka)
    producer.produce(topics.events, json_event(value=value), b"7")
    assert not producer.flush(30)
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)
    assert store.load([7])[7].records["value"].tolist() == [value]
