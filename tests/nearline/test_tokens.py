"""Goal: whoever claimed last holds the pointers, whatever a process that slept writes late.

A late write is a record in the topic such as the sleeper's own call has produced it: everything
before that call it had looked at in time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from features.errors import StaleTokenError
from features.redis import CatalogueStore, Pointers, StateStore
from streams.control import (
    POINTERS_KEY,
    claim_token,
    forget_live,
    pointers_key,
    read_pointers,
    read_records,
    were_live,
    write_pointers,
    write_records,
)
from streams.pointer_follower import PointerFollower
from tests.waiting import until
from tests.worker.running import running

if TYPE_CHECKING:
    from streams.kafka import KafkaConfig
    from streams.log_reader import LogReader
    from streams.topics import Topics


def write_late(kafka: KafkaConfig, topics: Topics, pointers: Pointers) -> None:
    """Write as somebody who saw no newer pointers when he looked."""
    write_records(kafka, topics, {pointers_key(pointers.token): msgspec.json.encode(pointers)})


def pointer_keys(kafka: KafkaConfig, topics: Topics) -> set[bytes]:
    """Return the keys of pointers that compaction would leave."""
    records = read_records(kafka, topics)
    return {key for key, value in records.items() if key.startswith(POINTERS_KEY) and value}


def test_tokens_grow_and_none_is_that_of_pointers_without_one(
    kafka: KafkaConfig, topics: Topics
) -> None:
    tokens = [claim_token(kafka, topics, "publish") for _ in range(3)]
    assert tokens == sorted(set(tokens))
    assert tokens[0] > 0


def test_a_late_write_is_followed_by_nobody(
    kafka: KafkaConfig,
    topics: Topics,
    reader: LogReader,
    catalogue: CatalogueStore,
    store: StateStore,
) -> None:
    follower = PointerFollower(reader, topics.control, catalogue)
    slept, woke = (claim_token(kafka, topics, name) for name in ("slept", "woke"))
    newer = Pointers(8, store.generation, token=woke)
    older = Pointers(7, store.generation, token=slept)
    write_pointers(kafka, topics, newer)
    assert follower.heal()
    write_late(kafka, topics, older)
    assert read_pointers(kafka, topics) == newer
    assert not follower.heal()
    with pytest.raises(StaleTokenError, match=f"token {woke}, .* older token {slept}"):
        catalogue.put_pointers(older)
    assert catalogue.get_pointers() == newer
    # Whoever starts now reads the late record last.
    catalogue.client.flushall()
    assert PointerFollower(reader, topics.control, catalogue).heal()
    assert catalogue.get_pointers() == newer
    catalogue.client.flushall()
    with running(kafka, topics, store):
        until(lambda: catalogue.get_pointers() == newer)


def test_who_comes_too_late_is_told_so_and_changes_nothing(
    kafka: KafkaConfig, topics: Topics
) -> None:
    slept, woke = (claim_token(kafka, topics, name) for name in ("slept", "woke"))
    write_pointers(kafka, topics, Pointers(8, 1, token=woke))
    before = read_records(kafka, topics)
    for late in (slept, 0):
        with pytest.raises(StaleTokenError, match=f"older token {late}"):
            write_pointers(kafka, topics, Pointers(7, 1, token=late))
    assert read_records(kafka, topics) == before


def test_compaction_leaves_the_pointers_that_hold_and_no_others(
    kafka: KafkaConfig, topics: Topics
) -> None:
    """A record that nobody follows stays until the next writer; the one that holds always does."""
    write_pointers(kafka, topics, Pointers(6, 1))
    slept, second, third = (claim_token(kafka, topics, "publish") for _ in range(3))
    write_pointers(kafka, topics, Pointers(8, 1, token=second))
    assert pointer_keys(kafka, topics) == {pointers_key(second)}
    write_late(kafka, topics, Pointers(7, 1, token=slept))
    assert pointer_keys(kafka, topics) == {pointers_key(slept), pointers_key(second)}
    write_pointers(kafka, topics, Pointers(9, 1, token=third))
    assert pointer_keys(kafka, topics) == {pointers_key(third)}


def test_pointers_from_before_tokens_are_followed_until_somebody_claims_one(
    kafka: KafkaConfig, topics: Topics, reader: LogReader, catalogue: CatalogueStore
) -> None:
    follower = PointerFollower(reader, topics.control, catalogue)
    plain = b'{"model_version":3,"generation":1,"memory_version":"00ff00ff00ff00ff"}'
    write_records(kafka, topics, {POINTERS_KEY: plain})
    old = Pointers(3, 1, "00ff00ff00ff00ff")
    assert read_pointers(kafka, topics) == old
    assert follower.heal()
    assert catalogue.get_pointers() == old
    newer = Pointers(4, 1, token=claim_token(kafka, topics, "publish"))
    write_pointers(kafka, topics, newer)
    assert follower.heal()
    assert catalogue.get_pointers() == newer


def test_redis_of_a_topic_that_lost_records_is_left_to_a_person(
    kafka: KafkaConfig, topics: Topics, reader: LogReader, catalogue: CatalogueStore
) -> None:
    held = Pointers(9, 1, token=1_000_000)
    catalogue.put_pointers(held)
    write_pointers(kafka, topics, Pointers(4, 1, token=claim_token(kafka, topics, "publish")))
    assert not PointerFollower(reader, topics.control, catalogue).heal()
    assert catalogue.get_pointers() == held


def test_what_was_live_is_known_until_it_is_forgotten(kafka: KafkaConfig, topics: Topics) -> None:
    written = []
    for version in (1, 2, 2, 3, 1):
        token = claim_token(kafka, topics, "publish")
        written.append(Pointers(version, 1, f"{version:016x}", token))
        write_pointers(kafka, topics, written[-1])
    found = were_live(read_records(kafka, topics))
    assert found == {1: written[0], 2: written[2], 3: written[3]}
    forget_live(kafka, topics, [2])
    assert sorted(were_live(read_records(kafka, topics))) == [1, 3]


def test_pointers_without_a_model_leave_none_behind(catalogue: CatalogueStore) -> None:
    """The hash is replaced, not added to."""
    catalogue.put_pointers(Pointers(5, 1, "00ff00ff00ff00ff", 3))
    catalogue.put_pointers(Pointers(None, 2, None, 4))
    assert catalogue.get_pointers() == Pointers(None, 2, None, 4)
