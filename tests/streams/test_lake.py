"""The lake sink against a real broker: killed, doubled, fed with rubbish, cut off.

Goal: whatever happens, the lake is a prefix of the log: every event once, in order, and what
cannot be so is an error that names the offsets.
"""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient

from features import oracle
from features.config import StateConfig
from features.errors import LakeBusyError, LakeError, Reason
from features.events import CONTENT_TYPE_HEADER, MSGPACK_TYPE, Event, decode_event, encode_event
from features.lake import (
    BLOCK_OFFSETS,
    TRAINING_COLUMNS,
    list_files,
    read_accepted,
    read_events,
)
from features.lake_lock import locked
from streams import lake_file
from streams.errors import LogHoleError, LogTruncatedError, TopicMissingError
from streams.kafka import KafkaConfig, TopicPartition, make_producer, watermarks
from streams.lake import LakeSink
from streams.lake_file import LakeRow, Partition
from streams.micro_batch import Record, sort_records
from streams.producer import EventProducer
from streams.publish import publish_events
from tests.streams.support import NOWHERE, START_MS, make_event, read_all, wait_until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from streams.topics import Topics

ROOT = Path(__file__).resolve().parents[2]


def publish(config: KafkaConfig, topics: Topics, events: Iterable[Event]) -> None:
    """Every event is in the log."""
    with EventProducer(config, topics.events) as producer:
        publish_events(producer, events, progress=False)


def lake_rows(root: Path, topic: str) -> list[tuple[int, int, str]]:
    """Return (partition, offset, event_id) of every event, in the order of the files."""
    return [
        (file.partition, offset, event_id)
        for file, table in read_events(root, topic)
        for offset, event_id in zip(
            table["offset"].to_pylist(), table["event_id"].to_pylist(), strict=True
        )
    ]


def log_rows(config: KafkaConfig, topics: Topics) -> list[tuple[int, int, str]]:
    """Return the same of the log."""
    return [
        (message.partition(), message.offset(), decode_event(message.value()).event_id)
        for message in read_all(config, topics.events)
    ]


@pytest.mark.servers
def test_the_lake_is_the_log(config: KafkaConfig, topics: Topics, tmp_path: Path) -> None:
    events = [
        make_event(number, dwell_ms=number, value=number / 2, request_id=f"r{number}", position=3)
        for number in range(1_000)
    ]
    publish(config, topics, events)
    sink = LakeSink(config, topics.events, tmp_path)
    report = sink.run(until_end=True)
    assert report.num_rows == 1_000
    assert report.ends == {n: high for n, (_, high) in watermarks(config, topics.events).items()}
    assert lake_rows(tmp_path, topics.events) == log_rows(config, topics)
    found = [
        Event(**{name: row[name] for name in Event.__struct_fields__ if name in row})
        for _, table in read_events(tmp_path, topics.events)
        for row in table.to_pylist()
    ]
    assert sorted(found, key=lambda event: event.event_time_ms) == events
    assert sink.run(until_end=True).num_rows == 0


@pytest.mark.servers
def test_a_sink_killed_at_any_moment_loses_and_doubles_nothing(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    dice = random.Random(7)
    command = [sys.executable, str(Path(__file__).with_name("sink_child.py"))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for kill in range(6):
        publish(config, topics, map(make_event, range(kill * 5_000, kill * 5_000 + 5_000)))
        num_before = len(list_files(tmp_path, topics.events))
        child = subprocess.Popen(
            [*command, config.bootstrap, topics.events, str(tmp_path)], env=environment
        )
        try:
            if kill:  # the first one dies whenever it has got so far, start-up included
                num_more = dice.randint(0, 4)
                wait_until(
                    lambda n=num_before + num_more: len(list_files(tmp_path, topics.events)) >= n
                )
            threading.Event().wait(dice.uniform(0, 0.05))
        finally:
            child.kill()
            child.wait()
    LakeSink(config, topics.events, tmp_path).run(until_end=True)
    rows = lake_rows(tmp_path, topics.events)
    assert rows == log_rows(config, topics)
    assert {event_id for _, _, event_id in rows} == {f"e{number}" for number in range(30_000)}
    assert len(rows) == 30_000


@pytest.mark.servers
def test_sinks_at_the_same_time_share_the_work(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    stop = threading.Event()
    reports = []

    def sink(flush_s: float) -> None:
        reports.append(LakeSink(config, topics.events, tmp_path, flush_s=flush_s).run(stop))

    threads = [threading.Thread(target=sink, args=(flush_s,)) for flush_s in (0.0, 0.02, 0.05)]
    for thread in threads:
        thread.start()
    for first in range(0, 20_000, 2_000):
        publish(config, topics, map(make_event, range(first, first + 2_000)))
    stop.set()
    for thread in threads:
        thread.join()
    LakeSink(config, topics.events, tmp_path).run(until_end=True)
    assert lake_rows(tmp_path, topics.events) == log_rows(config, topics)
    assert len(reports) == 3
    assert sum(report.num_rows for report in reports) <= 20_000


@pytest.mark.servers
def test_stopping_writes_what_was_read(config: KafkaConfig, topics: Topics, tmp_path: Path) -> None:
    publish(config, topics, map(make_event, range(100)))
    stop = threading.Event()
    reports = []
    sink = LakeSink(config, topics.events, tmp_path, flush_s=0.1)
    thread = threading.Thread(target=lambda: reports.append(sink.run(stop)))
    thread.start()
    wait_until(lambda: bool(list_files(tmp_path, topics.events)))
    stop.set()
    thread.join()
    ends = {file.partition: file.end + 1 for file in list_files(tmp_path, topics.events)}
    assert {number: end for number, end in reports[0].ends.items() if end} == ends


@pytest.mark.servers
def test_what_is_no_event_is_skipped_counted_and_covered(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    good = make_event(1, user_id=1)
    value = encode_event(good)
    producer = make_producer(config)
    headers = [(CONTENT_TYPE_HEADER, MSGPACK_TYPE)]
    for key, body in (
        (b"1", value),
        (b"1", b"{"),
        (b"2", value),
        (b"1", b'{"event_id":"x"}'),
        (b"1", None),
        (b"1", value),
        (b"1", b"x" * 20_000),
        (b"-1", encode_event(make_event(1, user_id=-1))),
    ):
        producer.produce(topics.events, body, key, partition=2)
    producer.produce(
        topics.events, encode_event(good, msgpack=True), b"1", partition=2, headers=headers
    )
    producer.produce(topics.events, b"\xff", b"1", partition=2)
    assert producer.flush(30) == 0
    report = LakeSink(config, topics.events, tmp_path).run(until_end=True)
    assert (report.num_rows, report.num_invalid) == (3, 7)
    assert report.invalid == {
        Reason.MALFORMED: 3,
        Reason.KEY_MISMATCH: 1,
        Reason.WRONG_TYPE: 1,
        Reason.TOO_LARGE: 1,
        Reason.ID_OUT_OF_RANGE: 1,
    }
    (file,) = list_files(tmp_path, topics.events)
    assert (file.partition, file.start, file.end) == (2, 0, 9)
    assert [row[1] for row in lake_rows(tmp_path, topics.events)] == [0, 5, 8]


@pytest.mark.servers
def test_odd_but_valid_events_do_not_stop_the_sink(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    strange = [make_event(1, value=-3e38), make_event(2, domain="\x00ä"), make_event(3, domain="")]
    publish(config, topics, strange)
    producer = make_producer(config)
    odd = b'{"event_id":"","user_id":4,"item_id":4,"action":"","event_time_ms":0,"position":%d}'
    producer.produce(topics.events, odd % 2**70, b"4")
    assert producer.flush(30) == 0
    report = LakeSink(config, topics.events, tmp_path).run(until_end=True)
    assert report.num_rows + report.num_invalid == 4
    assert len(lake_rows(tmp_path, topics.events)) == report.num_rows >= 3


@pytest.mark.servers
def test_transactions_leave_no_hole(config: KafkaConfig, topics: Topics, tmp_path: Path) -> None:
    """Aborted records and markers take offsets that no reader is ever handed."""
    transactional = KafkaConfig(config.bootstrap, {"transactional.id": topics.prefix})
    producer = make_producer(transactional, delivery_timeout_ms=30_000)
    producer.init_transactions(30)
    for number, committed in enumerate((True, False, True, False)):
        producer.begin_transaction()
        event = make_event(number, user_id=1)
        producer.produce(topics.events, encode_event(event), b"1", partition=0)
        producer.flush(30)
        if committed:
            producer.commit_transaction(30)
        else:
            producer.abort_transaction(30)
    end = watermarks(config, topics.events)[0][1]
    report = LakeSink(config, topics.events, tmp_path).run(until_end=True)
    assert [row[2] for row in lake_rows(tmp_path, topics.events)] == ["e0", "e2"]
    assert report.ends[0] == end == 8
    assert list_files(tmp_path, topics.events)[-1].end == end - 1


@pytest.mark.servers
def test_a_hole_is_named(config: KafkaConfig, topics: Topics, tmp_path: Path) -> None:
    publish(config, topics, (make_event(number, user_id=1) for number in range(100)))
    sink = LakeSink(config, topics.events, tmp_path)
    sink.run(until_end=True)
    publish(config, topics, (make_event(number, user_id=1) for number in range(100, 200)))
    (number,) = (n for n, (_, high) in watermarks(config, topics.events).items() if high)
    place = TopicPartition(topics.events, number, 150)
    admin = AdminClient({"bootstrap.servers": config.bootstrap})
    admin.delete_records([place])[place].result()
    wait_until(lambda: watermarks(config, topics.events)[number][0] == 150)
    with pytest.raises(LogHoleError, match=r"needs is 100.*oldest is 150.*100\.\.149") as caught:
        sink.run(until_end=True)
    assert (caught.value.lake_end, caught.value.low) == (100, 150)
    fresh = LakeSink(config, topics.events, tmp_path / "new")
    assert fresh.run(until_end=True).num_rows == 50
    assert list_files(tmp_path / "new", topics.events)[0].start == 150


@pytest.mark.servers
def test_a_log_that_ends_before_the_lake_is_named(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    Partition(tmp_path, topics.events, 3, 0, 10).publish(10)
    with pytest.raises(LogTruncatedError, match="before offset 10, Kafka ends at 0"):
        LakeSink(config, topics.events, tmp_path).run(until_end=True)


@pytest.mark.servers
def test_only_the_chosen_partitions_are_written(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    publish(config, topics, map(make_event, range(200)))
    LakeSink(config, topics.events, tmp_path, partitions=[1]).run(until_end=True)
    assert {file.partition for file in list_files(tmp_path, topics.events)} == {1}
    with pytest.raises(TopicMissingError, match="partition 9"):
        LakeSink(config, topics.events, tmp_path, partitions=[9]).run(until_end=True)


def random_events(num_events: int) -> Iterator[Event]:
    """Yield events with repeats, actions outside the streams and times in the future."""
    dice = random.Random(3)
    for number in range(num_events):
        repeated = dice.random() < 0.2
        yield make_event(
            number,
            event_id=f"e{dice.randint(max(0, number - 60), number) if repeated else number}",
            user_id=dice.randint(0, 5),
            action=dice.choice(["click", "view", "purchase", "impression", "no-such-action"]),
            event_time_ms=2**42 if dice.random() < 0.05 else START_MS + number,
            domain=dice.choice([None, "a", "b"]),
            dwell_ms=dice.choice([None, 0, 500]),
            value=dice.choice([None, 2.5]),
        )


@pytest.mark.servers
def test_training_reads_from_the_lake_what_the_states_accepted(
    config: KafkaConfig, topics: Topics, tmp_path: Path
) -> None:
    publish(config, topics, random_events(3_000))
    LakeSink(config, topics.events, tmp_path, flush_s=0.01).run(until_end=True)
    rules = StateConfig(dedup_window=16)
    records = [
        Record(m.partition(), m.offset(), m.timestamp()[1], m.key(), m.value(), m.headers())
        for m in read_all(config, topics.events)
    ]
    by_user = sort_records(records, rules).by_user
    expected = [
        (
            user_id,
            event.item_id,
            event.event_time_ms,
            ordinal,
            event.action,
            event.domain,
            event.dwell_ms,
            str(event.value),
        )
        for user_id in sorted(by_user)
        for ordinal, event in oracle.accept(by_user[user_id], rules)
    ]
    columns = read_accepted(tmp_path, topics.events, rules)
    columns["value"] = columns["value"].astype(str)
    found = list(zip(*(columns[name].tolist() for name in TRAINING_COLUMNS), strict=True))
    assert found == expected
    assert len(found) < 3_000 * 0.6


def rows_of(offsets: Iterable[int]) -> list[LakeRow]:
    """Return rows at these offsets."""
    return [LakeRow(offset, START_MS, make_event(offset)) for offset in offsets]


def test_no_file_crosses_a_block(tmp_path: Path) -> None:
    start, end = BLOCK_OFFSETS - 3, 2 * BLOCK_OFFSETS + 5
    partition = Partition(tmp_path, "t", 0, start, end, rows=rows_of([start, end - 1]))
    assert partition.publish(end) == 2
    assert [(file.start, file.end) for file in list_files(tmp_path, "t")] == [
        (start, BLOCK_OFFSETS - 1),
        (BLOCK_OFFSETS, 2 * BLOCK_OFFSETS - 1),
        (2 * BLOCK_OFFSETS, end - 1),
    ]
    assert [row[1] for row in lake_rows(tmp_path, "t")] == [start, end - 1]


def test_what_another_sink_has_written_is_dropped(tmp_path: Path) -> None:
    slow = Partition(tmp_path, "t", 0, 0, 10, rows=rows_of(range(10)))
    slower = Partition(tmp_path, "t", 0, 0, 4, rows=rows_of(range(4)))
    assert Partition(tmp_path, "t", 0, 0, 6, rows=rows_of(range(6))).publish(6) == 6
    assert slow.publish(10) == 4
    assert slower.publish(4) == 0
    assert slower.next == 10
    assert [(file.start, file.end) for file in list_files(tmp_path, "t")] == [(0, 5), (6, 9)]
    assert [row[1] for row in lake_rows(tmp_path, "t")] == list(range(10))


def test_a_half_written_file_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk refuses in the middle of the second file; the next try goes on from the first."""
    Partition(tmp_path, "t", 0, 0, 5, rows=rows_of(range(5))).publish(5)

    def refuse(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    broken = Partition(tmp_path, "t", 0, 5, 9, rows=rows_of(range(5, 9)))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        with pytest.raises(OSError, match="No space"):
            broken.publish(9)
    assert (broken.folder / lake_file.PENDING_NAME).exists()
    assert [row[1] for row in lake_rows(tmp_path, "t")] == list(range(5))
    lake_file.remove_pending(broken.folder)
    assert not (broken.folder / lake_file.PENDING_NAME).exists()
    assert broken.publish(9) == 4
    assert [row[1] for row in lake_rows(tmp_path, "t")] == list(range(9))


def test_a_missing_file_stops_the_sink(tmp_path: Path) -> None:
    partition = Partition(tmp_path, "t", 0, 0, 0)
    for end in (5, 10, 15):
        partition.next = end
        partition.publish(end)
    list_files(tmp_path, "t")[1].path.unlink()
    partition.next = 20
    with pytest.raises(LakeError, match="from offset 4"):
        partition.publish(20)


def test_a_stuck_writer_is_named(tmp_path: Path) -> None:
    with (
        locked(tmp_path),
        pytest.raises(LakeBusyError, match=r"locked by another writer for 0\.1 s"),
        locked(tmp_path, timeout_s=0.1),
    ):
        pass


def test_a_block_of_different_texts_is_written(tmp_path: Path) -> None:
    rows = [
        LakeRow(n, START_MS, make_event(n, domain=f"d{n}", action=f"a{n}"))
        for n in range(BLOCK_OFFSETS)
    ]
    Partition(tmp_path, "t", 0, 0, BLOCK_OFFSETS, rows=rows).publish(BLOCK_OFFSETS)
    ((_, table),) = read_events(tmp_path, "t")
    assert table["domain"].to_pylist() == [f"d{n}" for n in range(BLOCK_OFFSETS)]


def test_constructing_a_sink_opens_nothing(tmp_path: Path) -> None:
    LakeSink(KafkaConfig(NOWHERE), "any", tmp_path / "lake")
    assert not (tmp_path / "lake").exists()
