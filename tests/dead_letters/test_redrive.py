"""Dead letters can be read as they were, and sent again once: same key, same bytes, same headers.

Method: a real worker sets records aside; what a redrive puts into the events topic is read back.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest

from features.errors import Reason
from streams.dead_letters import read_letter, read_letters
from streams.errors import NoLetterError
from streams.kafka import end_offsets, make_producer
from streams.redrive import is_redriven, read_marks, redrive
from tests.streams.support import read_all
from tests.worker.running import running, wait_caught_up
from tests.worker.test_dead_letters import CASES

if TYPE_CHECKING:
    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics


@pytest.fixture
def num_cases(kafka: KafkaConfig, topics: Topics, store: StateStore) -> int:
    """Every kind of bad record, set aside by a worker."""
    producer = make_producer(kafka)
    for number, (_, key, value, headers) in enumerate(CASES):
        extra = [*headers, ("case", b"%d" % number)]
        producer.produce(topics.events, value, key, headers=extra)
    assert not producer.flush(30)
    work(kafka, topics, store)
    return len(CASES)


def work(kafka: KafkaConfig, topics: Topics, store: StateStore) -> None:
    """Let a worker read everything."""
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)


def test_letters_are_read_as_they_were_set_aside(
    kafka: KafkaConfig, topics: Topics, num_cases: int
) -> None:
    letters = list(read_letters(kafka, topics))
    assert len(letters) == num_cases
    assert {letter.reason for letter in letters} == {reason.value for reason in Reason}
    for letter in letters:
        own = dict(letter.own_headers)
        reason, key, value, headers = CASES[int(own.pop("case") or b"")]
        assert (letter.reason, letter.key, letter.value) == (reason.value, key, value)
        assert own == dict(headers)
        assert letter.source[0] == topics.events
        assert read_letter(kafka, topics, letter.partition, letter.offset) == letter


def test_a_letter_that_is_not_there_is_named(
    kafka: KafkaConfig, topics: Topics, num_cases: int
) -> None:
    for place in ((0, num_cases), (7, 0)):
        with pytest.raises(NoLetterError, match=rf"no dead letter {place[0]}:{place[1]}"):
            read_letter(kafka, topics, *place)


def test_a_redrive_keeps_key_bytes_and_headers_and_happens_once(
    kafka: KafkaConfig, topics: Topics, store: StateStore, num_cases: int
) -> None:
    before = end_offsets(kafka, topics.events)
    planned = redrive(kafka, topics, dry_run=True)
    assert sum(planned.sent.values()) == num_cases
    assert end_offsets(kafka, topics.events) == before
    report = redrive(kafka, topics)
    assert report.sent == planned.sent == Counter(case[0].value for case in CASES)
    new = [m for m in read_all(kafka, topics.events) if (m.offset() or 0) >= before[place_of(m)]]
    assert len(new) == num_cases
    for message in new:
        headers = message.headers() or []
        assert isinstance(headers, list)
        number = int(dict(headers)["case"])
        _, key, value, own = CASES[number]
        assert (message.key(), message.value()) == (key, value)
        assert headers == [*own, ("case", b"%d" % number)]
    again = redrive(kafka, topics)
    assert (sum(again.sent.values()), again.num_before) == (0, num_cases)
    # They are still no events: each comes back as a new letter, and that one can be sent again.
    work(kafka, topics, store)
    third = redrive(kafka, topics)
    assert (sum(third.sent.values()), third.num_before) == (num_cases, num_cases)


def place_of(message: object) -> int:
    """Return a record's partition."""
    return int(message.partition())  # type: ignore[attr-defined]


def test_one_reason_is_sent_and_remembered_by_itself(
    kafka: KafkaConfig, topics: Topics, num_cases: int
) -> None:
    report = redrive(kafka, topics, reason="unknown_action")
    assert report.sent == {"unknown_action": 1}
    marks = read_marks(kafka, topics)
    assert set(marks) == {"unknown_action"}
    done = [letter for letter in read_letters(kafka, topics) if is_redriven(letter, marks)]
    assert [letter.reason for letter in done] == ["unknown_action"]
    assert sum(redrive(kafka, topics).sent.values()) == num_cases - 1


def test_two_generations_letters_of_one_record_are_sent_once(
    kafka: KafkaConfig, topics: Topics, store: StateStore, num_cases: int
) -> None:
    work(kafka, topics, type(store)(store.client, store.generation + 70_000, store.config))
    assert len(list(read_letters(kafka, topics))) == 2 * num_cases
    report = redrive(kafka, topics)
    assert (sum(report.sent.values()), report.num_twins) == (num_cases, num_cases)


def test_an_empty_topic_has_nothing_to_send(kafka: KafkaConfig, topics: Topics) -> None:
    assert list(read_letters(kafka, topics)) == []
    assert redrive(kafka, topics).sent == {}
