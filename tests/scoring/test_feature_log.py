"""What is logged is what was read and answered, and logging never waits or raises.

A real Redis and a real broker; a function in the model's place, as in test_recommend.py.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from features.feature_log import Served, decode_served, is_sampled
from features.redis import Canary, Pointers, Trending, connect
from features.schema import schema_hash
from features.view import seen_clock_ms, view_user
from scoring.arms import CANARY, CONTROL, LIVE, arm_of
from scoring.feature_log import FeatureLog
from scoring.live import Live, read_snapshot
from scoring.recommend import Ask, RetrievalError, Retrieved, answer
from scoring.signature import Degraded
from streams.feature_log import QUEUE_RECORDS_MAX, FeatureLogProducer, read_feature_log
from streams.kafka import ensure_topics
from streams.properties import KafkaConfig
from tests.scoring.states import NOW_MS, write_clicks
from tests.small import SMALL
from tests.waiting import until

if TYPE_CHECKING:
    import redis

    from features.redis import CatalogueStore, StateStore
    from streams.topics import Topics

pytestmark = pytest.mark.servers
NOWHERE = KafkaConfig("127.0.0.1:9")
ITEMS = [100, 101, 102]


def model(*asked: object, **_: object) -> Retrieved:
    size = len(asked[1].ordinal_B)  # type: ignore[attr-defined]
    return Retrieved([ITEMS] * size, [[0.0, -1.0, -2.0]] * size, [[0.5, 0.3, 0.2]] * size)


def away(*_: object, **__: object) -> Retrieved:
    raise RetrievalError("gone")


class Kept:
    """Remembers what it is sent."""

    def __init__(self) -> None:
        self.records: list[tuple[bytes, bytes]] = []

    def __call__(self, key: bytes, value: bytes) -> None:
        """Take it."""
        self.records.append((key, value))


@pytest.fixture
def live(redis_client: redis.Redis, catalogue: CatalogueStore, store: StateStore) -> Live:
    """What is live: version 3 over the test's generation."""
    store.claim_generation()
    catalogue.put_pointers(Pointers(3, store.generation))
    catalogue.put_trending(Trending((7, 8), (0.4, 0.3)))
    one = Live(redis_client)
    one.snapshot = read_snapshot(catalogue, one.snapshot)
    return one


def logged(live: Live, asks: list[Ask], retrieve: object = model) -> list[Served]:
    kept = Kept()
    answers = answer(asks, live, retrieve, NOW_MS)  # type: ignore[arg-type]
    FeatureLog(share=1.0, send=kept).log(asks, answers, NOW_MS)
    assert [key for key, _ in kept.records] == [b"%d" % ask.user_id for ask in asks]
    return [decode_served(value) for _, value in kept.records]


def test_it_says_what_was_read_and_answered(live: Live, store: StateStore) -> None:
    state = write_clicks(store, 5, range(20))
    (one,) = logged(live, [Ask(5, 2, request_id="page-7")])
    clock_ms = seen_clock_ms(NOW_MS, state)
    expected = view_user(state, clock_ms, SMALL)
    assert expected.mid.size
    assert expected.user_session.is_open
    view = one.view()
    assert view is not None
    assert view.recent.tobytes() == expected.recent.tobytes()
    assert view.mid.tobytes() == expected.mid.tobytes()
    assert view.user_session == expected.user_session
    assert view.newest_event_time_ms == expected.newest_event_time_ms
    assert (one.ordinal, one.position, one.clock_ms) == (20, state.position, clock_ms)
    assert (one.user_id, one.generation, one.request_id) == (5, store.generation, "page-7")
    assert one.schema_hash == schema_hash(SMALL)
    assert (one.item_ids, one.scores) == (ITEMS[:2], [0.0, -1.0])
    assert (one.live_version, one.model_version, one.degraded) == (3, 3, 0)
    assert one.contribution == (0.5, 0.3, 0.2)
    assert one.served_at_ms == NOW_MS


def test_what_was_read_is_logged_when_the_model_is_away(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1, 2])
    (one,) = logged(live, [Ask(5, 2)], away)
    view = one.view()
    assert view is not None
    assert view.recent["item_id"].tolist() == [1, 2]
    assert Degraded(one.degraded) is Degraded.MODEL_AWAY
    assert (one.model_version, one.item_ids) == (0, [7, 8])


def test_an_unknown_user_and_a_store_away_are_told_apart(live: Live) -> None:
    (unknown,) = logged(live, [Ask(5, 2)])
    assert unknown.view() is None
    assert (unknown.ordinal, unknown.position) == (0, None)
    assert Degraded(unknown.degraded) is Degraded.UNKNOWN_USER
    live.client = connect("redis://127.0.0.1:9/0", timeout_s=0.2)
    (not_read,) = logged(live, [Ask(5, 2)])
    assert not_read.view() is None
    assert Degraded(not_read.degraded) is Degraded.STORE_AWAY


def test_what_was_asked_for_and_how_long_it_took_is_logged(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, range(20))
    ask = Ask(5, 2, candidates=(101, 100), in_domain=2**64 - 1)
    (one,) = logged(live, [ask])
    assert (one.candidates, one.in_domain) == ([101, 100], 2**64 - 1)
    assert (one.arm, one.has_mid) == ("live", True)
    assert 0 < one.took_ms < 10_000


def test_everybody_a_canary_concerns_is_logged(
    live: Live, store: StateStore, catalogue: CatalogueStore
) -> None:
    canary = Canary(9, None, "canary", 0.3, 0)
    catalogue.put_pointers(Pointers(3, store.generation, canary=canary))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    asks = [Ask(user, 1) for user in range(40)]
    kept = Kept()
    answers = answer(asks, live, model, NOW_MS)  # type: ignore[arg-type]
    FeatureLog(share=0.0, send=kept).log(asks, answers, NOW_MS)
    arms = {one.user_id: one.arm for one in (decode_served(value) for _, value in kept.records)}
    assert arms == {
        user: arm_of(user, canary) for user in range(40) if arm_of(user, canary) != LIVE
    }
    assert set(arms.values()) == {CANARY, CONTROL}


def test_only_the_sampled_users_are_logged(live: Live) -> None:
    asks = [Ask(user, 1) for user in range(40)]
    answers = answer(asks, live, model, NOW_MS)  # type: ignore[arg-type]
    for share in (0.0, 0.3, 1.0):
        kept = Kept()
        FeatureLog(share=share, send=kept).log(asks, answers, NOW_MS)
        users = [int(key) for key, _ in kept.records]
        assert users == [user for user in range(40) if is_sampled(user, share)]


def test_a_share_is_a_share_and_always_the_same_users() -> None:
    users = range(20_000)
    few = {user for user in users if is_sampled(user, 0.01)}
    more = {user for user in users if is_sampled(user, 0.1)}
    assert 120 < len(few) < 280
    assert 1_800 < len(more) < 2_200
    assert few < more
    assert not any(is_sampled(user, 0.0) for user in users)
    assert all(is_sampled(user, 1.0) for user in (*users, 2**63 - 1, -1))
    # For ever: reports of different days are about the same users.
    assert sorted(few)[:4] == [146, 165, 327, 388]


class Counts:
    """The sum of what it was told."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, number: int) -> None:
        """Count so many more."""
        self.number += number


@pytest.fixture
def patient_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the last records take longer than a server that stops may."""
    monkeypatch.setattr("streams.feature_log.CLOSE_TIMEOUT_S", 60.0)


@pytest.mark.usefixtures("patient_close")
def test_records_arrive_and_are_counted(kafka: KafkaConfig, topics: Topics) -> None:
    delivered, dropped = Counts(), Counts()
    producer = FeatureLogProducer(
        kafka, topics.feature_log, on_delivered=delivered, on_dropped=dropped
    )
    producer.start()
    sent = [(b"%d" % user, b"value-%d" % user) for user in range(50)]
    for key, value in sent:
        producer.send(key, value)
    producer.close()
    assert (delivered.number, dropped.number) == (50, 0)
    read = list(read_feature_log(kafka, topics.feature_log, since_ms=0, records_max=1_000))
    assert sorted(map(bytes, read)) == sorted(value for _, value in sent)
    few = list(read_feature_log(kafka, topics.feature_log, since_ms=0, records_max=9))
    assert 0 < len(few) <= 9


def test_kafka_away_costs_no_time_and_every_record_is_counted() -> None:
    delivered, dropped = Counts(), Counts()
    producer = FeatureLogProducer(
        NOWHERE, "t.feature-log", on_delivered=delivered, on_dropped=dropped
    )
    producer.start()
    number = QUEUE_RECORDS_MAX + 500
    slowest_s = 0.0
    for user in range(number):
        started_s = time.perf_counter()
        producer.send(b"%d" % user, b"x" * 1_000)
        slowest_s = max(slowest_s, time.perf_counter() - started_s)
    # One of 1,500 may meet a busy machine; none may wait for a broker (30 s).
    assert slowest_s < 10.0
    until(lambda: dropped.number >= 500, 30, what="what had no room is counted")
    producer.close()
    assert (delivered.number, dropped.number) == (0, number)


def test_a_topic_created_after_the_server_started_is_logged_to(
    kafka: KafkaConfig, topics: Topics
) -> None:
    delivered, dropped = Counts(), Counts()
    # By default librdkafka takes half a minute before it says that a topic is not there.
    impatient = KafkaConfig(kafka.bootstrap, {"topic.metadata.propagation.max.ms": "500"})
    later = f"{topics.feature_log}.later"
    producer = FeatureLogProducer(impatient, later, on_delivered=delivered, on_dropped=dropped)
    producer.start()

    def one_more() -> Counts:
        producer.send(b"1", b"value")
        return dropped

    until(lambda: one_more().number, what="the missing topic is noticed")
    spec = next(one for one in topics.specs(1) if one.name == topics.feature_log)
    ensure_topics(kafka, [replace(spec, name=later)])
    until(lambda: one_more() and delivered.number, 30, what="the new topic is written to")
    producer.close()


@pytest.mark.usefixtures("patient_close")
def test_a_record_too_large_is_dropped(kafka: KafkaConfig, topics: Topics) -> None:
    delivered, dropped = Counts(), Counts()
    producer = FeatureLogProducer(
        kafka, topics.feature_log, on_delivered=delivered, on_dropped=dropped
    )
    producer.start()
    producer.send(b"1", b"x" * 2_000_000)
    producer.send(b"1", b"small")
    producer.close()
    assert (delivered.number, dropped.number) == (1, 1)
