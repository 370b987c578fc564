"""Goal: an answer is made of the memory of the live model's version, and says what it lacks.

Method: `retrieve` is the seam between `scoring.recommend` and Triton, as in
`tests/scoring/test_recommend.py`; what it is handed is looked at. The real models are asked in
`tests/scoring/test_lifelong.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest

from features.as_of import features_at
from features.feature_log import decode_served, encode_served
from features.keys import chunks_key
from features.redis import Pointers, execute
from features.skew import UserHistory
from features.state import Accepted, Position
from features.view import PADDING_ITEM
from scoring.feature_log import served_of
from scoring.live import Live, read_snapshot
from scoring.recommend import Ask, Retrieved, answer
from scoring.signature import PROVENANCE, Degraded
from scoring.tensors import retrieval_inputs
from tests.lifelong.folds import V1, V2
from tests.lifelong.test_exactly_once import User
from tests.small import SMALL, put_states

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.redis import CatalogueStore, StateStore
    from features.view import StreamBatch
    from scoring.recommend import Answered


@dataclass
class Model:
    """Answers everybody alike and remembers what it was handed."""

    asked: list[StreamBatch] = field(default_factory=list)
    excluded: list[Sequence[int]] = field(default_factory=list)

    def __call__(
        self,
        version: int,
        streams: StreamBatch,
        excluded: Sequence[Sequence[int]],
        withdrawn: frozenset[int],
        **_: object,
    ) -> Retrieved:
        """Answer."""
        del version, withdrawn
        self.asked.append(streams)
        self.excluded += excluded
        size = len(streams.ordinal_B)
        return Retrieved([[100, 101]] * size, [[0.0, -1.0]] * size, [[0.5, 0.3, 0.2]] * size)


def live_with(catalogue: CatalogueStore, store: StateStore, memory: str | None) -> Live:
    store.claim_generation()
    catalogue.put_pointers(Pointers(3, store.generation, memory))
    one = Live(store.client)
    one.snapshot = read_snapshot(catalogue, one.snapshot)
    return one


def degraded(one: Answered) -> Degraded:
    return Degraded(one.provenance[PROVENANCE.index("degraded")])


@pytest.fixture
def user(store: StateStore) -> User:
    """A user with twelve chunks, all folded."""
    one = User(store)
    one.append(32 + 12 * 6 + 2)
    one.compact()
    return one


def test_a_model_is_handed_the_memory_and_all_that_is_not_in_it(
    user: User, store: StateStore, catalogue: CatalogueStore
) -> None:
    user.append(9)  # a chunk leaves and waits
    model = Model()
    ask = Ask(user.user_id, 2)
    (one,) = answer([ask], live_with(catalogue, store, V1.memory_version), model, user.now_ms)
    assert degraded(one) is Degraded.NONE
    (streams,) = model.asked
    assert streams.memory_BLW is not None
    assert streams.memory_events_B is not None
    assert streams.memory_BLW.sum() == streams.memory_events_B[0] == 72
    held = streams.mid_BM["item_id"][0] != PADDING_ITEM
    assert streams.mid_BM["ordinal"][0][held].tolist() == list(range(72, 107))
    assert streams.mid_BM.shape[1] == 36
    inputs = retrieval_inputs(streams, [[]], frozenset())
    assert inputs["lifelong"].shape == (1, 64, 64)
    assert inputs["lifelong_count"].tolist() == [[72]]
    assert one.seen is not None
    assert (one.seen.memory_version, one.seen.num_folded) == (V1.memory_version, 12)


def test_a_model_without_memory_reads_what_it_always_did(
    user: User, store: StateStore, catalogue: CatalogueStore
) -> None:
    model = Model()
    (one,) = answer([Ask(user.user_id, 2)], live_with(catalogue, store, None), model, user.now_ms)
    assert degraded(one) is Degraded.NONE
    (streams,) = model.asked
    assert streams.memory_BLW is None
    assert streams.mid_BM.shape == (1, SMALL.mid)
    assert not retrieval_inputs(streams, [[]], frozenset())["lifelong"].any()
    assert one.seen is not None
    assert one.seen.memory_version is None


def test_another_versions_memory_is_not_taken(
    user: User, store: StateStore, catalogue: CatalogueStore
) -> None:
    """Its chunks are gone, so there is nothing in the place of the memory: the answer says so."""
    model = Model()
    asks = [Ask(user.user_id, 2), Ask(2**40, 2)]
    known, unknown = answer(asks, live_with(catalogue, store, "f" * 16), model, user.now_ms)
    assert degraded(known) is Degraded.LIFELONG
    assert Degraded.LIFELONG not in degraded(unknown)
    (streams,) = model.asked
    assert streams.memory_BLW is not None
    assert not streams.memory_BLW.any()


def test_a_user_whose_chunks_all_wait_lacks_nothing(
    store: StateStore, catalogue: CatalogueStore
) -> None:
    user = User(store)
    user.append(80)
    model = Model()
    live = live_with(catalogue, store, V1.memory_version)
    (one,) = answer([Ask(user.user_id, 2)], live, model, user.now_ms)
    assert degraded(one) is Degraded.NONE
    held = model.asked[0].mid_BM["item_id"][0] != PADDING_ITEM
    assert held.sum() == 72


def test_a_chunk_lost_from_redis_is_said(store: StateStore, catalogue: CatalogueStore) -> None:
    user = User(store)
    user.append(80)
    execute(store.client, "HDEL", chunks_key(store.generation, user.user_id), 3)
    live = live_with(catalogue, store, V1.memory_version)
    (one,) = answer([Ask(user.user_id, 2)], live, Model(), user.now_ms)
    assert degraded(one) is Degraded.LIFELONG


def test_what_waits_is_left_out_with_what_was_seen(
    store: StateStore, catalogue: CatalogueStore
) -> None:
    user = User(store)
    put_states(store, {user.user_id: events_of(80, seed=1)})
    model = Model()
    ask = Ask(user.user_id, 2, exclude_seen=True)
    answer([ask], live_with(catalogue, store, V1.memory_version), model, user.now_ms)
    assert sorted(model.excluded[0]) == list(range(1_000, 1_080))


def events_of(count: int, *, seed: int) -> list[Accepted]:
    """Return events of items of their own, some of them late."""
    source = np.random.default_rng(seed)
    late = np.where(source.random(count) < 0.2, source.integers(0, 2_000, count), 0)
    times = 10_000 + 10 * np.arange(count) - late
    return [
        Accepted(Position(0, 0, n), 20_000, 1_000 + n, time_ms, 7, n + 1, 3, 1.0, 1)
        for n, time_ms in enumerate(times.tolist())
    ]


@pytest.mark.parametrize("seed", range(8))
def test_no_read_differs_from_the_lake_while_compaction_lags(
    store: StateStore, catalogue: CatalogueStore, seed: int
) -> None:
    """The parity law, for readers of two memories that are at different chunks."""
    source = np.random.default_rng(seed)
    user, events = User(store), events_of(160, seed=seed)
    lives = [live_with(catalogue, store, one.memory_version) for one in (V1, V2)]
    at, seen = 0, set()
    while at < len(events):
        count = int(source.integers(1, 20))
        put_states(store, {user.user_id: events[at : at + count]})
        at = min(len(events), at + count)
        if source.random() < 0.3:
            user.compactor._fold_once([user.user_id], [V1, V2][source.integers(2)])
        if source.random() < 0.2:
            user.compact()
        for live in lives:
            ask = Ask(user.user_id, 2)
            (one,) = answer([ask], live, Model(), 5_000)
            served = decode_served(encode_served(served_of(ask, one, 5_000)))
            skew = UserHistory(events, SMALL).compare(served)
            assert skew.is_equal, skew
            view = features_at(
                events,
                ordinal=served.ordinal,
                clock_ms=served.clock_ms,
                config=SMALL,
                num_folded=served.num_folded,
            )
            assert served.mid == view.mid.tobytes()
            seen.add((served.memory_version, served.num_folded))
    assert len(seen) > 4
