"""The log goes on in another topic: states stay those of the oracle, whoever reads and whenever.

Real broker and Redis; duplicates, late events, impressions and garbage lie on both sides.
"""

from __future__ import annotations

import itertools
from threading import Event
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient

from features.errors import StoreUnavailableError
from features.lake import list_files, log_topics, read_accepted
from streams.audit import audit
from streams.chain import known_chain, recorded_chain, write_chain
from streams.compare import compare_generations
from streams.effects import Effects
from streams.errors import OutOfStepError, RepartitionError, RepartitionUnfinishedError
from streams.event_log import EventLog
from streams.kafka import end_offsets, make_producer, partition_count
from streams.lake_chain import LogSink
from streams.processor import Processor
from streams.repartition import num_late
from streams.replay import ReplayRequest
from tests.conftest import SMALL
from tests.repartition.records import batch_of, record
from tests.waiting import until
from tests.worker.running import running
from tests.worker.traffic import assert_holds

if TYPE_CHECKING:
    from pathlib import Path

    from streams.micro_batch import MicroBatch
    from streams.processor import Report
    from tests.repartition.conftest import Log


@pytest.mark.parametrize("num_partitions", [5, 2])
def test_workers_go_over_and_states_are_exact(log: Log, num_partitions: int) -> None:
    """Two workers run throughout; more partitions than before, and fewer."""
    log.produce(8_000, source=0)
    with (
        running(log.kafka, log.topics, log.live) as first,
        running(log.kafka, log.topics, log.live) as second,
    ):
        both = first, second
        until(lambda: any(one.counted("events_total") for one in both), what="one has begun")
        report = log.repartition(num_partitions)
        log.produce(8_000, source=1)
        log.wait(first, second)
        log.produce(5_000, source=1)
        log.wait(first, second)
    assert report.new == log.topics.at(1).events
    assert partition_count(log.kafka, report.new) == num_partitions
    log.assert_exact()
    log.assert_nothing_lost()


def test_a_worker_that_starts_afterwards_completes_the_old_topic_first(log: Log) -> None:
    log.produce(4_000, source=0)
    log.repartition(4)
    log.produce(4_000, source=1)
    with running(log.kafka, log.topics, log.live, batch_max=300) as worker:
        log.wait(worker)
        garbage = sum(one.event is None for one in log.sent)
        reasons = ("malformed", "wrong_type", "unknown_action")
        sent = sum(worker.counted("dead_letters_total", reason=reason) for reason in reasons)
    assert sent == garbage
    log.assert_exact()


def test_workers_share_what_is_missing_of_the_old_topic(log: Log) -> None:
    log.produce(12_000, source=0)
    log.repartition(4)
    log.produce(4_000, source=1)
    with (
        running(log.kafka, log.topics, log.live) as first,
        running(log.kafka, log.topics, log.live) as second,
    ):
        log.wait(first, second)
    log.assert_exact()


def test_redis_away_while_the_old_topic_is_completed(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was read and could not be written is read again, not passed over."""
    log.produce(9_000, source=0)
    log.repartition(4)
    apply_batch, calls = Effects.apply_batch, itertools.count()

    def fails_now_and_then(self: Effects, batch: MicroBatch) -> Report:
        if next(calls) in {0, 3, 10}:
            raise StoreUnavailableError("away, for the test")
        return apply_batch(self, batch)

    monkeypatch.setattr(Effects, "apply_batch", fails_now_and_then)
    monkeypatch.setattr(EventLog.batches, "__kwdefaults__", {"keep": None, "batch_max": 500})
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        # How many batches there are is the broker's choice.
        assert worker.counted("store_pauses_total") > 0
    log.assert_exact()


def test_a_worker_that_meets_another_at_the_old_topic_gives_way(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is still reading it refuses the other's writes; neither ends, nothing is doubled."""
    log.produce(9_000, source=0)
    log.repartition(4)
    log.produce(500, source=1)
    apply_batch, calls = Effects.apply_batch, itertools.count()

    def meets_another(self: Effects, batch: MicroBatch) -> Report:
        if next(calls) == 1:
            other = Processor(log.live, SMALL, source=0, num_partitions=3)
            other.assign(range(3))
            other.apply(batch)
        return apply_batch(self, batch)

    monkeypatch.setattr(Effects, "apply_batch", meets_another)
    monkeypatch.setattr(EventLog.batches, "__kwdefaults__", {"keep": None, "batch_max": 500})
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        assert worker.counted("refused_writes_total") > 0
    log.assert_exact()


def test_the_old_topic_can_be_deleted_once_the_lake_has_it(log: Log, tmp_path: Path) -> None:
    log.produce(1_500, source=0)
    log.repartition(4)
    log.produce(500, source=1)
    LogSink(log.kafka, log.topics, tmp_path).run(Event(), until_end=True)
    by_user = log.accepted()
    admin = AdminClient({"bootstrap.servers": log.kafka.bootstrap})
    for deleted in admin.delete_topics([log.topics.events]).values():
        deleted.result(60)
    with running(log.kafka, log.topics, log.live, lake=tmp_path) as worker:
        log.wait(worker)
    again, _ = log.replay(ReplayRequest(lake=tmp_path))
    from_lake, _ = log.replay(ReplayRequest(origin="lake", lake=tmp_path))
    for store in (log.live, again, from_lake):
        assert_holds(store, by_user)
    LogSink(log.kafka, log.topics, tmp_path).run(Event(), until_end=True)
    assert num_late(log.kafka, log.topics, known_chain(log.kafka, log.topics)) == {}
    assert log.command().move_late() == 0


def test_replays_and_lake_and_audit_read_all_topics(log: Log, tmp_path: Path) -> None:
    log.produce(4_000, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        LogSink(log.kafka, log.topics, tmp_path).run(Event(), until_end=True)
        log.repartition(4)
        log.produce(3_000, source=1)
        log.repartition(2)
        log.produce(3_000, source=2)
        log.wait(worker)
    LogSink(log.kafka, log.topics, tmp_path).run(Event(), until_end=True)
    assert log_topics(tmp_path, log.topics.events) == [log.topics.at(n).events for n in range(3)]
    earliest, report = log.replay()
    from_lake, _ = log.replay(ReplayRequest(origin="lake", lake=tmp_path))
    assert report.num_missing == 0
    log.assert_exact(log.live, earliest, from_lake)
    logs = log.here.logs(lake=tmp_path)
    found = audit(logs, log.live, None, num_users=100_000)
    assert (found.num_wrong, found.num_users > 200) == (0, True)
    partitions = {one.source: one.end_offsets() for one in logs}
    result = compare_generations(log.live, from_lake, lambda _: True, partitions)
    assert result.is_equal
    assert result.num_equal == found.num_users
    columns = read_accepted(tmp_path, log.topics.events, SMALL)
    rows = sum(len(events) for events in log.accepted().values())
    assert 0 < columns["user_id"].size <= rows


def test_a_lake_sink_that_runs_goes_over(log: Log, tmp_path: Path) -> None:
    from threading import Thread  # noqa: PLC0415 - only here

    log.produce(1_000, source=0)
    stop = Event()
    sink = LogSink(log.kafka, log.topics, tmp_path, flush_s=0.2)
    thread = Thread(target=sink.run, args=(stop,))
    thread.start()
    try:
        until(lambda: bool(list_files(tmp_path, log.topics.events)), what="the sink has begun")
        log.repartition(4)
        log.produce(1_000, source=1)
        topic = log.topics.at(1).events
        ends = end_offsets(log.kafka, topic)
        until(
            lambda: (
                {f.partition: f.end + 1 for f in list_files(tmp_path, topic)}
                == {p: end for p, end in ends.items() if end}
            ),
            what="the new topic is in the lake",
        )
    finally:
        stop.set()
        thread.join(30)
    ended = known_chain(log.kafka, log.topics).retired[0].end_offsets
    held = {f.partition: f.end + 1 for f in list_files(tmp_path, log.topics.events)}
    assert held == {partition: end for partition, end in ended.items() if end}


def test_what_comes_late_into_the_old_topic_is_shown_and_moved_once(log: Log) -> None:
    log.produce(1_000, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        log.repartition(4)
        log.produce(500, source=1)
        log.produce(300, source=0)
        chain = known_chain(log.kafka, log.topics)
        assert num_late(log.kafka, log.topics, chain) == {log.topics.events: 300}
        assert log.command().move_late() == 300
        assert log.command().move_late() == 0
        assert num_late(log.kafka, log.topics, chain) == {log.topics.events: 0}
        log.wait(worker)
    assert log.num_moved(1) == 300
    log.assert_exact()
    log.assert_nothing_lost()


def crash(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("step", ["_create", "_seal", "_mark_moved", "_move_from"])
def test_killed_before_any_step_the_command_goes_on(
    log: Log, step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash is an exception where the next step would begin: nothing after it happens."""
    log.produce(1_500, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        with monkeypatch.context() as patched:
            patched.setattr("streams.repartition.Repartition." + step, crash)
            with pytest.raises(KeyboardInterrupt):
                log.repartition(4)
        # Producers know of nothing yet.
        log.produce(700, source=0)
        with pytest.raises(RepartitionError, match="--partitions 4"):
            log.repartition(5)
        with pytest.raises(RepartitionUnfinishedError, match="--partitions 4"):
            log.replay()
        log.repartition(4)
        log.produce(700, source=1)
        log.command().move_late()
        log.wait(worker)
    log.assert_exact()
    log.assert_nothing_lost()
    assert log.repartition(4).old is None


def test_a_worker_that_starts_behind_the_seals_still_meets_them(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint never passes a seal: whoever reads on there has to be stopped by it again."""
    log.produce(1_000, source=0)
    batches = "micro_batch_events_count"
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        before = worker.counted(batches)
        with monkeypatch.context() as patched:
            patched.setattr("streams.repartition.Repartition._mark_moved", crash)
            with pytest.raises(KeyboardInterrupt):
                log.repartition(4)
        worker.wait(batches, before + 1)
    log.produce(300, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        worker.wait(batches, 1)
        assert log.repartition(4).num_moved == 300
        log.wait(worker)
    log.assert_exact()
    log.assert_nothing_lost()


def test_killed_before_the_chain_is_told_the_same_ends_are_found_again(
    log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    log.produce(1_000, source=0)
    calls = []

    def crash_second(*args: object) -> None:
        calls.append(args)
        if len(calls) > 1:
            raise KeyboardInterrupt
        write_chain(*args)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr("streams.repartition.write_chain", crash_second)
        with pytest.raises(KeyboardInterrupt):
            log.repartition(4)
    sealed_ends = end_offsets(log.kafka, log.topics.events)
    log.produce(200, source=0)
    assert log.repartition(4).num_moved == 200
    assert known_chain(log.kafka, log.topics).retired[0].end_offsets == {
        partition: end - 1 for partition, end in sealed_ends.items()
    }
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    log.assert_exact()
    log.assert_nothing_lost()


def test_redis_goes_back_to_before_the_switch(log: Log) -> None:
    """What it lacks of the old topic is applied before the new topic goes on."""
    log.produce(2_000, source=0)
    client = log.live.client
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    log.produce(2_000, source=0)
    dumped = {key: client.dump(key) for key in client.keys("*")}
    log.repartition(4)
    log.produce(1_000, source=1)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        client.flushall()
        for key, value in dumped.items():
            client.restore(key, 0, value)
        log.produce(1_000, source=1)
        log.wait(worker)
        assert worker.counted("refused_writes_total") > 0
    log.assert_exact()


def test_a_redis_from_before_the_switch_refuses_the_first_write(log: Log) -> None:
    """Also in a bucket that had no event of the new topic yet, and no idle checkpoint."""
    client, partitions = log.live.client, range(3)
    old = Processor(log.live, SMALL, source=0, num_partitions=3)
    old.assign(partitions)
    old.apply(batch_of(record(0)))
    dumped = {key: client.dump(key) for key in client.keys("*")}
    old.apply(batch_of(record(1)))
    old.advance_idle(dict.fromkeys(partitions, 2))
    new = Processor(log.live, SMALL, source=1, num_partitions=3)
    new.assign(partitions)
    new.begin(partitions)
    client.flushall()
    for key, value in dumped.items():
        client.restore(key, 0, value)
    with pytest.raises(OutOfStepError):
        new.apply(batch_of(record(0), source=1))


def test_a_foreign_record_without_key_seals_nothing(log: Log) -> None:
    producer = make_producer(log.kafka)
    producer.produce(log.topics.events, value=None, headers=[("other", b"1")], partition=0)
    assert not producer.flush(60)
    log.produce(300, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        until(lambda: worker.errors or log.here.lag(log.live) == 0, what="applied")
    assert recorded_chain(log.kafka, log.topics) is not None
    assert known_chain(log.kafka, log.topics).current == 0
