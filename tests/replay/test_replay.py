"""A replay builds the bytes that the live workers built, however it is cut, stopped or fed.

Method: a real worker builds the live generation, a replay another one, and every row and chunk is
compared; the oracle judges where the rules differ.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from features.clock import now_ms
from features.errors import GenerationError, SchemaMismatchError
from features.generations import Generations
from features.keys import built_key
from features.lake import next_offset
from features.redis import StateStore
from streams.errors import LogHoleError
from streams.event_log import EventLog
from streams.kafka import committed, end_offsets, ensure_topics, watermarks
from streams.replay import ReplayRequest
from streams.topics import Topics
from streams.worker import group_of
from tests.conftest import SMALL
from tests.replay.rows import everything
from tests.streams.support import read_all
from tests.waiting import until
from tests.worker.running import running
from tests.worker.test_state import worker_environment
from tests.worker.traffic import assert_equals_oracle

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.micro_batch import MicroBatch
    from tests.replay.conftest import Place

OTHER_SIZES = replace(SMALL, recent=4, mid=10, chunk=3, session_gap_ms=60_000)


def test_a_replay_equals_the_live_generation_byte_for_byte(place: Place) -> None:
    place.produce(22_000)
    place.catch_up()
    group = group_of(place.topics, place.live.generation)
    before = committed(place.kafka, group, place.topics.events)
    again = place.fresh()
    report = place.build(again)
    assert report.num_records == len(place.sent)
    assert report.num_missing == 0
    assert sum(report.dead_letters.values()) == sum(one.event is None for one in place.sent)
    assert everything(again) == everything(place.live)
    assert len(everything(again).rows) > 200
    assert place.here.lag(again) == 0
    assert committed(place.kafka, group, place.topics.events) == before
    assert (
        committed(place.kafka, group_of(place.topics, again.generation), place.topics.events) == {}
    )


def test_other_stream_sizes_equal_the_oracle(place: Place) -> None:
    place.produce(3_000)
    other = place.fresh(OTHER_SIZES)
    place.build(other, ReplayRequest(batch_max=77))
    assert_equals_oracle(other, place.kafka, place.topics, place.sent)


def test_a_replay_beside_live_traffic_and_then_followed_misses_nothing(place: Place) -> None:
    place.produce(4_000)
    again = place.fresh()
    with running(place.kafka, place.topics, place.live) as live:
        live.wait("events_total", 100)
        place.build(again)
        place.produce(2_000)
        place.catch_up(again)
    place.catch_up()
    assert everything(again) == everything(place.live)
    assert_equals_oracle(again, place.kafka, place.topics, place.sent)


class StopAfter(threading.Event):
    """Set once it was asked so many times: between two micro-batches, every time another two."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.left = times

    def is_set(self) -> bool:
        """Count down."""
        self.left -= 1
        if self.left < 0:
            self.set()
        return super().is_set()


def test_paused_again_and_again_it_goes_on_where_it_was(place: Place) -> None:
    place.produce(5_000)
    place.catch_up()
    again = place.fresh()
    records, runs = 0, 0
    while True:
        report = place.replay(again, ReplayRequest(batch_max=300)).run(StopAfter(5))
        records, runs = records + report.num_records, runs + 1
        if not report.num_missing:
            break
        assert runs < 50
    assert runs > 3
    # A pause brings every bucket's checkpoint up: nothing is read twice.
    assert records == len(place.sent)
    assert everything(again) == everything(place.live)


def test_killed_at_any_moment_it_resumes_exactly(stack: LocalStack, place: Place) -> None:
    place.produce(22_000)
    place.catch_up()
    again = place.fresh()
    # Slow enough that a kill finds it in the middle, whatever the machine.
    command = [sys.executable, "-m", "compose.cli", "replay", "--into", f"g{again.generation}"]
    command += ["--rate", "5000"]
    environment = worker_environment(stack, place.topics, again)
    source = random.Random(11)
    client = place.live.client

    def num_scripts() -> int:
        return int(client.info("commandstats")["cmdstat_evalsha"]["calls"])

    for _ in range(4):
        before, more = num_scripts(), source.randrange(1, 700)
        process = stack.spawn("replay", command, env=environment)
        until(lambda b=before, m=more: num_scripts() >= b + m, what=process.log)
        os.kill(process.pid, signal.SIGKILL)
        stack.stop("replay")
    assert place.here.lag(again) > 0, "no kill was in the middle"
    place.build(again)
    assert everything(again) == everything(place.live)


def everything_kept(lake: Path, *, origin: str) -> ReplayRequest:
    """Return a request under a cap that nobody reaches: the live generation has all its chunks."""
    return ReplayRequest(origin=origin, lake=lake, waiting_chunks_max=10_000)


def test_from_the_lake_then_kafka_none_twice(place: Place, tmp_path: Path) -> None:
    place.produce(6_000)
    place.sink(tmp_path)
    place.produce(3_000)
    place.catch_up()
    again = place.fresh()
    report = place.build(again, everything_kept(tmp_path, origin="lake"))
    assert report.num_duplicates > 0
    assert everything(again) == everything(place.live)
    # What no generation could take never got into the lake.
    never = [
        one for one in place.sent[:6_000] if one.event is None and b"teleport" not in one.value
    ]
    assert report.num_records == len(place.sent) - len(never)


def test_what_retention_took_comes_from_the_lake(place: Place, tmp_path: Path) -> None:
    place.produce(3_000)
    place.sink(tmp_path)
    place.produce(1_000)
    place.catch_up()
    lows = dict.fromkeys(end_offsets(place.kafka, place.topics.events), 400)
    forget_before(place, lows)
    for origin in ("earliest", "lake"):
        again = place.fresh()
        place.build(again, everything_kept(tmp_path, origin=origin))
        assert everything(again) == everything(place.live)


def test_a_hole_between_lake_and_kafka_is_named(place: Place, tmp_path: Path) -> None:
    place.produce(900)
    place.sink(tmp_path)
    place.produce(900)
    lake_end = next_offset(tmp_path, place.topics.events, 1)
    assert lake_end is not None
    forget_before(place, {1: lake_end + 5})
    with pytest.raises(LogHoleError, match="Partition 1 ") as caught:
        place.build(place.fresh(), ReplayRequest(lake=tmp_path))
    assert (caught.value.lake_end, caught.value.low) == (lake_end, lake_end + 5)
    with pytest.raises(LogHoleError, match="Partition 1 "):
        place.build(place.fresh(), ReplayRequest())


def test_retention_that_overtakes_a_replay_is_made_up_for(place: Place, tmp_path: Path) -> None:
    """Offsets vanish between two micro-batches; the reader turns to the lake and comes back."""
    place.produce(6_000)
    place.sink(tmp_path)
    ends = end_offsets(place.kafka, place.topics.events)
    log = EventLog(kafka=place.kafka, topic=place.topics.events, lake=tmp_path)
    positions = dict.fromkeys(ends, 0)
    batches = log.batches(positions, ends, SMALL, batch_max=50)
    offsets = [e.position for e in events_of(next(batches))]
    forget_before(place, {p: end - 10 for p, end in ends.items()})
    for batch in batches:
        offsets += [event.position for event in events_of(batch)]
    assert len(offsets) == len(set(offsets))
    events = [one for one in place.sent if one.event and one.event.action != "impression"]
    assert len(offsets) == len(events)


def test_a_resume_with_other_parameters_is_refused(place: Place) -> None:
    place.produce(500)
    again = place.fresh()
    place.build(again)
    with pytest.raises(GenerationError, match=r"--from earliest.*--from earliest --to 5.*drop"):
        place.build(again, ReplayRequest(to_ms=5))
    with pytest.raises(GenerationError, match="--from lake"):
        place.build(again, ReplayRequest(origin="lake"))
    with pytest.raises(GenerationError, match="2 users"):
        place.build(again, ReplayRequest(users=frozenset({1, 2})))
    with pytest.raises(SchemaMismatchError, match="was built with"):
        place.build(StateStore(again.client, again.generation, OTHER_SIZES))
    assert place.build(again).num_records == 0


def test_generations_of_workers_and_the_live_one_are_refused(place: Place) -> None:
    place.produce(200)
    place.catch_up()
    with pytest.raises(GenerationError, match="kept by its workers"):
        place.build(place.live)
    place.here.promote(place.live.generation)
    with pytest.raises(GenerationError, match="is live"):
        place.build(place.live)


def test_chosen_users_only(place: Place) -> None:
    place.produce(4_000)
    place.catch_up()
    live = everything(place.live)
    chosen = frozenset(sorted(live.rows)[:7])
    some = place.fresh()
    place.build(some, ReplayRequest(users=chosen))
    assert everything(some).rows == {user: live.rows[user] for user in chosen}
    assert place.here.lag(some) == 0
    with pytest.raises(GenerationError, match="partial"):
        place.here.promote(some.generation)
    with pytest.raises(GenerationError, match="takes no worker"):
        Generations(some.client).refuse_some_users(some.generation)


def test_from_a_time_to_a_time(place: Place, tmp_path: Path) -> None:
    """Records are judged by their append time, in the lake as in Kafka."""
    place.produce(900)
    bounds, times = [], []
    for _ in range(2):
        last = max(append_times(place))
        until(lambda t=last: now_ms() > t, what="another millisecond")
        times.append(last + 1)
        bounds.append(end_offsets(place.kafka, place.topics.events))
        place.produce(900)
    place.sink(tmp_path)
    for lake in (None, tmp_path):
        store = place.fresh()
        request = ReplayRequest(origin="time", from_ms=times[0], to_ms=times[1], lake=lake)
        report = place.build(store, request)
        assert report.num_records == 900
        checkpoints = store.read_checkpoints(0, list(bounds[0]))
        assert {p: set(held) for p, held in checkpoints.items()} == {
            p: {end} for p, end in bounds[1].items()
        }
        with pytest.raises(GenerationError, match="partial"):
            place.here.promote(store.generation)


def test_a_rate_is_kept(place: Place) -> None:
    place.produce(600)
    report = place.build(place.fresh(), ReplayRequest(rate=400))
    assert report.num_records == 600
    assert report.seconds > 0.9 * 600 / 400


def test_a_generation_of_another_log_is_refused(
    place: Place, kafka: KafkaConfig, topics: Topics
) -> None:
    place.produce(300)
    again = place.fresh()
    place.build(again)
    empty = Topics(f"{topics.prefix}x")
    ensure_topics(kafka, empty.specs(3))
    built = Generations(again.client).built(again.generation)
    assert built is not None
    other = replace(place, here=replace(place.here, topics=empty))
    with pytest.raises(GenerationError, match=r"from t.*asks for"):
        other.build(again)
    # Even where the topic has the same name: it was deleted and made again.
    record = msgspec.structs.replace(built, topic=empty.events)
    again.client.set(built_key(again.generation), msgspec.json.encode(record))
    with pytest.raises(GenerationError, match="built from another log"):
        other.build(again)


def forget_before(place: Place, offsets: dict[int, int]) -> None:
    """Delete the beginnings of partitions, as retention does."""
    admin = AdminClient({"bootstrap.servers": place.kafka.bootstrap})
    places = [TopicPartition(place.topics.events, p, at) for p, at in offsets.items()]
    for future in admin.delete_records(places).values():
        future.result()
    lows = {p: low for p, (low, _) in watermarks(place.kafka, place.topics.events).items()}
    assert {p: lows[p] for p in offsets} == offsets


def events_of(batch: MicroBatch) -> list[Accepted]:
    """Return a micro-batch's events."""
    return [event for events in batch.by_user.values() for event in events]


def append_times(place: Place) -> list[int]:
    """Return every record's append time."""
    return [message.timestamp()[1] for message in read_all(place.kafka, place.topics.events)]
