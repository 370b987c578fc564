"""A rolling upgrade on real servers: workers of two row formats share a generation, exactly.

The second format exists in tests only (tests/second_format.py); an old build is a store that knows
the first one alone.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from features import keys
from features.errors import UnknownRowFormatError
from features.generations import Generations
from features.row import FORMATS, ROW_FORMAT, decode_row, format_of
from features.state import EMPTY_STATE, step
from tests.second_format import BOTH, NUMBER
from tests.waiting import until
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import Traffic, accepted_of, publish

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.redis import StateStore
    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.topics import Topics
    from tests.worker.running import Running


@pytest.fixture
def new(store: StateStore) -> StateStore:
    """The generation as a build with both formats sees it; `store` is the old build."""
    return replace(store, formats=BOTH)


def formats_of(store: StateStore, users: Sequence[int]) -> Counter[int]:
    """Return how many rows there are of each format."""
    rows = store.read_rows(users)
    return Counter(format_of(row, BOTH).number for row in rows if row is not None)


def assert_states(store: StateStore, by_user: Mapping[int, Sequence[Accepted]]) -> None:
    """Every row says what one step over its user's events says, whatever it is written in."""
    for user, row in zip(by_user, store.read_rows(list(by_user)), strict=True):
        assert row is not None
        found, state = decode_row(row, BOTH), step(EMPTY_STATE, by_user[user], store.config).state
        for name in ("position", "next_ordinal", "num_chunks", "num_late", "user_session", "tail"):
            assert getattr(found, name) == getattr(state, name), (user, name)
        assert found.departed == state.departed
    assert len(store.client.keys(f"moveline:*:g{store.generation}:row:*")) == len(by_user)


def wait_assigned(worker: Running) -> None:
    """Return once the worker has a partition to read."""
    until(lambda: worker.errors or worker.worker.metrics.lag.collect()[0].samples, what="assigned")


def test_an_upgrade_worker_by_worker(
    kafka: KafkaConfig, topics: Topics, store: StateStore, new: StateStore
) -> None:
    """Old and new join, the old leaves, the format changes, one goes on as before, it leaves."""
    traffic = Traffic(seed=51)
    parts = [traffic.make(2_000) for _ in range(5)]
    publish(kafka, topics.events, parts[0])
    everybody = range(traffic.num_users)
    with running(kafka, topics, store) as old:
        old.wait("events_total", 300)
        with running(kafka, topics, new) as first:
            wait_assigned(first)
            publish(kafka, topics.events, parts[1])
            first.wait("events_total", 1)
            old.end()
            wait_caught_up(kafka, topics, first)
            # All of them know the new format; nobody writes it yet.
            assert set(formats_of(store, everybody)) == {ROW_FORMAT}
            new.record_row_format(NUMBER)
            with running(kafka, topics, new) as second:
                wait_assigned(second)
                publish(kafka, topics.events, parts[2])
                second.wait("events_total", 1)
                until(lambda: len(formats_of(store, everybody)) == 2, what="both formats")
                first.end()
                publish(kafka, topics.events, parts[3])
                wait_caught_up(kafka, topics, second)
                second.end()
    # And back: rows of the new format are written as the old one again.
    both = formats_of(store, everybody)
    assert len(both) == 2
    new.record_row_format(ROW_FORMAT)
    sent = [one for part in parts[:4] for one in part]
    assert_states(store, accepted_of(kafka, topics, sent, store.config))
    publish(kafka, topics.events, parts[4])
    with running(kafka, topics, new) as third:
        wait_caught_up(kafka, topics, third)
    assert formats_of(store, everybody)[ROW_FORMAT] > both[ROW_FORMAT]
    sent += parts[4]
    by_user = accepted_of(kafka, topics, sent, store.config)
    assert_states(store, by_user)
    read = new.read_states(list(by_user), newest=new.config.recent)
    assert all(state is not None and state.records.size for state in read)


def test_an_old_worker_writes_nothing_where_it_cannot_read(
    kafka: KafkaConfig, topics: Topics, store: StateStore, new: StateStore
) -> None:
    """It ends; a newer one goes on where it was."""
    sent = Traffic(seed=52, num_users=30).make(1_500)
    publish(kafka, topics.events, sent[:700])
    new.claim_generation()
    new.record_row_format(NUMBER)
    with running(kafka, topics, new) as worker:
        wait_caught_up(kafka, topics, worker)
    with (
        pytest.raises(UnknownRowFormatError, match="format 2, this build knows 1"),
        running(kafka, topics, store) as refused,
    ):
        until(lambda: refused.errors, what="refused by the generation's record")
    # The record says otherwise, as it may after somebody has written to Redis by hand.
    new.record_row_format(ROW_FORMAT)
    publish(kafka, topics.events, sent[700:])
    before = {key: store.client.dump(key) for key in store.client.keys("moveline:{b*")}
    with (
        pytest.raises(UnknownRowFormatError, match="nothing was written"),
        running(kafka, topics, store) as refused,
    ):
        until(lambda: refused.errors, what="refused by a row")
    assert refused.counted("events_total") == 0
    assert {key: store.client.dump(key) for key in store.client.keys("moveline:{b*")} == before
    with running(kafka, topics, new) as worker:
        wait_caught_up(kafka, topics, worker)
    assert_states(store, accepted_of(kafka, topics, sent, store.config))


def test_the_record_goes_with_its_generation(store: StateStore, new: StateStore) -> None:
    store.claim_generation()
    with pytest.raises(UnknownRowFormatError, match="format 2"):
        store.record_row_format(NUMBER)
    assert store.as_recorded().row_format is FORMATS[ROW_FORMAT]
    new.record_row_format(NUMBER)
    assert new.as_recorded().row_format is BOTH[NUMBER]
    assert list(Generations(store.client).recorded()) == [store.generation]
    list(Generations(store.client).drop(store.generation))
    assert not store.client.exists(keys.row_format_key(store.generation))
