"""The real Triton: what `recommend` says over gRPC when all is well and when a part is away."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from features.catalogue import Item
from scoring.client import AsyncRecommender, Recommender
from scoring.errors import (
    DeadlineExceededError,
    ModelLoadError,
    OverloadedError,
    RejectedError,
    UnavailableError,
)
from scoring.signature import K_MAX, RECOMMEND_MODEL, USERS_MAX, WAIT_MS_MAX, Degraded
from tests.asking import (
    PatientRecommender,
    answered,
    ask_with,
    is_store_away,
    whole,
)
from tests.scoring.states import NOW_MS, make_event, write_clicks, write_user
from tests.scoring.tiny import ITEM_IDS
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compose.local.stack import LocalStack
    from features.redis import CatalogueStore, StateStore
    from scoring.client import Answer
    from scoring.triton import TritonServer

NOWHERE = "127.0.0.1:9"


@contextmanager
def frozen(stack: LocalStack, name: str) -> Iterator[None]:
    """One server of the stack stands still inside the block."""
    (pid,) = [process.pid for process in stack.running() if process.name == name]
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def test_recommend_is_loaded(server: TritonServer) -> None:
    assert server.is_live()
    assert server.is_ready(RECOMMEND_MODEL)
    assert (1, "READY", "") in server.versions()[RECOMMEND_MODEL]


def test_an_unknown_user_gets_trending_items(
    go_live: Callable[..., None], recommender: Recommender, served_store: StateStore
) -> None:
    go_live(None, (2**63 - 1, 8, 9))
    answer = whole(lambda: recommender.recommend("somebody new", k=2))
    assert [one.item_id for one in answer.items] == [2**63 - 1, 8]
    source = answer.provenance
    assert source.degraded is Degraded.UNKNOWN_USER
    assert (source.model_version, source.generation) == (0, served_store.generation)
    assert (source.newest_event_time_ms, source.newest_event_age_ms) == (None, None)


def test_known_tensors_arrive_as_they_are(
    go_live: Callable[..., None], recommender: Recommender, served_store: StateStore
) -> None:
    """Every tensor goes through DLPack in both directions: ids above 2**53, batches, paddings."""
    users = [2**63 - 1 - user for user in range(USERS_MAX)]
    for place, user in enumerate(users[:-1]):
        write_clicks(served_store, user, range(place % 40 + 1))
    items = tuple(2**62 + place for place in range(60))
    go_live(None, items)
    answers = whole(lambda: recommender.recommend_many(users, k=K_MAX))
    assert [one.user_id for one in answers] == users
    assert [one.provenance.ordinal for one in answers] == [
        *(place % 40 + 1 for place in range(USERS_MAX - 1)),
        0,
    ]
    for one in answers:
        assert [item.item_id for item in one.items] == list(items)
        first = one.items[0].score
        assert [item.score for item in one.items] == [first + place for place in range(60)]
    newest_ms = NOW_MS + 1_000 * 2
    assert answers[2].provenance.newest_event_time_ms == newest_ms
    age_ms = answers[2].provenance.newest_event_age_ms
    assert age_ms is not None
    assert abs(age_ms - (time.time() * 1_000 - newest_ms)) < 10_000


@pytest.mark.parametrize("k", [0, -1, K_MAX + 1])
def test_k_out_of_range_is_rejected_by_client_and_server(
    recommender: Recommender, server: TritonServer, k: int
) -> None:
    with pytest.raises(RejectedError, match=f"k={k}; ask for 1 to {K_MAX}"):
        recommender.recommend(1, k=k)
    columns = {
        "user_id": 1,
        "k": k,
        "min_partition": -1,
        "min_offset": -1,
        "wait_ms": 0,
        "exclude_seen": 0,
    }
    inputs = {name: np.array([[value]], np.int64) for name, value in columns.items()}
    with pytest.raises(RejectedError, match=f"k={k}; ask for 1 to {K_MAX}"):
        server.infer(RECOMMEND_MODEL, 1, inputs, ["item_id"])


def test_requests_out_of_range_are_rejected(recommender: Recommender) -> None:
    with pytest.raises(RejectedError, match="0 users"):
        recommender.recommend_many([])
    with pytest.raises(RejectedError, match=f"{USERS_MAX + 1} users"):
        recommender.recommend_many(range(USERS_MAX + 1))
    for user in (-1, 2**63):
        with pytest.raises(RejectedError, match="user ids"):
            recommender.recommend(user)
    with pytest.raises(RejectedError, match="deadline_s=0"):
        recommender.recommend(1, deadline_s=0)


def test_redis_away_is_a_degraded_answer_in_time(
    triton_stack: LocalStack,
    go_live: Callable[..., None],
    recommender: Recommender,
    served_store: StateStore,
) -> None:
    write_clicks(served_store, 5, [1])
    go_live(None)
    with frozen(triton_stack, "redis"):
        for min_position in (None, (0, 99)):
            answer = recommender.recommend(5, k=2, min_position=min_position, deadline_s=5.0)
            assert answer.provenance.degraded is Degraded.STORE_AWAY
            assert [one.item_id for one in answer.items] == [7, 8]
    until(answered(lambda: recommender.recommend(5).provenance.degraded is Degraded.MODEL_AWAY), 30)


def test_model_away_is_a_degraded_answer(
    go_live: Callable[..., None], recommender: Recommender, served_store: StateStore
) -> None:
    """The pointers name a version that Triton does not have."""
    write_clicks(served_store, 5, [1])
    go_live(77)
    answer = whole(lambda: recommender.recommend(5, k=2))
    assert answer.provenance.degraded is Degraded.MODEL_AWAY
    assert (answer.provenance.model_version, answer.provenance.live_version) == (0, 77)
    assert [one.item_id for one in answer.items] == [7, 8]


def test_the_model_answers_for_known_users(
    version: int, go_live: Callable[..., None], recommender: Recommender, served_store: StateStore
) -> None:
    write_clicks(served_store, 5, ITEM_IDS[:20])
    go_live(version)
    answer = whole(lambda: recommender.recommend(5, k=10))
    assert answer.provenance.degraded is Degraded.NONE
    assert (answer.provenance.model_version, answer.provenance.ordinal) == (version, 20)
    items = [one.item_id for one in answer.items]
    assert len(items) == len(set(items)) == 10
    assert set(items) <= set(ITEM_IDS)
    scores = [one.score for one in answer.items]
    assert scores == sorted(scores, reverse=True)
    assert sum(answer.provenance.contribution) == pytest.approx(1, abs=1e-4)
    again = whole(lambda: recommender.recommend(5, k=10))
    assert again.items == answer.items
    unseen = whole(lambda: recommender.recommend(5, k=10, exclude_seen=True))
    assert {one.item_id for one in unseen.items[:10]} <= set(ITEM_IDS[20:]) | {7, 8, 9}
    both = whole(lambda: recommender.recommend_many([2**62, 5], k=10))
    assert [one.provenance.degraded for one in both] == [Degraded.UNKNOWN_USER, Degraded.NONE]
    assert [one.item_id for one in both[1].items] == items


def test_a_withdrawn_item_disappears(
    version: int,
    go_live: Callable[..., None],
    recommender: Recommender,
    served_store: StateStore,
    served_catalogue: CatalogueStore,
) -> None:
    write_clicks(served_store, 5, ITEM_IDS[:20])
    go_live(version, (7, 8, 9))
    first = whole(lambda: recommender.recommend(5, k=5)).items[0].item_id
    for item in (first, 7):
        served_catalogue.put_items([Item(item_id=item, name="gone", available=False)])

    def ids(user: int) -> set[int]:
        return {one.item_id for one in whole(lambda: recommender.recommend(user, k=30)).items}

    until(lambda: first not in ids(5) and 7 not in ids(6), 30)
    until(lambda: all(first not in ids(5) and 7 not in ids(6) for _ in range(15)), 30)
    served_catalogue.put_items([Item(item_id=first, name="back")])
    until(lambda: first in ids(5), 30)


def test_an_answer_waits_for_its_position(
    go_live: Callable[..., None], recommender: Recommender, served_store: StateStore
) -> None:
    write_user(served_store, 5, [make_event(0, item_id=1, partition=2)])
    go_live(None)
    answers: list[Answer] = []

    def ask() -> None:
        answers.append(whole(lambda: recommender.recommend(5, min_position=(2, 4))))

    asking = threading.Thread(target=ask)
    asking.start()
    assert whole(lambda: recommender.recommend(5)).provenance.ordinal == 1
    assert not answers
    write_user(served_store, 5, [make_event(4, item_id=2, partition=2)])
    asking.join(30)
    (answer,) = answers
    assert answer.provenance.ordinal == 2
    assert Degraded.POSITION_NOT_REACHED not in answer.provenance.degraded


def test_a_position_that_never_comes_is_said_before_the_deadline(
    go_live: Callable[..., None], server: TritonServer, served_store: StateStore
) -> None:
    """It might wait for far longer than its deadline."""
    write_clicks(served_store, 5, [1])
    go_live(None)

    def is_said() -> bool:
        started = time.monotonic()
        flags, _ = ask_with(
            server, 5, min_partition=0, min_offset=10**9, wait_ms=WAIT_MS_MAX, deadline_ms=600
        )
        if Degraded.STORE_AWAY in flags:
            return False
        assert 0.5 <= time.monotonic() - started < WAIT_MS_MAX / 1000
        assert Degraded.POSITION_NOT_REACHED in flags
        return True

    until(is_said, 30, what="an answer for which Redis was in time")


def test_answers_that_wait_do_not_hold_up_the_others(
    go_live: Callable[..., None], recommender: Recommender, served_store: StateStore
) -> None:
    """More of them than instances of the model."""
    write_clicks(served_store, 5, [1])
    go_live(None)
    waiting: list[Answer] = []

    def wait() -> None:
        waiting.append(whole(lambda: recommender.recommend(5, min_position=(0, 10**9))))

    threads = [threading.Thread(target=wait) for _ in range(4)]
    for thread in threads:
        thread.start()
    num_beside = 0
    while not waiting and num_beside < 50:
        recommender.recommend(5)
        num_beside += not waiting
    for thread in threads:
        thread.join()
    assert len(waiting) == 4
    # A few may have been asked for before those that wait had come to Triton.
    assert num_beside >= 10, "the others had to wait too"
    assert WAIT_MS_MAX > 3_000


def test_deadlines_hold_while_triton_stands_still(
    triton_stack: LocalStack, recommender: Recommender
) -> None:
    recommender.recommend(1)
    with frozen(triton_stack, "triton"):
        started = time.monotonic()
        with pytest.raises(DeadlineExceededError):
            recommender.recommend(1, deadline_s=0.3)
        assert time.monotonic() - started < 5
    until(answered(lambda: recommender.recommend(1).user_id == 1), 30)


def test_too_many_in_flight(
    triton_stack: LocalStack, go_live: Callable[..., None], served_store: StateStore
) -> None:
    write_clicks(served_store, 5, [1])
    go_live(None)
    with PatientRecommender(triton_stack.addresses.triton_grpc, in_flight_max=1) as one:
        waiting = threading.Thread(
            target=lambda: whole(lambda: one.recommend(5, min_position=(0, 10**9)))
        )
        waiting.start()
        until(lambda: one._slots._value == 0, 5)
        with pytest.raises(OverloadedError, match="1 requests in flight"):
            one.recommend(5, deadline_s=0.2)
        waiting.join()
        assert one.recommend(5).user_id == 5


def test_triton_away() -> None:
    with Recommender(NOWHERE) as nobody, pytest.raises(UnavailableError, match="moveline status"):
        nobody.recommend(1, deadline_s=5)


async def test_the_async_client(
    triton_stack: LocalStack, go_live: Callable[..., None], served_store: StateStore
) -> None:

    write_clicks(served_store, 5, [1, 2])
    await asyncio.to_thread(go_live, None)
    async with AsyncRecommender(triton_stack.addresses.triton_grpc, in_flight_max=2) as client:

        async def ask(**options: Any) -> Answer:  # noqa: ANN401 - passed on
            while is_store_away(one := await client.recommend(5, deadline_s=20, **options)):
                pass
            return one

        answers = await asyncio.gather(*(ask(k=2) for _ in range(20)))
        assert {one.provenance.ordinal for one in answers} == {2}
        assert answers[0].items == answers[-1].items
        with pytest.raises(RejectedError):
            await client.recommend(5, k=0)
        waiting = [asyncio.create_task(ask(min_position=(0, 10**9))) for _ in range(2)]
        await asyncio.to_thread(until, client._slots.locked, 5)
        with pytest.raises(OverloadedError, match="2 requests in flight"):
            await client.recommend(5, deadline_s=0.2)
        for one in await asyncio.gather(*waiting):
            assert Degraded.POSITION_NOT_REACHED in one.provenance.degraded
        with frozen(triton_stack, "triton"), pytest.raises(DeadlineExceededError):
            await client.recommend(5, deadline_s=0.3)
    async with AsyncRecommender(NOWHERE) as nobody:
        with pytest.raises(UnavailableError):
            await nobody.recommend(1, deadline_s=5)


def test_loading_what_is_not_there_is_refused(server: TritonServer) -> None:
    with pytest.raises(ModelLoadError, match="loading absent"):
        server.load("absent")
    assert not server.is_ready("absent")
