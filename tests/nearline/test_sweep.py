"""Goal: one value for each closed session, whatever the sweep is interrupted by.

States come from the real worker, records go to the real topic; the expectation is worked out from
a list of all events.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import msgspec
import pytest

from features.clock import now_ms
from features.events import Event, encode_event
from features.nearline import SessionStore
from features.row import decode_row
from streams.errors import DeliveryError
from streams.kafka import KafkaConfig, make_producer
from streams.sessions import SessionSweeper
from tests.nearline.traffic import HOUR_MS, Recent, all_sessions
from tests.streams.support import NOWHERE, read_all
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import Sent, accepted_of, publish

if TYPE_CHECKING:
    from collections.abc import Callable

    from features.redis import StateStore
    from streams.kafka import Producer
    from streams.log_reader import LogReader
    from streams.topics import Topics

NUM_EVENTS = 3_000


@pytest.fixture
def sweeper(
    reader: LogReader, producer: Producer, topics: Topics, store: StateStore, partitions: int
) -> Callable[[], SessionSweeper]:
    """Make a sweeper as a fresh process has it."""

    def make() -> SessionSweeper:
        sessions = SessionStore(store.client, store.generation)
        return SessionSweeper(store, sessions, reader, producer, topics, partitions, lateness_ms=0)

    return make


@pytest.fixture
def sent(kafka: KafkaConfig, topics: Topics, store: StateStore) -> list[Sent]:
    """Records in the topic, and every user's state in Redis."""
    records = Recent(seed=21, num_users=60, num_events=NUM_EVENTS).make(NUM_EVENTS)
    publish(kafka, topics.events, records)
    apply_all(kafka, topics, store)
    return records


def apply_all(kafka: KafkaConfig, topics: Topics, store: StateStore) -> None:
    """Return once a worker has applied what there is and brought every checkpoint up."""
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)


def values_sent(kafka: KafkaConfig, topics: Topics) -> dict[tuple[int, int], Counter[bytes]]:
    """Return how often each value was sent for each (user, session)."""
    found: dict[tuple[int, int], Counter[bytes]] = {}
    for message in read_all(kafka, topics.sessions):
        value = message.value() or b""
        record = msgspec.json.decode(value)
        assert message.key() == b"%d" % record["user_id"]
        place = record["user_id"], record["session_id"]
        found.setdefault(place, Counter())[value] += 1
    return found


def expected_of(
    kafka: KafkaConfig, topics: Topics, sent: list[Sent], store: StateStore
) -> dict[tuple[int, int], dict[str, object]]:
    """Return every session of every user; all of them are over."""
    return {
        (user, number): {"generation": store.generation, "user_id": user, **session}
        for user, events in accepted_of(kafka, topics, sent, store.config).items()
        for number, session in all_sessions(events, store.config).items()
    }


def assert_one_value_each(
    kafka: KafkaConfig,
    topics: Topics,
    sent: list[Sent],
    store: StateStore,
    *,
    times: int | None = 1,
) -> None:
    """Compare the topic with the oracle; `times` is how often each record may be in it."""
    found = values_sent(kafka, topics)
    assert all(len(values) == 1 for values in found.values())
    assert times is None or all(max(values.values()) <= times for values in found.values())
    decoded = {place: msgspec.json.decode(min(values)) for place, values in found.items()}
    assert decoded == expected_of(kafka, topics, sent, store)


def test_every_session_once_and_a_second_sweep_sends_nothing(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    sent: list[Sent],
    sweeper: Callable[[], SessionSweeper],
) -> None:
    users = accepted_of(kafka, topics, sent, store.config)
    rows = [decode_row(row) for row in store.read_rows(list(users)) if row is not None]
    assert any(state.departed for state in rows), "rows whose trailer alone cannot be read"
    first = sweeper()
    first.round()
    first.round()
    sweeper().round()
    assert_one_value_each(kafka, topics, sent, store)
    assert first.metrics.registry.get_sample_value("moveline_nearline_sweep_rounds_total") == 2


def test_a_crash_between_marker_and_send(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    sent: list[Sent],
    sweeper: Callable[[], SessionSweeper],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("streams.sessions.DELIVERY_TIMEOUT_S", 0.2)
    broken = sweeper()
    broken.producer = make_producer(KafkaConfig(NOWHERE))
    for _ in range(2):
        with pytest.raises(DeliveryError, match="kept and sent again"):
            broken.round()
    broken.producer.purge()
    monkeypatch.undo()
    assert values_sent(kafka, topics) == {}
    sweeper().round()
    assert_one_value_each(kafka, topics, sent, store)


def test_a_crash_between_send_and_outbox_repeats_the_same_bytes(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    sent: list[Sent],
    sweeper: Callable[[], SessionSweeper],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class CrashError(Exception):
        pass

    def crash(*_: object) -> None:
        raise CrashError

    monkeypatch.setattr(SessionStore, "sent", crash)
    with pytest.raises(CrashError):
        sweeper().round()
    monkeypatch.undo()
    assert values_sent(kafka, topics)
    # Between crash and restart a late event changes one of the states: the record stays.
    late = Sent(*late_event(kafka, topics))
    publish(kafka, topics.events, [late])
    apply_all(kafka, topics, store)
    sweeper().round()
    found = values_sent(kafka, topics)
    assert all(len(values) == 1 for values in found.values())
    assert max(max(values.values()) for values in found.values()) == 2
    expected = expected_of(kafka, topics, [*sent, late], store)
    differing = [p for p, v in found.items() if msgspec.json.decode(min(v)) != expected[p]]
    assert found.keys() == expected.keys()
    assert len(differing) <= 1


def late_event(
    kafka: KafkaConfig, topics: Topics
) -> tuple[bytes, bytes, list[tuple[str, bytes]], Event]:
    """Return an event that continues a session already sent."""
    record = msgspec.json.decode(read_all(kafka, topics.sessions)[0].value() or b"")
    event = Event(
        event_id="late",
        user_id=record["user_id"],
        item_id=1,
        action="click",
        event_time_ms=record["last_ms"],
    )
    return b"%d" % event.user_id, encode_event(event), [], event


def test_two_sweepers_at_once_and_a_redis_that_went_back(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    sent: list[Sent],
    sweeper: Callable[[], SessionSweeper],
) -> None:
    client = store.client
    snapshot = {key: client.dump(key) for key in client.keys("*")}
    one, other = sweeper(), sweeper()
    while not (one.step(budget_s=0) and other.step(budget_s=0)):
        pass
    client.flushall()
    for key, value in snapshot.items():
        client.restore(key, 0, value)
    sweeper().round()
    assert_one_value_each(kafka, topics, sent, store, times=None)


def test_no_session_closes_by_a_clock_its_state_has_not_caught_up_with(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    sweeper: Callable[[], SessionSweeper],
) -> None:
    start_ms = now_ms() - 3 * HOUR_MS

    def event(number: int) -> Sent:
        one = Event(
            event_id=f"e{number}",
            user_id=7,
            item_id=number,
            action="click",
            event_time_ms=start_ms + number * 1_000_000,
        )
        return Sent(b"7", encode_event(one), [], one)

    records = [event(0)]
    publish(kafka, topics.events, records)
    apply_all(kafka, topics, store)
    records.append(event(1))
    publish(kafka, topics.events, records[1:])
    # The session's gap has passed by the wall clock; the event that continues it is not applied.
    late = sweeper()
    late.round()
    late.round()
    assert values_sent(kafka, topics) == {}
    apply_all(kafka, topics, store)
    late.round()
    assert_one_value_each(kafka, topics, records, store)


def test_histories_that_are_gone_are_counted_and_passed_over(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    sent: list[Sent],
    sweeper: Callable[[], SessionSweeper],
) -> None:
    dropped = store.client.keys(f"moveline:*:g{store.generation}:chunks:*")
    assert dropped
    store.client.delete(*dropped)
    one = sweeper()
    one.round()
    one.round()
    gone = one.metrics.registry.get_sample_value("moveline_nearline_session_histories_gone_total")
    assert gone == len(dropped)
    found = values_sent(kafka, topics)
    expected = expected_of(kafka, topics, sent, store)
    assert {place: msgspec.json.decode(min(values)) for place, values in found.items()} == {
        place: expected[place] for place in found
    }
    newest = {user: max(s for u, s in expected if u == user) for user, _ in expected}
    assert set(newest.items()) <= found.keys()
