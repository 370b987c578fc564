"""Somebody gives the events topic more partitions: refused, nothing lost, exact after the command.

Three partitions become five, so that users move between the old partitions too.
"""

from __future__ import annotations

from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING

import pytest
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewPartitions

from features.clock import now_ms
from features.events import Event as UserEvent
from features.events import encode_event
from streams.chain import current_topics, known_chain
from streams.errors import MisplacedEventError, PartitionsChangedError
from streams.kafka import make_producer, partition_count
from streams.lake_chain import LogSink
from streams.placement import partitions_of
from streams.repartition import Repartition
from streams.replay import ReplayRequest
from tests.waiting import until
from tests.worker.running import running
from tests.worker.traffic import Sent

if TYPE_CHECKING:
    from pathlib import Path

    from tests.repartition.conftest import Log

WIDER = 5


def widen(log: Log) -> None:
    """Do what an operator should not: `kafka-topics.sh --alter --partitions 5`."""
    admin = AdminClient({"bootstrap.servers": log.kafka.bootstrap})
    for done in admin.create_partitions([NewPartitions(log.topics.events, WIDER)]).values():
        done.result(60)
    until(lambda: partition_count(log.kafka, log.topics.events) == WIDER, what="the topic is wider")


SENTENCE = (
    rf"has {WIDER} partitions, the states were built from 3.*repartition --partitions {WIDER}"
)


def widened_under_a_worker(log: Log) -> None:
    """Events of both layouts wait while the worker is in the middle of the old one."""
    with running(log.kafka, log.topics, log.live, batch_max=100) as worker:
        worker.wait("events_total", 200)
        widen(log)
        log.produce(4_000, source=0)
        until(lambda: worker.errors, what="the worker refuses")


def test_a_running_worker_refuses_and_the_command_makes_it_exact(log: Log) -> None:
    log.produce(3_000, source=0)
    with pytest.raises(PartitionsChangedError, match=SENTENCE):
        widened_under_a_worker(log)
    # What it applied before is right: only whole events from where their users belong.
    with (
        pytest.raises(PartitionsChangedError, match=SENTENCE),
        running(log.kafka, log.topics, log.live) as worker,
    ):
        until(lambda: worker.errors, what="the worker refuses")
    report = log.repartition(WIDER)
    assert report.num_moved > 1_000
    log.produce(2_000, source=1)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    log.assert_exact()
    log.assert_nothing_lost()
    again, _ = log.replay()
    log.assert_exact(again)


def test_everything_else_refuses_too(log: Log, tmp_path: Path) -> None:
    log.produce(300, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    widen(log)
    with pytest.raises(PartitionsChangedError, match=SENTENCE):
        log.replay()
    with pytest.raises(PartitionsChangedError, match=SENTENCE):
        LogSink(log.kafka, log.topics, tmp_path).run(Event(), until_end=True)
    with pytest.raises(PartitionsChangedError, match=SENTENCE):
        current_topics(log.kafka, log.topics)


def test_a_lake_that_was_written_meanwhile_has_each_event_once(log: Log, tmp_path: Path) -> None:
    """The sink looks for the count now and then; what lies in the wrong place it leaves out."""
    log.produce(500, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    chain = known_chain(log.kafka, log.topics)
    widen(log)
    log.produce(500, source=0)
    sink = LogSink(log.kafka, log.topics, tmp_path)
    report = sink._run_topic(chain, 0, Event(), until_end=True, progress=False)
    assert report.invalid["misplaced"] > 20
    log.repartition(WIDER)
    sink.run(Event(), until_end=True)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    from_lake, _ = log.replay(ReplayRequest(origin="lake", lake=tmp_path))
    log.assert_exact(log.live, from_lake)
    log.assert_nothing_lost()


def test_a_producer_with_another_partitioner_is_named_and_its_events_can_be_moved(log: Log) -> None:
    log.produce(300, source=0)
    user = 10**15
    belongs = partitions_of([b"%d" % user], 3)[0]
    event = UserEvent(
        event_id="stray", user_id=user, item_id=1, action="click", event_time_ms=now_ms()
    )
    sent = Sent(b"%d" % user, encode_event(event), [], event)
    producer = make_producer(log.kafka)
    producer.produce(log.topics.events, sent.value, sent.key, partition=(belongs + 1) % 3)
    assert not producer.flush(60)
    log.sent.append(sent)
    with (
        pytest.raises(MisplacedEventError, match=rf"user {user} lies in partition.*murmur2"),
        running(log.kafka, log.topics, log.live) as worker,
    ):
        until(lambda: worker.errors, what="the worker refuses")
    with pytest.raises(MisplacedEventError, match="1 events before offsets"):
        log.replay()
    # Without a generation to say what is right, the whole topic is looked through.
    everything = replace(log.command(), live=None)
    assert isinstance(everything, Repartition)
    assert everything.run(2).num_moved == 1
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
    log.assert_exact()
    log.assert_nothing_lost()
