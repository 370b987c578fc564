"""Goal: every event is in exactly one of memory, waiting chunks and tail, at every instant.

Method: hypothesis mixes events (late ones, repeats, forgets), compaction by two apps one of which
is interrupted between reading and writing, sessions that are swept late, the cap, and a Redis that
goes back; after each of these a reader looks, and counts every ordinal.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features.chunks import ChunkStore, Drop
from features.config import FORGET_CODE
from features.keys import bucket_of, chunks_key, memories_key, row_key
from features.lifelong import unpack_memory
from features.lifelong_store import LifelongStore
from features.lifelong_view import read_lifelong
from features.nearline import SessionStore, markers_key
from features.redis import StateStore, execute
from features.state import RECORD_BYTES, Accepted, Position
from features.view import PADDING_ITEM
from streams.lifelong import Compactor
from tests.lifelong.folds import V1, V2, fold_ordinals, ordinals_in
from tests.small import put_states

if TYPE_CHECKING:
    from collections.abc import Callable

    from features.lifelong import Chunks, Folded

_USERS = itertools.count(1)
VERSIONS = (V1, V2)


@dataclass
class User:
    """One user in a real Redis, and what can happen to him."""

    store: StateStore
    user_id: int = field(default_factory=lambda: next(_USERS))
    offset: int = 0
    now_ms: int = 1_000_000
    interruption: Callable[[], None] | None = None
    saved: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Make an app that may be interrupted, and another."""
        self.memories = LifelongStore.of(self.store)
        sessions = SessionStore(self.store.client, self.store.generation)
        self.compactor = Compactor(self.memories, sessions, self._interrupted_fold)
        self.other = Compactor(self.memories, sessions, fold_ordinals)
        self.sweep()

    def _interrupted_fold(self, model_version: int, records_NC: Chunks) -> Folded:
        """Fold; something happens between what was read and what will be written."""
        folded = fold_ordinals(model_version, records_NC)
        if self.interruption is not None:
            interruption, self.interruption = self.interruption, None
            interruption()
        return folded

    def append(self, count: int, late_ms: int = 0, *, repeat: bool = False) -> None:
        """Apply the user's next events; the first of them late, or a repeat."""
        events = []
        for number in range(count):
            self.offset += 1
            self.now_ms += 10
            time_ms = self.now_ms - (late_ms if number == 0 else 0)
            which = self.offset - 1 if repeat and number == 0 else self.offset
            at = Position(0, 0, self.offset)
            events.append(Accepted(at, self.now_ms, number, time_ms, 0, which, -1, 0.0, 1))
        put_states(self.store, {self.user_id: events})

    def forget(self) -> None:
        """The user wishes to be forgotten."""
        self.offset += 1
        at = Position(0, 0, self.offset)
        wish = Accepted(at, self.now_ms, 0, 0, 0, 0, -1, 0.0, FORGET_CODE)
        put_states(self.store, {self.user_id: [wish]})

    def sweep(self) -> None:
        """Every session so far is out, so that no chunk is needed for one."""
        name = markers_key(self.store.generation, bucket_of(self.user_id))
        execute(self.store.client, "HSET", name, self.user_id, b"4294967295!")

    def compact(self) -> None:
        """Let the near-line app do its work, perhaps interrupted."""
        assert self.compactor.compact([self.user_id], VERSIONS) is None

    def compact_other(self) -> None:
        """Let another app do it."""
        assert self.other.compact([self.user_id], VERSIONS) is None

    def save(self) -> None:
        """Redis writes a snapshot."""
        client = self.store.client
        self.saved = {name: client.dump(name) for name in self.names() if client.exists(name)}

    def go_back(self) -> None:
        """Redis comes back as it was then; the log's later events are applied again elsewhere."""
        client = self.store.client
        client.delete(*self.names())
        for name, value in self.saved.items():
            client.restore(name, 0, value)

    def names(self) -> list[str]:
        """Return the keys of the user."""
        return [
            make(self.store.generation, self.user_id)
            for make in (row_key, chunks_key, memories_key)
        ]

    def cap(self, chunks_max: int) -> bool:
        """Drop beyond the cap what the lake has; return whether something left."""
        chunks = ChunkStore(self.store.client, self.store.generation)
        (waiting,) = chunks.read([self.user_id])
        if len(waiting.records) <= chunks_max:
            return False
        newest = max(waiting.records)
        begins = waiting.records[newest][:RECORD_BYTES]
        drop = Drop(newest + 1 - chunks_max, newest, begins)
        return chunks.drop({self.user_id: drop}) > 0

    def look(self, *, is_capped: bool) -> None:
        """Every ordinal is in one place, whichever memory is read; what lacks something says so."""
        for version in (V1.memory_version, V2.memory_version, "ffffffffffffffff"):
            batch = read_lifelong(self.store, [self.user_id], version, now_ms=self.now_ms)
            streams = batch.streams()
            found: Counter[int] = Counter()
            for records in (streams.recent_BR[0], streams.mid_BM[0]):
                held = records[records["item_id"] != PADDING_ITEM]
                times = list(zip(held["event_time_ms"], held["ordinal"], strict=True))
                assert times == sorted(times)
                found.update(held["ordinal"].tolist())
            if batch.num_folded_B[0]:
                (raw,) = self.memories.read([self.user_id], version)
                assert raw is not None
                memory = unpack_memory(raw, version)
                found += ordinals_in(memory)
                assert np.array_equal(batch.state_BLW[0], memory.state)
                assert memory.num_events == batch.num_events_B[0]
            state = batch.users.state(0)
            end = 0 if state is None else state.next_ordinal
            marks = self.memories.marks([self.user_id], [version])[0]
            begins = 0 if marks is None else marks.begins
            assert set(found.values()) <= {1}
            assert set(found) <= set(range(begins, end))
            lacks = len(found) < end - begins
            assert bool(batch.is_incomplete_B[0]) is lacks
            if version != "ffffffffffffffff":
                assert not lacks or is_capped


STEPS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 40), st.sampled_from([0, 0, 35, 10_000])),
    st.tuples(st.just("repeat"), st.integers(1, 5), st.just(0)),
    st.tuples(
        st.just("interrupted"),
        st.sampled_from(["append", "forget", "compact_other", "go_back", "cap", "refill"]),
        st.integers(1, 60),
    ),
    st.tuples(st.sampled_from(["compact", "compact_other", "save", "go_back", "forget", "cap"])),
)


def refill(user: User, count: int) -> None:
    """Everything goes and as many chunks come again: the numbers are the same, the events not."""
    user.forget()
    user.append(count)


@settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(st.lists(STEPS, min_size=3, max_size=14))
def test_every_event_is_in_one_place(store: StateStore, steps: list[tuple[object, ...]]) -> None:
    user = User(store)
    user.append(60)
    is_capped = False
    for kind, *args in steps:
        if kind == "append":
            user.append(*args)
        elif kind == "repeat":
            user.append(args[0], repeat=True)
        elif kind == "interrupted":
            what, count = args
            user.interruption = {
                "append": lambda count=count: user.append(count),
                "refill": lambda count=count: refill(user, 60 + count),
                "cap": lambda: user.cap(1),
            }.get(what, getattr(user, str(what), None))
            is_capped |= what == "cap"
            user.compact()
        elif kind == "cap":
            is_capped |= user.cap(2)
        elif kind != "go_back" or user.saved:
            getattr(user, str(kind))()
        user.look(is_capped=is_capped)
    user.interruption = None
    user.compact()
    user.look(is_capped=is_capped)
