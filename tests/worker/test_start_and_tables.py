"""What a worker checks before its first record, and the tables it keeps beside the state."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from features.catalogue import Item
from features.errors import SchemaMismatchError, StoreUnavailableError
from features.events import Event, domain_hash, encode_event
from features.redis import CatalogueStore, Pointers, StateStore, connect
from streams.control import read_pointers, write_pointers
from streams.errors import TopicMissingError
from streams.kafka import make_producer
from streams.publish import publish_items
from streams.topics import Topics
from tests.waiting import until
from tests.worker.running import running, wait_caught_up

if TYPE_CHECKING:
    import redis

    from streams.kafka import KafkaConfig

NOWHERE = "127.0.0.1:9"


def test_a_generation_with_other_rules_is_refused(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    with running(kafka, topics, store):
        pass
    other = StateStore(store.client, store.generation, replace(store.config, recent=9))
    with (
        pytest.raises(SchemaMismatchError, match=f"g{store.generation} was built with"),
        running(kafka, topics, other),
    ):
        pass
    assert CatalogueStore(store.client).recorded_config(store.generation) == store.config


def test_absent_servers_and_topics_are_named(
    kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    nobody = StateStore(connect(f"redis://{NOWHERE}/0"), 1, store.config)
    with pytest.raises(StoreUnavailableError, match="pinging"), running(kafka, topics, nobody):
        pass
    with (
        pytest.raises(TopicMissingError, match=r"absent\.control"),
        running(kafka, Topics("absent"), store),
    ):
        pass


def test_items_reach_the_catalogue_and_tombstones_withdraw(
    kafka: KafkaConfig, topics: Topics, store: StateStore, catalogue: CatalogueStore
) -> None:
    items = [
        Item(item_id=1, name="tea", categories=("drinks", "hot")),
        Item(item_id=2, name="gone", available=False),
        Item(item_id=2**63 - 1, name="Brötchen", original_id="b-7"),
    ]
    publish_items(kafka, topics, items, progress=False)
    producer = make_producer(kafka)
    with running(kafka, topics, store) as worker:
        worker.wait("items_total", 3)
        assert catalogue.get_items([1, 2, 2**63 - 1, 5]) == [*items, None]
        assert catalogue.withdrawn() == {2}
        producer.produce(topics.items, None, b"1")
        producer.produce(topics.items, b"not an item", b"4")
        producer.produce(topics.items, None, b"no number")
        producer.produce(topics.items, b'{"item_id":2,"name":"back"}', b"2")
        assert not producer.flush(30)
        until(lambda: catalogue.withdrawn() == {1})
        worker.wait("dead_letters_total", 2, reason="malformed_item")
    assert catalogue.get_items([2]) == [Item(item_id=2, name="back")]


def test_domains_are_remembered(
    kafka: KafkaConfig, topics: Topics, store: StateStore, catalogue: CatalogueStore
) -> None:
    domains = ["home", "käse & brot", "x" * 500]
    producer = make_producer(kafka)
    for number, domain in enumerate([*domains, "home"]):
        event = Event(
            event_id=f"e{number}",
            user_id=1,
            item_id=1,
            action="click",
            event_time_ms=1_000,
            domain=domain,
        )
        producer.produce(topics.events, encode_event(event), b"1")
    assert not producer.flush(30)
    with running(kafka, topics, store) as worker:
        wait_caught_up(kafka, topics, worker)
    assert catalogue.get_domains() == {domain_hash(domain): domain for domain in domains}


def test_pointers_are_read_back_and_the_newest_wins(kafka: KafkaConfig, topics: Topics) -> None:
    assert read_pointers(kafka, topics) is None
    for pointers in (Pointers(None, 1), Pointers(3, 1), Pointers(4, 2)):
        write_pointers(kafka, topics, pointers)
        assert read_pointers(kafka, topics) == pointers


def test_a_start_restores_pointers_that_redis_lost(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    catalogue: CatalogueStore,
    redis_client: redis.Redis,
) -> None:
    write_pointers(kafka, topics, Pointers(7, store.generation))
    for older in (None, Pointers(6, 1)):
        redis_client.delete("moveline:pointers")
        if older is not None:
            catalogue.put_pointers(older)
        with running(kafka, topics, store):
            until(lambda: catalogue.get_pointers() == Pointers(7, store.generation))


def test_without_a_publication_pointers_in_redis_stay(
    kafka: KafkaConfig, topics: Topics, store: StateStore, catalogue: CatalogueStore
) -> None:
    catalogue.put_pointers(Pointers(2, 1))
    with running(kafka, topics, store) as worker:
        until(lambda: worker.worker.metrics.lag.collect()[0].samples, what="assigned")
    assert catalogue.get_pointers() == Pointers(2, 1)
