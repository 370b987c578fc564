"""Waiting chunks leave Redis at the cap, once the lake has them, and leave a mark: never sooner.

The law for what is kept is that of all other tests (`assert_holds`); the simulation adds crashes.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field, replace
from threading import Event
from typing import TYPE_CHECKING

import pytest
from typer.testing import CliRunner

from compose.cli import app
from features.chunks import FIRST_FIELD, ChunkStore, Drop, Waiting
from features.keys import chunks_key
from features.lake import file_name, partition_folder
from features.redis import StateStore
from features.state import Change, Chunk, Position, UserState
from streams import chunk_cap
from streams.audit import audit
from streams.chunk_cap import DROP_INTERVAL_S, LAKE_PATIENCE_S, ChunkCap, LakeEnds
from streams.compare import compare_generations
from streams.event_log import EventLog
from streams.lake import LakeSink
from streams.metrics import WorkerMetrics
from streams.replay import Replay, ReplayRequest
from tests.conftest import NUM_PARTITIONS
from tests.scoring.states import write_clicks
from tests.small import SMALL
from tests.waiting import until
from tests.worker.running import running, wait_caught_up
from tests.worker.test_went_back import dump_all, go_back
from tests.worker.traffic import Traffic, accepted_of, assert_equals_oracle, assert_holds, publish

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.redis import CatalogueStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics
    from tests.worker.running import Running


@dataclass
class Dropped:
    """Takes note of what was to be dropped. Nothing is asked of Redis in the tests that use it."""

    calls: list[dict[int, int]] = field(default_factory=list)

    def drop(self, drops: Mapping[int, Drop]) -> int:
        """Say that one chunk of each left."""
        self.calls.append({user: drop.keep_from for user, drop in drops.items()})
        return len(drops)


@dataclass
class Setting:
    """A cap of three chunks, a lake and a clock that stand where they are put."""

    end: int = 0
    now_s: float = 100.0
    dropped: Dropped = field(default_factory=Dropped)
    cap: ChunkCap = field(init=False)

    def __post_init__(self) -> None:
        """Make the cap."""
        self.cap = ChunkCap(
            self.dropped, lambda *_: self.end, WorkerMetrics(), 3, clock=lambda: self.now_s
        )

    def note(self, user: int, num_chunks: int, offset: int) -> None:
        """A user has handed out a chunk."""
        state = UserState(Position(0, 0, offset), 0, 0, num_chunks, 0, None, b"")
        chunk = Chunk(num_chunks - 1, bytes(48))
        self.cap.note(user, Change(state, 0, (chunk,), 1, 0, 0))

    def drop(self, end: int) -> list[dict[int, int]]:
        """Some time later the lake ends there."""
        self.end = end
        self.now_s += DROP_INTERVAL_S + 1
        self.cap.drop()
        return self.dropped.calls


def test_at_the_cap_nothing_happens_above_it_the_oldest_leave() -> None:
    setting = Setting()
    setting.note(1, 3, 50)
    assert setting.drop(1_000) == []
    setting.note(1, 4, 60)
    setting.note(2, 9, 60)
    assert setting.drop(1_000) == [{1: 1, 2: 6}]
    assert setting.drop(2_000) == [{1: 1, 2: 6}]
    assert setting.cap.metrics.registry.get_sample_value("moveline_chunks_dropped_total") == 2


def test_the_last_event_itself_has_to_be_in_the_lake() -> None:
    setting = Setting()
    setting.note(1, 4, 60)
    assert setting.drop(60) == []
    assert setting.drop(61) == [{1: 1}]


def test_who_is_busier_than_the_lake_is_still_dropped() -> None:
    """Each look finds the newest event outside the lake; what was noted first is what counts."""
    setting = Setting()
    for turn in range(10):
        setting.note(1, 4 + turn, 100 * (turn + 1))
        setting.drop(100 * turn + 50)
    assert [call[1] for call in setting.dropped.calls] == [1, 3, 5, 7, 9]


def test_more_users_than_fit_a_turn_leave_in_several(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_cap, "DROPS_MAX", 2)
    setting = Setting()
    for user in range(5):
        setting.note(user, 4, user)
    setting.drop(1_000)
    setting.cap.drop()
    setting.cap.drop()
    assert [sorted(call) for call in setting.dropped.calls] == [[0, 1], [2, 3], [4]]


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunk_cap, "NOTED_MAX", 3)
    setting = Setting()
    for user in range(5):
        setting.note(user, 4, user)
    assert setting.drop(1_000) == [{0: 1, 1: 1, 2: 1}]
    setting.note(4, 5, 2_000)
    assert setting.drop(3_000)[-1] == {4: 2}


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what the worker said; other loggers' threads may speak meanwhile."""
    mine = [record for record in caplog.records if record.name == "moveline.worker"]
    return [record.getMessage() for record in mine]


def test_a_lake_that_stays_behind_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    setting = Setting()
    setting.note(1, 4, 60)
    with caplog.at_level(logging.WARNING, "moveline.worker"):
        setting.drop(0)
        assert not told(caplog)
        for _ in range(3):
            setting.now_s += LAKE_PATIENCE_S
            assert setting.drop(0) == []
    assert len(told(caplog)) == 1
    assert "1 users have more than 3 chunks" in told(caplog)[0]
    sample = "moveline_users_over_chunk_cap"
    assert setting.cap.metrics.registry.get_sample_value(sample) == 1
    setting.drop(61)
    assert setting.cap.metrics.registry.get_sample_value(sample) == 0


def test_a_lake_counts_from_its_first_offset_without_a_hole(tmp_path: Path) -> None:
    ends = LakeEnds(tmp_path, "events")
    assert ends(0, 0) == 0
    for partition, start in ((0, 0), (1, 7)):
        folder = partition_folder(tmp_path, "events", partition)
        folder.mkdir(parents=True)
        (folder / file_name(start, 41)).touch()
    assert ends(0, 0) == 42
    # What came before its first file may be in nobody's hands but Redis'.
    assert ends(0, 1) == 0
    # The lake of another source is another topic's.
    assert ends(1, 0) == 0
    (partition_folder(tmp_path, "events", 0) / file_name(50, 60)).touch()
    assert ends(0, 0) == 0


def test_the_mark_says_exactly_what_is_gone() -> None:
    assert Waiting(2, {2: b"", 3: b""}).missing(4) == []
    assert Waiting(0, {2: b"", 3: b""}).missing(4) == [0, 1]
    assert Waiting(2, {1: b"", 2: b""}).missing(4) == [1, 3]


def chunk(number: int) -> bytes:
    """Return the records of one."""
    return b"%048d" % number * 2


def before(number: int, newest: int = 3) -> Drop:
    """Return the wish that chunks before one leave."""
    return Drop(number, newest, chunk(newest)[:48])


@pytest.fixture
def waiting(store: StateStore) -> ChunkStore:
    """The chunks of the test's generation; user 1 has four."""
    key = chunks_key(store.generation, 1)
    store.client.hset(key, mapping={b"%d" % n: chunk(n) for n in range(4)})
    return ChunkStore(store.client, store.generation)


def test_dropping_again_or_after_redis_went_back_changes_nothing(waiting: ChunkStore) -> None:
    snapshot = dump_all(waiting.client)
    assert waiting.drop({1: before(2), 7: before(3)}) == 2
    after = waiting.read([1, 7])
    assert after == [Waiting(2, {2: chunk(2), 3: chunk(3)}), Waiting(0, {})]
    assert waiting.first_kept([1, 7]) == [2, 0]
    assert waiting.drop({1: before(2)}) == 0
    # No chunk 4: what is there is older than what the drop was decided on.
    assert waiting.drop({1: before(3, newest=4)}) == 0
    # Another chunk 3: the user was forgotten since, and is numbered anew.
    assert waiting.drop({1: Drop(3, 3, b"other")}) == 0
    assert waiting.read([1, 7]) == after
    go_back(waiting.client, snapshot)
    assert waiting.drop({1: before(2)}) == 2
    assert waiting.read([1, 7]) == after
    assert not waiting.client.exists(chunks_key(waiting.generation, 7))


def test_a_full_redis_lets_chunks_leave(waiting: ChunkStore) -> None:
    client = waiting.client
    limit = client.config_get("maxmemory")["maxmemory"]
    client.config_set("maxmemory", 1)
    try:
        assert waiting.drop({1: before(3)}) == 3
    finally:
        client.config_set("maxmemory", limit)
    assert waiting.read([1]) == [Waiting(3, {3: chunk(3)})]


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lake is asked all the time."""
    monkeypatch.setattr(chunk_cap, "DROP_INTERVAL_S", 0.0)


def marks(store: StateStore) -> Counter[int]:
    """Return by user how many chunks are marked as gone."""
    found: Counter[int] = Counter()
    for key in store.client.keys(f"moveline:*:g{store.generation}:chunks:*"):
        found[int(key.rsplit(b":", 1)[1])] = int(store.client.hget(key, FIRST_FIELD) or 0)
    return found


def sink(kafka: KafkaConfig, topics: Topics, lake: Path) -> None:
    """Bring the lake to the topic's end."""
    LakeSink(kafka, topics.events, lake).run(until_end=True)


def wait_none_over(worker: Running) -> None:
    """Return once nobody waits for the lake any more."""
    worker.wait("chunks_dropped_total", 1)
    until(lambda: not worker.counted("users_over_chunk_cap"), what="nobody is over the cap")


@pytest.mark.usefixtures("hurried")
def test_only_what_the_lake_has_leaves(
    kafka: KafkaConfig, topics: Topics, store: StateStore, tmp_path: Path
) -> None:
    traffic = Traffic(seed=41, num_users=20)
    sent = traffic.make(3_000)
    publish(kafka, topics.events, sent)
    with running(kafka, topics, store, lake=tmp_path, waiting_chunks_max=2) as worker:
        wait_caught_up(kafka, topics, worker)
        until(lambda: worker.counted("users_over_chunk_cap"), what="somebody is over the cap")
        # The lake has nothing yet.
        assert worker.counted("chunks_dropped_total") == 0
        assert not +marks(store)
        sink(kafka, topics, tmp_path)
        wait_none_over(worker)
        assert worker.counted("chunks_dropped_total") == sum(marks(store).values())
        sent += traffic.make(2_000)
        publish(kafka, topics.events, sent[3_000:])
        wait_caught_up(kafka, topics, worker)
        sink(kafka, topics, tmp_path)
        until(lambda: worker.counted("users_over_chunk_cap") == 0, what="all dropped")
    assert_equals_oracle(store, kafka, topics, sent)
    kept = [len(one.records) for one in ChunkStore(store.client, store.generation).read(range(20))]
    # Who was noted while the lake was behind may have handed out more since; the next chunk tells.
    assert sum(kept) < sum(marks(store).values())
    assert (
        min(count for user, count in zip(range(20), kept, strict=True) if marks(store)[user]) >= 2
    )


@pytest.mark.usefixtures("hurried")
def test_redis_goes_back_to_before_the_drop(
    kafka: KafkaConfig, topics: Topics, store: StateStore, tmp_path: Path
) -> None:
    """Chunks that had left are there again, leave again, and nothing else is different."""
    traffic = Traffic(seed=42, num_users=20)
    sent = traffic.make(3_000)
    publish(kafka, topics.events, sent[:1_500])
    with running(kafka, topics, store, lake=tmp_path, waiting_chunks_max=2) as worker:
        wait_caught_up(kafka, topics, worker)
        snapshot = dump_all(store.client)
        sink(kafka, topics, tmp_path)
        wait_none_over(worker)
        gone = marks(store)
        publish(kafka, topics.events, sent[1_500:])
        wait_caught_up(kafka, topics, worker)
        go_back(store.client, snapshot)
        assert not +marks(store)
        worker.wait("refused_writes_total", 1)
        sink(kafka, topics, tmp_path)
        by_user = accepted_of(kafka, topics, sent, store.config)
        until(
            lambda: worker.errors or all(marks(store)[user] >= gone[user] for user in gone),
            what="dropped again",
        )
        wait_caught_up(kafka, topics, worker)
    assert_holds(store, by_user)


@pytest.mark.usefixtures("hurried")
def test_a_marked_hole_is_no_difference_and_any_other_is(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    catalogue: CatalogueStore,
    tmp_path: Path,
) -> None:
    """Audit and comparison; a rebuild under a wider cap has all chunks again."""
    sent = Traffic(seed=43, num_users=20).make(3_000)
    publish(kafka, topics.events, sent)
    sink(kafka, topics, tmp_path)
    with running(kafka, topics, store, lake=tmp_path, waiting_chunks_max=2) as worker:
        wait_caught_up(kafka, topics, worker)
        wait_none_over(worker)
    log = EventLog(kafka=kafka, topic=topics.events, lake=tmp_path)
    report = audit([log], store, None, num_users=1_000)
    assert (report.num_wrong, report.num_dropped) == (0, sum(marks(store).values()))
    again = replace(store, generation=store.generation + 700_000)
    for wide, cap in ((again, 10_000), (replace(again, generation=again.generation + 1), 1)):
        request = ReplayRequest(origin="lake", lake=tmp_path, waiting_chunks_max=cap)
        Replay(kafka, topics, wide, catalogue, request).run(Event())
        assert_equals_oracle(wide, kafka, topics, sent)
        result = compare_generations(wide, store, lambda _: True, {0: range(NUM_PARTITIONS)})
        assert (result.different, result.num_equal) == (0, report.num_users)
    assert not +marks(again)
    victim = marks(store).most_common(1)[0][0]
    store.client.hincrby(chunks_key(store.generation, victim), FIRST_FIELD.decode(), -1)
    assert set(audit([log], store, None, num_users=1_000).wrong) == {victim}
    result = compare_generations(again, store, lambda _: True, {0: range(NUM_PARTITIONS)})
    assert set(result.examples) == {victim}
    assert result.examples[victim].startswith("chunks [")


def test_the_command_shows_the_hole(stack: LocalStack, waiting: ChunkStore) -> None:
    store = StateStore(waiting.client, waiting.generation, SMALL)
    write_clicks(store, 1, list(range(60)))
    place = ("--redis", stack.addresses.redis, "--generation", f"g{store.generation}")
    whole = CliRunner().invoke(app, ["features", "1", *place])
    assert "chunks 4 late" in " ".join(whole.stdout.split())
    newest = waiting.read([1])[0].records[3]
    waiting.drop({1: Drop(3, 3, newest)})
    holed = CliRunner().invoke(app, ["features", "1", *place])
    assert "chunks 4 (0 to 2 only in the lake)" in " ".join(holed.stdout.split())
