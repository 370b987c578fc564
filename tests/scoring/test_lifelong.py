"""The real compressor and the real model: chunks become memories, and answers read them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from compose.memories import find_memory, memory_of
from features.keys import bucket_of
from features.lifelong import LiveMemory, empty_memory, memory_difference, unpack_memory
from features.lifelong_store import LifelongStore
from features.nearline import SessionStore, markers_key
from features.redis import Pointers, execute
from scoring.errors import ScoringError
from scoring.signature import Degraded
from streams.fold import TritonFold
from streams.lifelong import Compactor, fold_chunks
from tests.asking import whole
from tests.scoring.states import write_clicks
from tests.scoring.tiny import ITEM_IDS
from tests.small import SMALL
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from features.redis import CatalogueStore, StateStore
    from scoring.client import Recommender
    from scoring.triton import TritonServer

pytestmark = pytest.mark.servers
USER = 77
NUM_CHUNKS = 20
SIZE = SMALL.recent + SMALL.mid


@pytest.fixture
def memory(version: int, model_repository: Path) -> LiveMemory:
    """What the published model reads."""
    found = memory_of(model_repository, version)
    assert found is not None
    return found


@pytest.fixture
def compacted(served_store: StateStore, server: TritonServer, memory: LiveMemory) -> LifelongStore:
    """A user whose chunks are folded by the model in Triton, and gone."""
    clicks = [ITEM_IDS[n % 7] for n in range(SIZE + NUM_CHUNKS * SMALL.chunk)]
    write_clicks(served_store, USER, clicks)
    memories = LifelongStore.of(served_store)
    before = memories.read_chunks([(USER, range(NUM_CHUNKS))])[0]
    assert None not in before
    name = markers_key(served_store.generation, bucket_of(USER))
    execute(served_store.client, "HSET", name, USER, b"4294967295!")
    sessions = SessionStore(served_store.client, served_store.generation)
    compactor = Compactor(memories, sessions, TritonFold(server))
    assert compactor.compact([USER], [memory]) is None
    (mark,) = memories.marks([USER], [memory.memory_version])
    assert mark is not None
    assert mark.folded[memory.memory_version] == mark.first == NUM_CHUNKS
    return memories


def test_one_by_one_is_what_all_at_once_is(
    served_store: StateStore, server: TritonServer, memory: LiveMemory, compacted: LifelongStore
) -> None:
    user = 78
    write_clicks(
        served_store, user, [ITEM_IDS[n % 7] for n in range(SIZE + NUM_CHUNKS * SMALL.chunk)]
    )
    (chunks,) = compacted.read_chunks([(user, range(NUM_CHUNKS))])
    streamed = empty_memory(0)
    for chunk in chunks:
        assert chunk is not None
        streamed = fold_chunks(TritonFold(server), memory, streamed, [chunk])
    (raw,) = compacted.read([USER], memory.memory_version)
    assert raw is not None
    at_once = unpack_memory(raw, memory.memory_version)
    assert at_once[:3] == streamed[:3]
    assert at_once.state.any()
    assert memory_difference(at_once, streamed) < 1e-5


def test_answers_read_the_memory_that_their_model_names(
    go_live: Callable[..., None],
    recommender: Recommender,
    served_catalogue: CatalogueStore,
    served_store: StateStore,
    compacted: LifelongStore,
    version: int,
    memory: LiveMemory,
) -> None:
    go_live(version)
    without = whole(lambda: recommender.recommend(USER, k=5))
    assert without.provenance.degraded is Degraded.NONE
    assert without.provenance.contribution[2] == 0
    pointers = Pointers(version, served_store.generation, memory.memory_version)
    served_catalogue.put_pointers(pointers)
    until(
        lambda: recommender.recommend(USER, k=5, deadline_s=10).provenance.contribution[2] > 0,
        20,
        what="the memory is read",
    )
    answer = whole(lambda: recommender.recommend(USER, k=5))
    assert answer.provenance.degraded is Degraded.NONE
    assert {item.item_id for item in answer.items} <= set(ITEM_IDS)
    compacted.discard(USER, memory.memory_version)

    def says_so() -> bool:
        source = recommender.recommend(USER, k=5, deadline_s=10)
        return source.provenance.degraded is Degraded.LIFELONG

    until(says_so, 20, what="the answer says that the memory is missing")


def test_a_version_that_is_not_there_is_an_error_of_scoring(
    server: TritonServer, memory: LiveMemory, model_repository: Path
) -> None:
    assert find_memory(model_repository, memory.memory_version) == memory
    gone = LiveMemory(memory.memory_version, 999)
    with pytest.raises(ScoringError):
        fold_chunks(TritonFold(server), gone, empty_memory(0), [bytes(48 * SMALL.chunk)])
