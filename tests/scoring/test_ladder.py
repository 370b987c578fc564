"""Each step of the ladder with real servers: what is missing is taken away, and the answer says so.

And what must hold on every step: in time, counted on Triton's page, of one version only.
"""

from __future__ import annotations

import random
import re
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from features.redis import Pointers, Trending, execute
from features.store import read_users
from scoring.ladder import FULL_MS_MIN, LADDER
from scoring.signature import RETRIEVAL_MODEL, USERS_MAX, Degraded
from scoring.tensors import retrieval_inputs
from tests.asking import answered, ask_with, is_store_away, whole
from tests.scoring.states import NOW_MS, write_clicks
from tests.scoring.test_served import frozen
from tests.scoring.tiny import ITEM_IDS
from tests.small import SMALL
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from compose.local.stack import LocalStack
    from features.redis import CatalogueStore, StateStore
    from scoring.client import Answer, Recommender
    from scoring.triton import TritonServer

pytestmark = pytest.mark.servers


def page(stack: LocalStack) -> str:
    with urllib.request.urlopen(f"http://{stack.addresses.triton_metrics}/metrics") as found:
        text: str = found.read().decode()
    return text


def counted(stack: LocalStack, name: str, **labels: str) -> float:
    """Return a counter of Triton's page, all instances together."""
    total = 0.0
    for series, value in re.findall(rf"^{name}{{(.*)}} (\S+)$", page(stack), re.MULTILINE):
        if all(f'{label}="{wanted}"' in series for label, wanted in labels.items()):
            total += float(value)
    return total


def is_counted_after(stack: LocalStack, step: str, ask: Callable[[], object]) -> None:
    """Ask, and return once Triton's page has one more answer on that step."""
    before = counted(stack, "moveline_recommend_steps_total", step=step)
    ask()
    until(
        lambda: counted(stack, "moveline_recommend_steps_total", step=step) > before,
        30,
        what=f"{step} is counted",
    )


@pytest.fixture
def known(served_store: StateStore, go_live: Callable[..., None], version: int) -> int:
    """A user of whom the published model answers."""
    write_clicks(served_store, 5, [ITEM_IDS[n % 9] for n in range(SMALL.recent + 10)])
    go_live(version)
    return 5


def test_a_full_answer(
    known: int, recommender: Recommender, triton_stack: LocalStack, version: int
) -> None:
    def ask() -> None:
        answer = whole(lambda: recommender.recommend(known))
        assert answer.provenance.degraded is Degraded.NONE
        said = str(answer.provenance.model_version)
        assert said == str(version)

    is_counted_after(triton_stack, "full", ask)
    assert counted(triton_stack, "moveline_recommend_answers_total", version=str(version)) > 0
    assert counted(triton_stack, "moveline_recommend_seconds_total", stage="model") > 0


def test_redis_away_then_back(
    known: int, recommender: Recommender, triton_stack: LocalStack
) -> None:
    with frozen(triton_stack, "redis"):

        def ask() -> None:
            started = time.monotonic()
            answer = recommender.recommend(known, k=2, deadline_s=5.0)
            assert time.monotonic() - started < 5.0
            assert answer.provenance.degraded is Degraded.STORE_AWAY
            assert [one.item_id for one in answer.items] == [7, 8]

        is_counted_after(triton_stack, "store_away", ask)
    until(is_full(recommender, known), 30)


def is_full(recommender: Recommender, user: int) -> Callable[[], object]:
    return answered(lambda: recommender.recommend(user).provenance.degraded is Degraded.NONE)


@pytest.mark.parametrize(("deadline_ms", "within_s"), [(150, 0.25), (1_000, 1.0)])
def test_redis_slow_is_an_answer_in_time(
    known: int,
    recommender: Recommender,
    served_store: StateStore,
    server: TritonServer,
    deadline_ms: int,
    within_s: float,
) -> None:
    """A pause longer than both deadlines; the shorter one is below Redis' own time-out.

    The caller waits longer: on a busy machine the way back takes what it takes, so that the first
    of several answers that is in time counts.
    """
    recommender.recommend(known)
    execute(served_store.client, "CLIENT PAUSE", 5_000, "ALL")

    def is_in_time() -> bool:
        started = time.monotonic()
        said = ask_with(server, known, deadline_ms=deadline_ms)
        assert said == (Degraded.STORE_AWAY, [7, 8])
        return time.monotonic() - started < within_s

    until(is_in_time, 3, what="an answer without Redis, in time")
    until(is_full(recommender, known), 30)


def test_the_model_missing(
    known: int,
    recommender: Recommender,
    triton_stack: LocalStack,
    go_live: Callable[..., None],
) -> None:
    go_live(77)
    is_counted_after(
        triton_stack, "model_away", lambda: whole(lambda: recommender.recommend(known))
    )
    answer = whole(lambda: recommender.recommend(known, k=2))
    assert answer.provenance.degraded is Degraded.MODEL_AWAY
    assert [one.item_id for one in answer.items] == [7, 8]


def test_the_memory_not_ready(
    known: int,
    recommender: Recommender,
    served_catalogue: CatalogueStore,
    served_store: StateStore,
    triton_stack: LocalStack,
    version: int,
) -> None:
    """Chunks have left Redis, and no memory of the version named has them."""
    served_catalogue.put_pointers(Pointers(version, served_store.generation, "0" * 16))
    write_clicks(served_store, 6, [ITEM_IDS[n % 9] for n in range(SMALL.tail_max + 30)])
    for key in served_store.client.keys("*:chunks:6"):
        execute(served_store.client, "HDEL", key, 0)
        execute(served_store.client, "HSET", key, "first", 1)

    def lacks() -> bool:
        answer = recommender.recommend(6)
        return (
            answer.provenance.degraded is Degraded.LIFELONG
            and answer.provenance.model_version == version
        )

    is_counted_after(
        triton_stack,
        "no_lifelong",
        lambda: until(lacks, 30, what="the answer lacks the memory"),
    )
    del known


def test_a_short_deadline_leaves_the_mid_term_stream_out(
    known: int, server: TritonServer, triton_stack: LocalStack
) -> None:
    def ask() -> None:
        until(
            lambda: ask_with(server, known, deadline_ms=FULL_MS_MIN - 1)[0] == Degraded.MID_TERM,
            20,
            what="a recent stream's answer in time",
        )

    is_counted_after(triton_stack, "no_mid_term", ask)


def test_no_time_is_trending_items(
    known: int, server: TritonServer, triton_stack: LocalStack
) -> None:
    def ask() -> None:
        assert ask_with(server, known, deadline_ms=5) == (Degraded.DEADLINE, [7, 8])

    is_counted_after(triton_stack, "deadline", ask)


def test_a_model_with_too_much_to_do_is_not_waited_for(
    known: int,
    recommender: Recommender,
    served_store: StateStore,
    server: TritonServer,
    triton_stack: LocalStack,
    version: int,
) -> None:
    """Others keep it busy for longer than the deadline, one full batch after another."""
    users = read_users(served_store, [known] * USERS_MAX, now_ms=NOW_MS)
    tensors = retrieval_inputs(users.streams(), [[]] * USERS_MAX, frozenset())
    batch = {name: tensor.numpy() for name, tensor in tensors.items()}
    done = threading.Event()

    def crowd() -> None:
        while not done.is_set():
            server.infer(RETRIEVAL_MODEL, version, batch, ["item_id"], timeout_s=60)

    def is_late() -> bool:
        flags, items = ask_with(server, known, deadline_ms=450)
        if flags is Degraded.DEADLINE:
            assert items == [7, 8]
        return flags is Degraded.DEADLINE

    with ThreadPoolExecutor(64) as busy:
        try:
            for _ in range(64):
                busy.submit(crowd)
            is_counted_after(
                triton_stack, "deadline", lambda: until(is_late, what="no answer of the model")
            )
        finally:
            done.set()
    until(is_full(recommender, known), 30)


def test_trending_items_absent_is_an_empty_answer(
    served_catalogue: CatalogueStore,
    recommender: Recommender,
    triton_stack: LocalStack,
    go_live: Callable[..., None],
) -> None:
    go_live(None)
    served_catalogue.put_trending(Trending((), ()))

    def is_empty() -> bool:
        answer = recommender.recommend(4, k=2)
        expected = Degraded.UNKNOWN_USER | Degraded.NO_TRENDING
        return not answer.items and answer.provenance.degraded == expected

    for step in ("unknown_user", "no_trending"):
        is_counted_after(
            triton_stack,
            step,
            lambda: until(is_empty, 30, what="an empty answer that says so"),
        )


def test_every_step_is_one_that_is_described(triton_stack: LocalStack) -> None:
    found = set(re.findall(r'moveline_recommend_steps_total{.*step="(\w+)"', page(triton_stack)))
    assert found
    assert found <= {step.name for step in LADDER}


def test_candidates_and_domain_over_grpc(known: int, recommender: Recommender) -> None:
    few = [ITEM_IDS[3], ITEM_IDS[1], 7]
    answer = whole(lambda: recommender.recommend(known, k=10, candidates=few))
    assert {one.item_id for one in answer.items} == set(few)
    many = whole(lambda: recommender.recommend_many([known, 4], k=2, candidates=few))
    assert all({one.item_id for one in one_answer.items} <= set(few) for one_answer in many)
    assert [one.item_id for one in many[1].items] == [7, ITEM_IDS[3]]
    nowhere = whole(lambda: recommender.recommend(known, k=2, domain="nowhere"))
    assert nowhere.items == ()
    assert Degraded.NO_TRENDING in nowhere.provenance.degraded


def test_identical_answers_whoever_is_asked_with_them(
    served_store: StateStore,
    recommender: Recommender,
    go_live: Callable[..., None],
    version: int,
) -> None:
    """No event, no new version: batches of any composition, in any order, at any time."""
    rng = random.Random(7)
    users = list(range(100, 124))
    for user in users:
        own = rng.sample(ITEM_IDS, 6)
        write_clicks(served_store, user, [rng.choice(own) for _ in range(rng.randint(1, 40))])
    go_live(version)

    def ask(batch: list[int]) -> list[Answer]:
        return whole(lambda: recommender.recommend_many(batch, k=20))

    first = {user: ask([user])[0] for user in users}
    for user in users:
        (again,) = ask([user])
        assert again.items == first[user].items
    for _ in range(25):
        batch = [*rng.sample(users, rng.randint(1, 20)), *rng.sample(range(900, 999), 2)]
        rng.shuffle(batch)
        for answer in ask(batch):
            if answer.user_id in first:
                assert_alike(answer, first[answer.user_id])


# A matrix product's last bits depend on how many rows it has.
ALIKE = 1e-4


def assert_alike(one: Answer, other: Answer) -> None:
    """Items and scores are the same; only items whose scores are as good as equal may swap."""
    assert one.provenance.ordinal == other.provenance.ordinal
    assert one.provenance.contribution == pytest.approx(other.provenance.contribution, abs=ALIKE)
    for mine, yours in zip(one.items, other.items, strict=True):
        assert mine.score == pytest.approx(yours.score, abs=ALIKE)
    theirs = {item.item_id: item.score for item in other.items}
    last = other.items[-1].score
    for item in one.items:
        assert item.score == pytest.approx(theirs.get(item.item_id, last), abs=ALIKE)


def test_a_flip_under_load_mixes_nothing(
    known: int,
    recommender: Recommender,
    served_catalogue: CatalogueStore,
    served_store: StateStore,
    version: int,
) -> None:
    """Pointers flip as fast as they are followed: every answer is of the version it names."""
    stop, answers = threading.Event(), []

    def load() -> None:
        while not stop.is_set():
            answers.append(recommender.recommend(known, k=2))

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    generation = served_store.generation
    for number in (77, version, 77, version):
        served_catalogue.put_pointers(Pointers(number, generation))
        seen = len(answers)
        until(
            lambda wanted=number, since=seen: any(  # type: ignore[misc]
                one.provenance.live_version == wanted and not is_store_away(one)
                for one in answers[since:]
            ),
            30,
        )
    stop.set()
    for thread in threads:
        thread.join()
    for answer in answers:
        source = answer.provenance
        expected = (
            (version, Degraded.NONE) if source.live_version == version else (0, Degraded.MODEL_AWAY)
        )
        if is_store_away(answer):  # Redis was late for it: no version may have spoken
            expected = (0, Degraded.STORE_AWAY)
        assert (source.model_version, source.degraded) == expected
