"""Which items an answer may hold, when a position is reached, and each step of the ladder.

A real Redis and a function in the model's place, as in test_recommend.py; the same over gRPC, with
real parts missing, is in test_ladder.py.
"""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from features.events import domain_hash
from features.keys import bucket_of, checkpoints_key, memories_key
from features.nearline import TileStore
from features.redis import Canary, Pointers, Trending, execute
from scoring.arms import CANARY, CONTROL, LIVE, SHADOW, arm_of
from scoring.ladder import LADDER, MODEL_MS_MIN, steps_of
from scoring.live import DOMAINS_MAX, Live, read_snapshot
from scoring.recommend import Ask, answer, answer_shadow
from scoring.signature import NO_ITEM, Degraded
from tests.scoring.states import NOW_MS, make_event, write_clicks, write_user
from tests.scoring.test_recommend import (
    MODEL_ITEMS,
    TRENDING,
    FakeModel,
    away,
    never,
    provenance,
)
from tests.small import SMALL

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from features.redis import CatalogueStore, StateStore
    from scoring.asks import Answered
    from scoring.recommend import Retrieved

pytestmark = pytest.mark.servers
HOME = domain_hash("home")
MEMORY = "0" * 16


@pytest.fixture
def live(redis_client: redis.Redis, catalogue: CatalogueStore, store: StateStore) -> Iterator[Live]:
    """What is live: version 3 over the test's generation, trending items, one domain's too."""
    store.claim_generation()
    catalogue.put_pointers(Pointers(3, store.generation))
    catalogue.put_trending(TRENDING)
    TileStore(redis_client, store.generation).put_domain_trending(
        {HOME: Trending((101, 70, 103), (0.9, 0.8, 0.7))}
    )
    one = Live(redis_client)
    one.snapshot = read_snapshot(catalogue, one.snapshot)
    yield one
    one.reads.close()
    one.models.close()


def flags(one: Answered) -> Degraded:
    return Degraded(provenance(one)["degraded"])


def test_candidates_are_ranked_and_nothing_else_is_returned(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1])
    model = FakeModel()
    ask = Ask(5, 10, candidates=(104, 900, 100, 8))
    (one,) = answer([ask], live, model, NOW_MS)
    # The model's first, then what trends, then as they were given.
    assert one.item_ids == [100, 104, 8, 900]
    assert one.scores == [0.0, -4.0, 0.3, 0.0]
    assert flags(one) is Degraded.FEW_CANDIDATES
    assert model.candidates == [(104, 900, 100, 8)]
    (few,) = answer([ask._replace(k=2)], live, model, NOW_MS)
    assert few.item_ids == [100, 104]
    assert flags(few) is Degraded.NONE
    (all_ranked,) = answer([Ask(5, 10, candidates=(101, 100))], live, model, NOW_MS)
    assert (all_ranked.item_ids, flags(all_ranked)) == ([100, 101], Degraded.NONE)


def test_candidates_of_an_unknown_user_are_ranked_by_what_trends(live: Live) -> None:
    live.snapshot = replace(live.snapshot, withdrawn=frozenset({901}))
    (one,) = answer([Ask(6, 10, candidates=(900, 901, 9, 7, 900))], live, never, NOW_MS)
    assert one.item_ids == [7, 9, 900]
    assert flags(one) is Degraded.UNKNOWN_USER


def test_a_domain_has_its_own_items(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1])
    model = FakeModel(item_ids=[101, 103])  # the model keeps to the domain
    known, unknown = answer(
        [Ask(5, 10, in_domain=HOME), Ask(6, 2, in_domain=HOME)], live, model, NOW_MS
    )
    assert known.item_ids == [101, 103, 70]
    assert flags(known) is Degraded.FEW_CANDIDATES
    assert (unknown.item_ids, unknown.scores) == ([101, 70], [0.9, 0.8])
    assert flags(unknown) is Degraded.UNKNOWN_USER
    assert [domain % 2**64 for domain in model.in_domain] == [HOME]
    for domain, bits in ((0, 0), (2**63 - 1, 2**63 - 1), (2**63, -(2**63)), (2**64 - 1, -1)):
        assert Ask(5, 1, in_domain=domain).signed_domain == bits
    both = Ask(5, 10, in_domain=HOME, candidates=(103, 70, 100))
    (narrowed,) = answer([both], live, model, NOW_MS)
    assert narrowed.item_ids == [103, 70]


def test_a_domain_nothing_is_known_of_is_an_empty_answer(live: Live) -> None:
    (one,) = answer([Ask(6, 2, in_domain=domain_hash("nowhere"))], live, never, NOW_MS)
    assert one.item_ids == []
    assert flags(one) == Degraded.UNKNOWN_USER | Degraded.NO_TRENDING


def test_a_domain_is_kept_fresh_once_it_was_asked_for(
    live: Live, store: StateStore, redis_client: redis.Redis
) -> None:
    answer([Ask(6, 2, in_domain=HOME)], live, never, NOW_MS)
    TileStore(redis_client, store.generation).put_domain_trending({HOME: Trending((55,), (1.0,))})
    (before,) = answer([Ask(6, 2, in_domain=HOME)], live, never, NOW_MS)
    assert before.item_ids == [101, 70]
    live._refresh()
    (after,) = answer([Ask(6, 2, in_domain=HOME)], live, never, NOW_MS)
    assert after.item_ids == [55]


def test_only_so_many_domains_are_kept(live: Live) -> None:
    live.learn_domains(range(1, DOMAINS_MAX + 11))
    assert len(live.snapshot.trending_by_domain) == DOMAINS_MAX
    assert min(live.snapshot.trending_by_domain) == 11


def test_a_domains_list_that_is_none_is_no_error_of_the_request(
    live: Live, redis_client: redis.Redis
) -> None:
    redis_client.set(f"moveline:trending:{HOME}", b"{")
    (one,) = answer([Ask(6, 2, in_domain=HOME)], live, never, NOW_MS)
    assert Degraded.STORE_AWAY in flags(one)


def test_exclude_seen_covers_chunks_that_wait(
    live: Live, store: StateStore, catalogue: CatalogueStore
) -> None:
    """With a model that reads memories, what waits beside the tail is in its mid-term stream."""
    catalogue.put_pointers(Pointers(3, store.generation, MEMORY))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    count = SMALL.tail_max + 3 * SMALL.chunk
    write_clicks(store, 5, range(1_000, 1_000 + count))
    model = FakeModel([1_000, 1_000 + count - 1, 100])
    (one,) = answer([Ask(5, 1, exclude_seen=True)], live, model, NOW_MS)
    assert one.item_ids == [100]
    assert sorted(model.asked[0][2][0]) == list(range(1_000, 1_000 + count))


def test_a_repeats_position_is_reached(live: Live, store: StateStore) -> None:
    """A repeat changes no row, but its bucket's checkpoint has passed it."""
    write_user(store, 5, [make_event(0, item_id=1, partition=2)])
    key = checkpoints_key(store.generation, bucket_of(5))
    execute(store.client, "HSET", key, "0:2", 8)
    started = time.monotonic()
    for offset, wait_ms, is_reached in ((7, 5_000, True), (8, 100, False)):
        ask = Ask(5, 1, 2, offset, wait_ms)
        (one,) = answer([ask], live, FakeModel(), NOW_MS)
        assert (Degraded.POSITION_NOT_REACHED not in flags(one)) is is_reached
    (unknown,) = answer([Ask(bucket_mate(5), 1, 2, 7, 5_000)], live, never, NOW_MS)
    assert flags(unknown) is Degraded.UNKNOWN_USER
    assert time.monotonic() - started < 5


def bucket_mate(user: int) -> int:
    """Return another user of the same bucket."""
    mates = (one for one in range(10**6) if one != user and bucket_of(one) == bucket_of(user))
    return next(mates)


def test_waiting_leaves_the_time_an_answer_needs(
    live: Live, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More time than is left by default, for a busy machine."""
    monkeypatch.setattr("scoring.reading.FULL_MS_MIN", 300)
    monkeypatch.setattr("scoring.recommend.MODEL_MS_MIN", 0)
    write_clicks(store, 5, [1])
    started = time.monotonic()
    ask = Ask(5, 1, 0, 10**9, 5_000, deadline_ms=2_000)
    (one,) = answer([ask], live, FakeModel(), NOW_MS)
    assert time.monotonic() - started < 2
    assert one.item_ids == [100]
    assert Degraded.POSITION_NOT_REACHED in flags(one)
    assert Degraded.DEADLINE not in flags(one)


def test_little_time_is_enough_for_the_recent_stream(
    live: Live, store: StateStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Little is two seconds here: a busy machine is slower than the 50 ms of the default."""
    monkeypatch.setattr("scoring.reading.FULL_MS_MIN", 2_000)
    write_clicks(store, 5, range(20))
    model = FakeModel()
    (one,) = answer([Ask(5, 1, deadline_ms=1_999)], live, model, NOW_MS)
    assert flags(one) is Degraded.MID_TERM
    (_, streams, _, _) = model.asked[0]
    assert streams.mid_BM.shape == (1, SMALL.mid)
    assert set(streams.mid_BM["item_id"][0].tolist()) == {NO_ITEM}
    assert streams.recent_BR["item_id"][0].tolist() == list(range(12, 20))
    assert one.seen is not None
    assert not one.seen.has_mid
    (whole,) = answer([Ask(5, 1, deadline_ms=8_000)], live, model, NOW_MS)
    assert flags(whole) is Degraded.NONE


def test_no_time_is_trending_items_at_once(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1])
    (one,) = answer([Ask(5, 2, deadline_ms=MODEL_MS_MIN - 1)], live, never, NOW_MS)
    assert (one.item_ids, flags(one)) == ([7, 8], Degraded.DEADLINE)


def test_a_model_that_is_late_is_not_waited_for(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1])
    release = threading.Event()

    def slow(*_: object, **__: object) -> Retrieved:
        release.wait(60)
        raise AssertionError("nobody waits for it")

    started = time.monotonic()
    (one,) = answer([Ask(5, 2, deadline_ms=2_000)], live, slow, NOW_MS)
    assert time.monotonic() - started < 30
    release.set()
    assert (one.item_ids, flags(one)) == ([7, 8], Degraded.DEADLINE)


def test_a_memory_that_cannot_be_read_costs_the_lifelong_stream_alone(
    live: Live, store: StateStore, catalogue: CatalogueStore
) -> None:
    catalogue.put_pointers(Pointers(3, store.generation, MEMORY))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    write_clicks(store, 5, range(SMALL.tail_max + 20))
    execute(store.client, "SET", memories_key(store.generation, 5), "a string where a hash belongs")
    (one,) = answer([Ask(5, 1)], live, FakeModel(), NOW_MS)
    assert (one.item_ids, flags(one)) == ([100], Degraded.LIFELONG)
    assert provenance(one)["ordinal"] == SMALL.tail_max + 20


def test_without_any_trending_items_the_answer_is_empty_and_says_so(live: Live) -> None:
    live.snapshot = replace(live.snapshot, trending=Trending((), ()))
    (one,) = answer([Ask(6, 2)], live, never, NOW_MS)
    assert (one.item_ids, flags(one)) == ([], Degraded.UNKNOWN_USER | Degraded.NO_TRENDING)


def test_the_ladder_has_every_flag_once() -> None:
    assert sorted(step.flag for step in LADDER) == sorted([Degraded.NONE, *Degraded])
    assert len({step.name for step in LADDER}) == len(LADDER)
    for step in LADDER:
        assert list(steps_of(step.flag)) == [step.name]


# --- a canary


def test_shares_are_stable_and_near_what_was_asked() -> None:
    users = range(20_000)
    canary = Canary(7, None, "canary", 0.1, 0)
    arms = [arm_of(user, canary) for user in users]
    assert arms == [arm_of(user, canary) for user in users]
    for arm, share in ((CANARY, 0.1), (CONTROL, 0.1), (LIVE, 0.8)):
        assert abs(arms.count(arm) / 20_000 - share) < 0.01, arm
    wider = [arm_of(user, Canary(7, None, "canary", 0.2, 0)) for user in users]
    assert all(
        after == CANARY for before, after in zip(arms, wider, strict=True) if before == CANARY
    )
    # Those of the next canary are others.
    following = [arm_of(user, Canary(8, None, "canary", 0.1, 0)) for user in users]
    both = sum(a == b == CANARY for a, b in zip(arms, following, strict=True))
    assert 130 < both < 270
    assert {arm_of(user, None) for user in users} == {LIVE}
    shadow = [arm_of(user, Canary(7, None, "shadow", 0.1, 0)) for user in users]
    assert [arm == CONTROL for arm in shadow] == [arm == CANARY for arm in arms]
    # For ever: an arm that changed with a build would mix the two groups.
    assert [user for user in users if arms[user] == CANARY][:4] == FIRST_OF_CANARY_7


FIRST_OF_CANARY_7 = [11, 32, 61, 64]


def test_each_arm_is_asked_with_its_own_memories(
    live: Live, store: StateStore, catalogue: CatalogueStore
) -> None:
    canary = Canary(9, "1" * 16, "canary", 0.5, 0)
    catalogue.put_pointers(Pointers(3, store.generation, MEMORY, canary=canary))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    assert live.snapshot.canary == canary
    users = list(range(12))
    for user in users:
        write_clicks(store, user, [1, 2])
    model = FakeModel()
    answers = answer([Ask(user, 1) for user in users], live, model, NOW_MS)
    assert {one.arm for one in answers} == {CANARY, CONTROL}
    for user, one in zip(users, answers, strict=True):
        assert one.arm == arm_of(user, canary)
        said = provenance(one)
        assert one.seen is not None
        expected = (9, "1" * 16) if one.arm == CANARY else (3, MEMORY)
        assert (said["model_version"], one.seen.memory_version) == expected
        assert said["live_version"] == 3
    assert sorted(version for version, *_ in model.asked) == [3, 9]


def test_a_canary_that_fails_costs_nobody_an_answer(
    live: Live, store: StateStore, catalogue: CatalogueStore
) -> None:
    canary = Canary(9, None, "canary", 0.5, 0)
    catalogue.put_pointers(Pointers(3, store.generation, canary=canary))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    user = next(user for user in range(100) if arm_of(user, canary) == CANARY)
    write_clicks(store, user, [1, 2])
    works = FakeModel()

    def fails(version: int, *asked: object, **also: object) -> Retrieved:
        if version == 9:
            return away()
        return works(version, *asked, **also)  # type: ignore[arg-type]

    (one,) = answer([Ask(user, 2)], live, fails, NOW_MS)
    assert (one.item_ids, one.arm) == (MODEL_ITEMS[:2], CANARY)
    assert provenance(one)["model_version"] == 3
    assert flags(one) is Degraded.NONE


def test_a_shadow_answers_beside(live: Live, store: StateStore, catalogue: CatalogueStore) -> None:
    canary = Canary(9, None, "shadow", 0.5, 0)
    catalogue.put_pointers(Pointers(3, store.generation, canary=canary))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    asks = [Ask(user, 1) for user in range(12)]
    for ask in asks:
        write_clicks(store, ask.user_id, [1, 2])
    model = FakeModel()
    answers = answer(asks, live, model, NOW_MS)
    assert {provenance(one)["model_version"] for one in answers} == {3}
    asked, shadowed = answer_shadow(asks, live, model, NOW_MS)
    assert [ask.user_id for ask in asked] == [
        ask.user_id for ask, one in zip(asks, answers, strict=True) if one.arm == CONTROL
    ]
    assert {one.arm for one in shadowed} == {SHADOW}
    assert {provenance(one)["model_version"] for one in shadowed} == {9}
    live.snapshot = replace(live.snapshot, canary=None)
    assert answer_shadow(asks, live, never, NOW_MS) == ([], [])
