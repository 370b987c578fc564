"""The real Triton logs what it answered, counts the records, and never waits for Kafka."""

from __future__ import annotations

import urllib.request
from functools import partial
from typing import TYPE_CHECKING

import pytest

from features.feature_log import Served, decode_served
from features.view import seen_clock_ms, view_user
from scoring.signature import Degraded
from streams.feature_log import read_feature_log
from streams.kafka import KafkaConfig, ensure_topics
from streams.topics import Topics
from tests.asking import whole
from tests.scoring.states import NOW_MS, write_clicks
from tests.scoring.test_served import frozen
from tests.small import SMALL
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from compose.local.stack import LocalStack
    from features.redis import StateStore
    from scoring.client import Recommender

pytestmark = pytest.mark.servers
TOPICS = Topics()


@pytest.fixture(scope="session")
def logged_kafka(triton_stack: LocalStack) -> KafkaConfig:
    """The broker that the served model logs to, its topics created."""
    kafka = KafkaConfig(triton_stack.addresses.kafka)
    ensure_topics(kafka, TOPICS.specs(1))
    return kafka


def find(kafka: KafkaConfig, request_id: str) -> list[Served]:
    values = read_feature_log(kafka, TOPICS.feature_log, since_ms=0, records_max=100_000)
    found = [decode_served(value) for value in values]
    return [
        one
        for one in found
        # Where Redis was late it is asked again, under the same name.
        if one.request_id == request_id and Degraded.STORE_AWAY not in Degraded(one.degraded)
    ]


def counted(stack: LocalStack, name: str) -> float:
    """Return a counter of Triton's metrics page, both instances together."""
    with urllib.request.urlopen(f"http://{stack.addresses.triton_metrics}/metrics") as page:
        lines = page.read().decode().splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_an_answer_is_logged(
    logged_kafka: KafkaConfig,
    go_live: Callable[..., None],
    recommender: Recommender,
    served_store: StateStore,
    triton_stack: LocalStack,
) -> None:
    state = write_clicks(served_store, 5, range(12))
    go_live(None)
    before = counted(triton_stack, "moveline_feature_log_records_total")
    answers = whole(lambda: recommender.recommend_many([5, 6], k=2, request_id="r-1"))
    until(
        lambda: counted(triton_stack, "moveline_feature_log_records_total") >= before + 2,
        what="counted",
    )
    # What was asked while the pointers went live is counted too.
    until(lambda: len(find(logged_kafka, "r-1")) == 2, what="logged")
    known, unknown = sorted(find(logged_kafka, "r-1"), key=lambda one: one.user_id)
    view = known.view()
    assert view is not None
    expected = view_user(state, seen_clock_ms(known.served_at_ms, state), SMALL)
    assert view.recent.tobytes() == expected.recent.tobytes()
    assert view.mid.tobytes() == expected.mid.tobytes()
    assert view.user_session == expected.user_session
    assert known.item_ids == [one.item_id for one in answers[0].items]
    assert known.generation == served_store.generation
    assert known.served_at_ms > NOW_MS
    assert unknown.view() is None


def test_a_broker_that_stands_still_holds_up_no_answer(
    logged_kafka: KafkaConfig,
    go_live: Callable[..., None],
    recommender: Recommender,
    served_store: StateStore,
    triton_stack: LocalStack,
) -> None:
    write_clicks(served_store, 5, range(12))
    go_live(None)
    with frozen(triton_stack, "kafka"):
        for number in range(100):
            answer = whole(partial(recommender.recommend, 5, k=2, request_id=f"still-{number}"))
            assert answer.provenance.ordinal == 12
    # What waited in the queue is delivered once the broker goes on.
    until(lambda: find(logged_kafka, "still-99"), what="delivered afterwards")
