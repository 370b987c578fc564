"""Goal: a memory made of the lake equals the one that compaction made, and heals what that cannot.

Method: the same events are written as states and as a lake; chunks are folded as they come, or
lost.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from features.config import FORGET_CODE
from features.keys import bucket_of, memories_key
from features.lake_users import stream_users
from features.lifelong import memory_difference, pack_memory, unpack_memory
from features.lifelong_store import LifelongStore
from features.lifelong_view import read_lifelong
from features.nearline import SessionStore, markers_key
from features.redis import execute
from features.state import Accepted, Position
from streams.lifelong import Compactor
from streams.lifelong_build import TOLERANCE, Coverage, MemoryBuilder, coverage, verify
from tests.lake.logs import write_logs
from tests.lake.writing import TOPIC
from tests.lifelong.folds import V1, V2, fold_ordinals, fold_values, ordinals_in
from tests.lifelong.test_exactly_once import User
from tests.small import put_states

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from features.lifelong import Chunks, Folded, Memory
    from features.redis import StateStore

VERSION = V2.memory_version
NUM_USERS = 12


def log_of(seed: int, count: int, *, domain: int = 0) -> list[Accepted]:
    """Return one user's events, some of them late by much or little."""
    source = random.Random(seed)
    events = []
    for offset in range(count):
        late = source.choice([0, 0, 0, 15, 4_000])
        time_ms = 1_000_000 + 10 * offset - late
        at = Position(0, 0, offset)
        item, hashed = source.randrange(500), 1 + offset + 10_000 * seed
        events.append(Accepted(at, 2_000_000, item, time_ms, domain, hashed, -1, 0.0, 1))
    return events


class World:
    """Users whose events are in Redis and in a lake."""

    def __init__(self, store: StateStore, root: Path) -> None:
        self.store = store
        self.root = root
        self.memories = LifelongStore.of(store)
        sessions = SessionStore(store.client, store.generation)
        self.compactor = Compactor(self.memories, sessions, fold_values)
        self.logs = {10 * n: log_of(n, 20 + 23 * n) for n in range(1, NUM_USERS + 1)}
        for user in self.logs:
            name = markers_key(store.generation, bucket_of(user))
            execute(store.client, "HSET", name, user, b"4294967295!")

    @property
    def users(self) -> list[int]:
        return list(self.logs)

    def apply(self, share: float = 1.0) -> None:
        """Write a share of every log as states; again to go on."""
        for user, log in self.logs.items():
            (held,) = self.store.read_states([user], newest=1)
            start = 0 if held is None else held.position.offset + 1
            part = log[start : max(start + 1, int(share * len(log)))]
            put_states(self.store, {user: part})

    def write_lake(self) -> None:
        write_logs(self.root, self.logs)

    def parts(self) -> Iterator[dict[str, np.ndarray[tuple[int], np.dtype]]]:
        return stream_users(self.root, TOPIC, self.store.config)

    def builder(self) -> MemoryBuilder:
        return MemoryBuilder(self.memories, V2, fold_values)

    def memory(self, user: int, version: str = VERSION) -> Memory | None:
        (raw,) = self.memories.read([user], version)
        return None if raw is None else unpack_memory(raw, version)

    def coverage(self) -> Coverage:
        return coverage(self.memories, self.users, VERSION)

    def verified(self) -> dict[int, bool]:
        verdicts = verify(self.memories, V2, fold_values, self.parts())
        return {one.user_id: one.is_equal for one in verdicts}


@pytest.fixture
def world(store: StateStore, tmp_path: Path) -> World:
    made = World(store, tmp_path)
    made.write_lake()
    return made


def test_batch_equals_streaming(world: World) -> None:
    for share in (0.3, 0.6, 1.0):
        world.apply(share)
        assert world.compactor.compact(world.users, [V2]) is None
    streamed = {user: world.memory(user) for user in world.users}
    assert set(world.verified().values()) == {True}
    for user in world.users:
        world.memories.discard(user, VERSION)
    report = world.builder().run(world.parts())
    assert (report.num_refused, report.num_behind) == (0, 0)
    assert report.num_users == sum(memory is not None for memory in streamed.values()) > 8
    for user, memory in streamed.items():
        built = world.memory(user)
        assert (built is None) == (memory is None)
        if built is not None and memory is not None:
            assert built[:3] == memory[:3]
            assert memory_difference(built, memory) <= TOLERANCE


def test_a_new_version_is_built_of_chunks_that_left_long_ago(world: World) -> None:
    world.apply()
    world.compactor.compact(world.users, [V1])
    before = world.coverage()
    assert (before.num_whole, before.num_current, before.num_folded) == (0, 0, 0)
    world.builder().run(world.parts())
    after = world.coverage()
    assert after.share == 1.0
    assert after.num_current == after.num_users == before.num_users
    assert after.num_folded == after.num_chunks
    batch = read_lifelong(world.store, world.users, VERSION, now_ms=2_000_000)
    assert not batch.is_incomplete_B.any()


def test_building_again_folds_nothing_and_goes_on_where_it_was(world: World) -> None:
    world.apply(0.5)
    world.builder().run(world.parts())
    half = {user: world.memory(user) for user in world.users}
    assert world.builder().run(world.parts()).num_chunks == 0
    world.apply()
    report = world.builder().run(world.parts())
    folded_before = sum(memory.num_chunks for memory in half.values() if memory)
    assert report.num_chunks == world.coverage().num_chunks - folded_before
    assert set(world.verified().values()) == {True}


def test_a_build_that_is_stopped_leaves_whole_memories(world: World) -> None:
    world.apply()
    builder = world.builder()
    builder.fold = fold_values
    builder.should_stop = lambda: True
    builder.run(world.parts())
    assert world.coverage().num_folded == 0
    world.builder().run(world.parts())
    assert world.coverage().share == 1.0


def test_side_by_side_with_compaction_nothing_is_doubled(world: World) -> None:
    world.apply()
    builder = world.builder()

    def fold_beside(model_version: int, records_NC: Chunks) -> Folded:
        builder.fold = fold_values
        world.compactor.compact(world.users, [V2])
        return fold_values(model_version, records_NC)

    builder.fold = fold_beside
    report = builder.run(world.parts())
    assert report.num_refused > 0
    assert world.coverage().share == 1.0
    assert set(world.verified().values()) == {True}


def test_the_cap_is_healed(store: StateStore, tmp_path: Path) -> None:
    user = User(store, user_id=990)
    log = log_of(7, 100)
    put_states(store, {user.user_id: log})
    user.offset = 100
    assert user.cap(2)
    user.compact()
    write_logs(tmp_path, {user.user_id: log})
    builder = MemoryBuilder(user.memories, V1, fold_ordinals)
    builder.run(stream_users(tmp_path, TOPIC, store.config))
    (raw,) = user.memories.read([user.user_id], V1.memory_version)
    assert raw is not None
    memory = unpack_memory(raw, V1.memory_version)
    assert memory.num_chunks == (100 - 32) // 6
    assert set(ordinals_in(memory).values()) == {1}
    batch = read_lifelong(store, [user.user_id], V1.memory_version, now_ms=user.now_ms)
    assert not batch.is_incomplete_B.any()


def test_a_lake_that_is_behind_is_said(world: World, tmp_path: Path) -> None:
    """The lake ends before chunks that have left Redis already."""
    world.apply()
    world.compactor.compact(world.users, [V1])
    short = World(world.store, tmp_path / "short")
    short.logs = {user: log[:60] for user, log in short.logs.items()}
    short.write_lake()
    report = short.builder().run(short.parts())
    assert report.num_behind > 0
    assert short.coverage().share < 1.0
    assert set(short.verified().values()) == {True}
    world.builder().run(world.parts())
    assert world.coverage().share == 1.0


def test_a_lake_from_before_a_forget_is_not_believed(world: World) -> None:
    world.apply()
    user = world.users[-1]
    log = world.logs[user]
    at = len(log)
    wish = Accepted(Position(0, 0, at), 2_000_000, 0, 0, 0, 0, -1, 0.0, FORGET_CODE)
    again = [
        Accepted(Position(0, 0, at + n), 2_000_000, n, 3_000_000 + n, 0, 77_000_000 + n, -1, 0.0, 1)
        for n in range(1, 100)
    ]
    put_states(world.store, {user: [wish, *again]})
    world.builder().run(world.parts())
    assert world.memory(user) is None
    world.compactor.compact([user], [V2])
    memory = world.memory(user)
    assert memory is not None
    assert memory.begins == at


def test_a_damaged_memory_is_made_again(world: World) -> None:
    world.apply()
    world.builder().run(world.parts())
    user = world.users[-1]
    key = memories_key(world.store.generation, user)
    raw = bytearray(execute(world.store.client, "HGET", key, VERSION))
    raw[1_000] ^= 4
    execute(world.store.client, "HSET", key, VERSION, bytes(raw))
    assert world.verified()[user] is False
    report = world.builder().run(world.parts())
    assert report.num_users == 1
    assert set(world.verified().values()) == {True}


def test_a_memory_that_folded_something_else_is_found(world: World) -> None:
    world.apply()
    world.builder().run(world.parts())
    user = world.users[-1]
    memory = world.memory(user)
    assert memory is not None
    wrong = memory._replace(state=memory.state * np.float32(1.001))
    key = memories_key(world.store.generation, user)
    execute(world.store.client, "HSET", key, VERSION, pack_memory(wrong, VERSION))
    assert [who for who, is_equal in world.verified().items() if not is_equal] == [user]
