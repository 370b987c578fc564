"""Goal: compaction ends at the same memories whatever interrupts it, and drops nothing too early.

The rows of ARCHITECTURE's table of compaction, one by one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.chunks import ChunkStore
from features.keys import bucket_of, memories_key
from features.lifelong import unpack_memory
from features.lifelong_store import DropFolded, put_live_memories
from features.lifelong_view import read_lifelong
from features.nearline import markers_key
from features.redis import execute
from scoring.errors import UnavailableError
from streams.lifelong import FOLD_CHUNKS_MAX, USER_CHUNKS_MAX, Compactor, Job, batches
from tests.lifelong.folds import V1, V2, fold_ordinals, ordinals_in
from tests.lifelong.test_exactly_once import VERSIONS, User, refill

if TYPE_CHECKING:
    from features.lifelong import Chunks, Folded, Memory
    from features.redis import StateStore


class Away:
    """The compressor of one version is away, as Triton's client says it."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.asked: list[int] = []

    def __call__(self, model_version: int, records_NC: Chunks) -> Folded:
        """Fold, or raise."""
        self.asked.append(model_version)
        if model_version == self.version:
            raise UnavailableError("no such version")
        return fold_ordinals(model_version, records_NC)


def memory_of(user: User, version: str = V1.memory_version) -> Memory | None:
    (raw,) = user.memories.read([user.user_id], version)
    return None if raw is None else unpack_memory(raw, version)


def waiting_of(user: User) -> tuple[int, list[int]]:
    (waiting,) = ChunkStore(user.store.client, user.store.generation).read([user.user_id])
    return waiting.first, sorted(waiting.records)


def test_what_waits_is_folded_and_leaves(store: StateStore) -> None:
    user = User(store)
    user.append(32 + 6 * 5 + 3)
    user.compact()
    for version in VERSIONS:
        memory = memory_of(user, version.memory_version)
        assert memory is not None
        assert (memory.num_chunks, memory.num_events, memory.begins) == (5, 30, 0)
        assert ordinals_in(memory) == dict.fromkeys(range(30), 1)
    assert waiting_of(user) == (5, [])
    batch = read_lifelong(store, [user.user_id], V1.memory_version, now_ms=user.now_ms)
    assert batch.streams().mid_BM["ordinal"][0, -27:].tolist() == list(range(30, 57))


def test_a_doubled_hint_folds_nothing(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    user.compact()
    before = memory_of(user)
    user.compact()
    user.compact_other()
    assert before is not None
    assert memory_of(user) is not None
    assert user.memories.read([user.user_id], V1.memory_version)
    assert (
        user.other.metrics.registry.get_sample_value("moveline_nearline_chunks_folded_total") == 0
    )
    user.look(is_capped=False)


def test_a_crash_before_the_drop_leaves_chunks_that_nobody_counts_twice(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    while user.compactor._fold_once([user.user_id], V1):
        pass
    assert waiting_of(user) == (0, list(range(8)))
    user.look(is_capped=False)
    user.compact()
    assert waiting_of(user) == (8, [])


def test_a_version_that_is_away_keeps_its_chunks_and_holds_up_nobody(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    away = Away(V2.lifelong_model_version)
    user.compactor.fold = away
    failure = user.compactor.compact([user.user_id], VERSIONS)
    assert isinstance(failure, UnavailableError)
    assert memory_of(user) is not None
    assert memory_of(user, V2.memory_version) is None
    assert waiting_of(user) == (0, list(range(8)))
    user.look(is_capped=False)
    user.compact_other()
    assert waiting_of(user) == (8, [])
    user.look(is_capped=False)


def test_another_app_was_faster(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    user.interruption = user.compact_other
    user.compact()
    refused = user.compactor.metrics.registry.get_sample_value(
        "moveline_nearline_folds_refused_total"
    )
    assert refused == 1
    user.look(is_capped=False)


def test_redis_goes_back_under_a_fold(store: StateStore) -> None:
    """The chunks that were folded are in the tail again: their memory must not be written."""
    user = User(store)
    user.append(60)
    user.save()
    user.append(20)
    user.interruption = user.go_back
    user.compact()
    assert memory_of(user) is None
    user.look(is_capped=False)
    user.compact()
    memory = memory_of(user)
    assert memory is not None
    assert memory.num_chunks == 4


def test_a_forget_under_a_fold_leaves_nothing_of_before(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    user.interruption = lambda: refill(user, 80)
    user.compactor._fold_once([user.user_id], V1)
    assert memory_of(user) is None
    user.compact()
    memory = memory_of(user)
    assert memory is not None
    assert min(ordinals_in(memory)) == memory.begins == 80
    user.look(is_capped=False)


def test_a_forget_takes_the_memories(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    user.compact()
    key = memories_key(store.generation, user.user_id)
    assert execute(store.client, "HLEN", key) == 2
    user.forget()
    assert execute(store.client, "EXISTS", key) == 0


def test_a_drop_decided_before_a_forget_does_nothing(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    refill(user, 80)
    while user.compactor._fold_once([user.user_id], V1):
        pass
    late = [DropFolded(user.user_id, 0, 8)]
    assert user.memories.drop_folded(late, [V1.memory_version]) == 0
    assert waiting_of(user) == (0, list(range(8)))


def test_chunks_stay_until_their_sessions_are_out(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    name = markers_key(store.generation, bucket_of(user.user_id))
    execute(store.client, "HSET", name, user.user_id, b"13!")
    user.compact()
    assert waiting_of(user) == (2, list(range(2, 8)))
    user.look(is_capped=False)
    execute(store.client, "HDEL", name, user.user_id)
    user.append(20)
    user.compact()
    assert waiting_of(user)[0] == 2
    user.sweep()
    user.compact()
    assert waiting_of(user) == (11, [])


def test_a_chunk_that_the_cap_took_first_is_missed_and_said(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    assert user.cap(2)
    user.compact()
    assert memory_of(user) is None
    batch = read_lifelong(store, [user.user_id], V1.memory_version, now_ms=user.now_ms)
    assert batch.is_incomplete_B.tolist() == [True]
    user.append(200)
    user.compact()
    assert waiting_of(user)[0] == 6
    put_live_memories(store.client, VERSIONS)
    user.compactor.round()
    value = user.compactor.metrics.registry.get_sample_value
    assert value("moveline_nearline_memories_incomplete") == 1
    assert value("moveline_nearline_chunks_behind") == (280 - 32) // 6


def test_a_damaged_memory_is_removed_and_counted(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    user.compact()
    key = memories_key(store.generation, user.user_id)
    raw = bytearray(store.client.hget(key, V1.memory_version) or b"")
    raw[-1] ^= 1
    execute(store.client, "HSET", key, V1.memory_version, bytes(raw))
    batch = read_lifelong(store, [user.user_id], V1.memory_version, now_ms=user.now_ms)
    assert batch.is_incomplete_B.tolist() == [True]
    assert not batch.state_BLW.any()
    user.append(12)
    user.compact()
    value = user.compactor.metrics.registry.get_sample_value
    assert value("moveline_nearline_memories_damaged_total") == 1
    assert execute(store.client, "HEXISTS", key, V1.memory_version) == 0


def test_nothing_is_done_without_a_live_version(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    assert user.compactor.step(budget_s=1.0)
    assert waiting_of(user) == (0, list(range(8)))
    put_live_memories(store.client, [V1])
    user.compactor.round()
    assert waiting_of(user) == (8, [])


def test_a_long_backlog_is_folded_in_parts() -> None:
    jobs = [Job(user, 0, range(USER_CHUNKS_MAX - user % 3)) for user in range(20)]
    groups = list(batches(jobs))
    assert [job for group in groups for job in group] == jobs
    assert all(sum(len(job.numbers) for job in group) <= FOLD_CHUNKS_MAX for group in groups)


def test_many_users_are_compacted_in_rounds(store: StateStore) -> None:
    users = [User(store) for _ in range(30)]
    for number, user in enumerate(users):
        user.append(30 + 7 * number)
    put_live_memories(store.client, VERSIONS)
    compactor = Compactor(users[0].memories, users[0].compactor.sessions, fold_ordinals)
    compactor.round()
    for user in users:
        assert waiting_of(user)[1] == []
        user.look(is_capped=False)


def test_a_redis_that_lost_its_scripts_is_told_them(store: StateStore) -> None:
    user = User(store)
    user.append(80)
    execute(store.client, "SCRIPT FLUSH")
    user.look(is_capped=False)
    execute(store.client, "SCRIPT FLUSH")
    user.compact()
    user.look(is_capped=False)


@pytest.mark.parametrize("count", [0, 1, 31, 37])
def test_users_without_chunks_have_nothing_to_fold(store: StateStore, count: int) -> None:
    user = User(store)
    if count:
        user.append(count)
    user.compact()
    assert memory_of(user) is None
    user.look(is_capped=False)
