"""What an answer is made of, with a real Redis and a function in the model's place.

`retrieve` is the seam between `scoring.recommend` and Triton: what runs behind it is tested in
test_served.py.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from features.followers import Followers, put_lists
from features.redis import Pointers, StateStore, Trending, connect
from scoring.live import Live, Snapshot, read_snapshot
from scoring.recommend import Ask, RetrievalError, Retrieved, answer
from scoring.signature import NO_CONTRIBUTION, NO_ITEM, PROVENANCE, WAIT_MS_MAX, Degraded
from scoring.sources import FollowerCache
from tests.scoring.states import NOW_MS, make_event, write_clicks, write_user
from tests.small import SMALL
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Sequence

    import redis

    from features.redis import CatalogueStore
    from features.sources import Counted
    from features.view import StreamBatch
    from scoring.recommend import Answered

MODEL_ITEMS = [100, 101, 102, 103, 104, 105]
SHARES = (0.4, 0.2, 0.1, 0.2, 0.1)
TRENDING = Trending((7, 8, 9, 100), (0.4, 0.3, 0.2, 0.1))


@dataclass
class FakeModel:
    """Returns the same items to everybody and remembers what it was asked."""

    item_ids: list[int] = field(default_factory=lambda: list(MODEL_ITEMS))
    asked: list[tuple[int, StreamBatch, Sequence[Sequence[int]], frozenset[int]]] = field(
        default_factory=list
    )
    candidates: list[Sequence[int]] = field(default_factory=list)
    in_domain: list[int] = field(default_factory=list)

    counted: list[Counted] = field(default_factory=list)

    def __call__(
        self,
        version: int,
        streams: StreamBatch,
        excluded: Sequence[Sequence[int]],
        withdrawn: frozenset[int],
        *,
        counted: Counted,
        candidates: Sequence[Sequence[int]],
        in_domain: Sequence[int],
    ) -> Retrieved:
        """Answer as a model would that ignores what it must not return."""
        self.counted.append(counted)
        self.candidates, self.in_domain = list(candidates), list(in_domain)
        self.asked.append((version, streams, excluded, withdrawn))
        size = len(streams.ordinal_B)
        scores = [-float(place) for place in range(len(self.item_ids))]
        return Retrieved([self.item_ids] * size, [scores] * size, [list(SHARES)] * size)


def away(*_: object, **__: object) -> Retrieved:
    raise RetrievalError("gone")


def never(*_: object, **__: object) -> Retrieved:
    raise AssertionError("the model must not be asked")


def provenance(one: Answered) -> dict[str, int]:
    return dict(zip(PROVENANCE, one.provenance, strict=True))


@pytest.fixture
def live(redis_client: redis.Redis, catalogue: CatalogueStore, store: StateStore) -> Live:
    """What is live: version 3 over the test's generation, four trending items."""
    store.claim_generation()
    catalogue.put_pointers(Pointers(3, store.generation))
    catalogue.put_trending(TRENDING)
    one = Live(redis_client)
    one.snapshot = read_snapshot(catalogue, one.snapshot)
    return one


def test_a_known_user_gets_the_model(live: Live, store: StateStore) -> None:
    state = write_clicks(store, 5, [1, 2, 3])
    newest_ms = int(state.records["event_time_ms"][-1])
    model = FakeModel()
    (one,) = answer([Ask(5, 4)], live, model, newest_ms + 500)
    assert one.item_ids == MODEL_ITEMS[:4]
    assert one.scores == [0.0, -1.0, -2.0, -3.0]
    assert one.contribution == SHARES
    assert provenance(one) == {
        "model_version": 3,
        "live_version": 3,
        "generation": store.generation,
        "ordinal": 3,
        "newest_event_time_ms": newest_ms,
        "newest_event_age_ms": 500,
        "degraded": 0,
    }
    ((version, streams, excluded, withdrawn),) = model.asked
    assert (version, list(excluded), withdrawn) == (3, [[]], frozenset())
    assert streams.recent_BR.shape == (1, SMALL.recent)
    assert streams.recent_BR["item_id"][0].tolist() == [NO_ITEM] * 5 + [1, 2, 3]


def test_an_unknown_user_gets_trending_items(live: Live) -> None:
    (one,) = answer([Ask(5, 3)], live, never, NOW_MS)
    assert one.item_ids == [7, 8, 9]
    assert one.scores == [0.4, 0.3, 0.2]
    assert one.contribution == NO_CONTRIBUTION
    said = provenance(one)
    assert Degraded(said["degraded"]) is Degraded.UNKNOWN_USER
    assert (said["model_version"], said["live_version"], said["ordinal"]) == (0, 3, 0)
    assert (said["newest_event_time_ms"], said["newest_event_age_ms"]) == (-1, -1)


def test_a_batch_keeps_its_order(live: Live, store: StateStore) -> None:
    for user in (2, 4):
        write_clicks(store, user, range(user))
    model = FakeModel()
    answers = answer([Ask(user, 1) for user in (1, 2, 3, 4)], live, model, NOW_MS)
    assert [provenance(one)["ordinal"] for one in answers] == [0, 2, 0, 4]
    assert [one.item_ids for one in answers] == [[7], [100], [7], [100]]
    assert len(model.asked) == 1
    assert model.asked[0][1].ordinal_B.tolist() == [2, 4]


def test_model_away(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1])
    (one,) = answer([Ask(5, 2)], live, away, NOW_MS)
    assert one.item_ids == [7, 8]
    said = provenance(one)
    assert Degraded(said["degraded"]) is Degraded.MODEL_AWAY
    assert (said["model_version"], said["ordinal"]) == (0, 1)


def test_nothing_published_is_a_model_away(
    live: Live, store: StateStore, catalogue: CatalogueStore, redis_client: redis.Redis
) -> None:
    write_clicks(store, 5, [1])
    redis_client.delete("moveline:pointers")
    catalogue.put_pointers(Pointers(None, store.generation))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    (one,) = answer([Ask(5, 2)], live, never, NOW_MS)
    assert Degraded(provenance(one)["degraded"]) is Degraded.MODEL_AWAY


def test_store_away(live: Live) -> None:
    live.client = connect("redis://127.0.0.1:9/0", timeout_s=0.2)
    (one,) = answer([Ask(5, 2)], live, never, NOW_MS)
    assert one.item_ids == [7, 8]
    assert Degraded(provenance(one)["degraded"]) is Degraded.STORE_AWAY


def test_a_row_that_is_no_row_degrades_the_answer(live: Live, store: StateStore) -> None:
    write_clicks(store, 5, [1])
    key = next(iter(store.client.keys("*:row:5")))
    store.client.set(key, b"x" * 400)
    (one,) = answer([Ask(5, 2)], live, never, NOW_MS)
    assert one.item_ids == [7, 8]
    assert Degraded(provenance(one)["degraded"]) is Degraded.STORE_AWAY


def test_a_row_that_is_no_row_costs_the_others_nothing(live: Live, store: StateStore) -> None:
    for user in (5, 6, 7):
        write_clicks(store, user, [1])
    key = next(iter(store.client.keys("*:row:6")))
    store.client.set(key, b"x" * 400)
    answers = answer([Ask(user, 2) for user in (5, 6, 7, 8)], live, FakeModel(), NOW_MS)
    assert [Degraded(provenance(one)["degraded"]) for one in answers] == [
        Degraded.NONE,
        Degraded.STORE_AWAY,
        Degraded.NONE,
        Degraded.UNKNOWN_USER,
    ]
    assert [one.item_ids for one in answers] == [[100, 101], [7, 8], [100, 101], [7, 8]]


def test_withdrawn_repeated_and_missing_items_never_appear(
    live: Live, store: StateStore, catalogue: CatalogueStore
) -> None:
    write_clicks(store, 5, [1])
    live.snapshot = replace(live.snapshot, withdrawn=frozenset({101, 7}))
    model = FakeModel([100, 101, 100, NO_ITEM, 104])
    (one,) = answer([Ask(5, 10)], live, model, NOW_MS)
    assert one.item_ids == [100, 104, 8, 9]
    assert Degraded(provenance(one)["degraded"]) is Degraded.FEW_CANDIDATES
    assert model.asked[0][3] == {101, 7}
    (unknown,) = answer([Ask(6, 10)], live, never, NOW_MS)
    assert unknown.item_ids == [8, 9, 100]
    del catalogue


def test_exclude_seen_leaves_out_both_streams(live: Live, store: StateStore) -> None:
    seen = [8, 103, *range(200, 200 + SMALL.recent), 100, 100]
    write_clicks(store, 5, seen)
    model = FakeModel()
    (one,) = answer([Ask(5, 10, exclude_seen=True)], live, model, NOW_MS)
    assert one.item_ids == [101, 102, 104, 105, 7, 9]
    excluded = model.asked[0][2][0]
    assert excluded[0] == 100
    assert sorted(excluded) == sorted(set(seen))
    (other,) = answer([Ask(5, 10)], live, model, NOW_MS)
    assert other.item_ids == [*MODEL_ITEMS, 7, 8, 9]


def test_what_waits_to_become_a_chunk_is_not_served(live: Live, store: StateStore) -> None:
    count = SMALL.tail_max - 1
    write_clicks(store, 5, range(1_000, 1_000 + count))
    model = FakeModel()
    answer([Ask(5, 1, exclude_seen=True)], live, model, NOW_MS)
    _, streams, excluded, _ = model.asked[0]
    served = range(1_000 + count - SMALL.recent - SMALL.mid, 1_000 + count)
    both = [*streams.mid_BM["item_id"][0].tolist(), *streams.recent_BR["item_id"][0].tolist()]
    assert both == list(served)
    assert sorted(excluded[0]) == list(served)


def test_an_answer_waits_for_its_position(live: Live, store: StateStore) -> None:
    write_user(store, 5, [make_event(0, item_id=1, partition=2)])
    asking = threading.Event()

    def arrive() -> None:
        asking.wait(10)
        write_user(store, 5, [make_event(4, item_id=2, partition=2)])

    writer = threading.Thread(target=arrive)
    writer.start()
    asking.set()
    started = time.monotonic()
    (one,) = answer([Ask(5, 1, 2, 4, 5_000)], live, FakeModel(), NOW_MS)
    writer.join()
    assert time.monotonic() - started < 4
    assert provenance(one)["ordinal"] == 2
    assert provenance(one)["degraded"] == 0


@pytest.mark.parametrize(("partition", "offset"), [(2, 5), (1, 0), (7, 4)])
def test_a_position_that_never_comes_is_said(
    live: Live, store: StateStore, partition: int, offset: int
) -> None:
    write_user(store, 5, [make_event(4, item_id=1, partition=2)])
    started = time.monotonic()
    (one,) = answer([Ask(5, 1, partition, offset, 100)], live, FakeModel(), NOW_MS)
    assert 0.1 <= time.monotonic() - started < 2
    assert one.item_ids == [100]
    assert Degraded(provenance(one)["degraded"]) is Degraded.POSITION_NOT_REACHED


def test_a_position_of_an_unknown_user_is_waited_for(live: Live) -> None:
    (one,) = answer([Ask(5, 1, 0, 0, 20)], live, never, NOW_MS)
    degraded = Degraded(provenance(one)["degraded"])
    assert degraded == Degraded.UNKNOWN_USER | Degraded.POSITION_NOT_REACHED


def test_a_caller_cannot_hold_a_slot_for_longer_than_the_limit(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client limits its wait, but the server must not have to trust its callers."""
    monkeypatch.setattr("scoring.reading.WAIT_MS_MAX", 100)
    started = time.monotonic()
    (one,) = answer([Ask(5, 1, 0, 0, 3_600_000)], live, never, NOW_MS)
    assert time.monotonic() - started < 5
    assert Degraded.POSITION_NOT_REACHED in Degraded(provenance(one)["degraded"])
    assert WAIT_MS_MAX >= 1_000


def test_a_snapshot_keeps_what_redis_does_not_know(
    live: Live, store: StateStore, catalogue: CatalogueStore, redis_client: redis.Redis
) -> None:
    before = live.snapshot
    assert before.config == SMALL
    redis_client.flushall()
    after = read_snapshot(catalogue, before)
    assert after == before
    assert read_snapshot(catalogue, Snapshot()) == Snapshot()
    del store


@pytest.mark.parametrize("broken", ["trending", "pointers", "withdrawn"])
def test_what_cannot_be_read_does_not_end_the_refreshing(
    live: Live, catalogue: CatalogueStore, redis_client: redis.Redis, broken: str
) -> None:
    before = live.snapshot
    key = f"moveline:{broken}"
    redis_client.delete(key)
    if broken == "trending":
        redis_client.set(key, b"{")
    elif broken == "pointers":
        redis_client.hset(key, mapping={"generation": "one"})
    else:
        redis_client.sadd(key, "tea")
    live._refresh()
    assert live.snapshot == before
    redis_client.delete(key)
    catalogue.put_pointers(Pointers(12, before.generation))
    live._refresh()
    assert live.snapshot.model_version == 12


def test_a_live_thread_follows_and_survives_an_absent_redis(
    redis_client: redis.Redis, catalogue: CatalogueStore, store: StateStore
) -> None:
    store.claim_generation()
    one = Live(redis_client)
    one.start()
    try:
        assert one.snapshot.model_version is None
        catalogue.put_pointers(Pointers(9, store.generation))
        until(lambda: one.snapshot.model_version == 9, 10)
        one.client = connect("redis://127.0.0.1:9/0", timeout_s=0.2)
        one._refresh()
        assert one.snapshot.model_version == 9
        one.client = redis_client
        catalogue.put_pointers(Pointers(10, store.generation))
        until(lambda: one.snapshot.model_version == 10, 10)
    finally:
        one.stop()


def test_the_model_is_told_what_live_sources_say(
    live: Live, catalogue: CatalogueStore, store: StateStore
) -> None:
    """Popularity as a share of all events, and what followed each user's own last item."""
    write_clicks(store, 1, [50, 61])
    write_clicks(store, 2, [50, 62])
    followers = Followers(9, 4.0, np.array([70, 71]), np.array([2.0, 1.0]))
    put_lists(live.client, {61: followers}, half_life_h=48)
    catalogue.put_trending(Trending((8, 9), (5.0, 2.5), 10.0, 6))
    live.snapshot = read_snapshot(catalogue, live.snapshot)
    model = FakeModel()
    answer([Ask(1, 3), Ask(2, 3), Ask(99, 3)], live, model, NOW_MS)
    (counted,) = model.counted
    assert counted.item_BSK.shape == (2, 2, 100), "an unknown user is not asked about"
    assert counted.item_BSK[:, 0, :3].tolist() == [[8, 9, -1]] * 2
    assert counted.share_BSK[:, 0, :3].tolist() == [[0.5, 0.25, 0.0]] * 2
    assert counted.item_BSK[:, 1, :3].tolist() == [[70, 71, -1], [-1, -1, -1]]
    assert counted.share_BSK[0, 1, :3].tolist() == [0.5, 0.25, 0.0]


def test_popularity_without_a_total_says_nothing(live: Live, store: StateStore) -> None:
    """A record by somebody who did not know how much all items weigh together."""
    write_clicks(store, 1, [50])
    model = FakeModel()
    answer([Ask(1, 3)], live, model, NOW_MS)
    assert TRENDING.total == 0
    assert (model.counted[0].item_BSK == -1).all()


def test_followers_are_read_once_a_second(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second is a minute here, then over."""
    monkeypatch.setattr("scoring.sources.LIST_AGE_MAX_S", 60.0)
    one = Followers(9, 1.0, np.array([70]), np.array([1.0]))
    put_lists(live.client, {61: one}, half_life_h=48)
    assert live.followers.lists([61, 62, -1])[0].item_id.tolist() == [70]
    put_lists(live.client, {61: one._replace(item_id=np.array([71]))}, half_life_h=48)
    assert live.followers.lists([61])[0].item_id.tolist() == [70]
    monkeypatch.setattr("scoring.sources.LIST_AGE_MAX_S", 0.0)
    assert live.followers.lists([61])[0].item_id.tolist() == [71]


def test_followers_that_cannot_be_read_are_none() -> None:
    cache = FollowerCache(connect("redis://127.0.0.1:9/0", timeout_s=0.2))
    assert [found.item_id.tolist() for found in cache.lists([61, 62])] == [[], []]
