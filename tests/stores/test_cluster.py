"""Every store does on a Redis Cluster what it does on one server, also while slots move.

Method: three real nodes. A slot moves as operators move it: announced, key by key, given.
"""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

from features import keys
from features.catalogue import Item
from features.chunks import ChunkStore
from features.errors import StoreUnavailableError, UnsafeStoreError
from features.generations import Generations
from features.nearline import SessionNote, SessionStore, TileStore
from features.redis import (
    CatalogueStore,
    Pointers,
    RedisClient,
    StateStore,
    Trending,
    connect,
    count_users,
    memory_used,
)
from features.row import encode_row
from features.state import Accepted, Position
from tests.small import SMALL, put_states
from tests.waiting import until
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import Traffic, assert_equals_oracle, publish

if TYPE_CHECKING:
    from streams.kafka import KafkaConfig
    from streams.topics import Topics
    from tests.servers import RedisCluster

pytestmark = pytest.mark.servers
# Enough to have some on every node.
USERS = range(60)


def events(user: int, count: int) -> list[Accepted]:
    return [
        Accepted(
            Position(0, 0, 10 * user + i), 5, user + i, 1_000 * i, 0, 100 * user + i, -1, 0.5, 1
        )
        for i in range(count)
    ]


def slot_of(cluster: RedisCluster, key: str) -> int:
    return int(cluster.nodes[0].execute_command("CLUSTER KEYSLOT", key))


def test_states_come_back_as_they_were_written(cluster: RedisCluster, store: StateStore) -> None:
    states = put_states(store, {user: events(user, 50) for user in USERS})
    assert [node.dbsize() > 0 for node in cluster.nodes] == [True] * 3
    assert store.load(list(USERS)) == states
    asked = [7, 10**6, 3, 7]
    assert store.read_rows(asked) == [
        None if user not in states else encode_row(states[user], len(SMALL.actions))
        for user in asked
    ]
    held = store.read_checkpoints(0, [0])[0]
    for user in USERS:
        assert held[keys.bucket_of(user)] >= 10 * user + 50


def test_a_generation_is_counted_listed_and_dropped(
    cluster: RedisCluster, client: RedisClient, store: StateStore
) -> None:
    put_states(store, {user: events(user, 50) for user in USERS})
    generations = Generations(client)
    assert count_users(client, store.generation) == len(USERS)
    assert generations.count_users() == {store.generation: len(USERS)}
    assert generations.users(store.generation, lambda user: user % 2 == 0) == list(USERS)[::2]
    assert list(generations.recorded()) == [store.generation]
    waiting = ChunkStore(store.client, store.generation).read(list(USERS))
    assert all(one.records for one in waiting)
    assert memory_used(client) > 0
    generations.refuse_full(store.generation)
    assert sum(generations.drop(store.generation)) > 2 * len(USERS)
    assert [node.dbsize() for node in cluster.nodes] == [0, 0, 0]


def test_a_sweep_finds_every_user(client: RedisClient, store: StateStore) -> None:
    put_states(store, {user: events(user, 2) for user in USERS})
    sessions, found, cursor = SessionStore(client, store.generation), set(), 0
    while True:
        cursor, users = sessions.scan_users(cursor)
        found |= set(users)
        if cursor == 0:
            break
    assert found == set(USERS)


def test_the_catalogue_and_what_is_live(catalogue: CatalogueStore) -> None:
    items = [Item(item_id=i, name=f"item {i}", available=i % 5 != 0) for i in range(50)]
    catalogue.put_items(items)
    assert catalogue.get_items([49, 50, 0]) == [items[49], None, items[0]]
    assert catalogue.withdrawn() == set(range(0, 50, 5))
    catalogue.put_domains({3: "home"})
    assert catalogue.get_domains() == {3: "home"}
    assert catalogue.get_pointers() is None
    catalogue.put_pointers(Pointers(4, 2))
    assert catalogue.get_pointers() == Pointers(4, 2)
    catalogue.put_trending(Trending((1,), (0.5,)))
    assert catalogue.get_trending() == Trending((1,), (0.5,))
    assert catalogue.advance_items_read(0, expected=0, offset=9)
    assert not catalogue.advance_items_read(0, expected=0, offset=7)
    assert catalogue.get_items_read() == {0: 9}


def test_what_the_near_line_app_keeps(client: RedisClient, generation: int) -> None:
    tiles, sessions = TileStore(client, generation), SessionStore(client, generation)
    hour = 500_000
    for partition in range(6):
        counts = {hour: {(1, 2): 3}, hour + 1: {(1, 4): 1}}
        assert tiles.add(partition, counts, expected=None, advance_to=10)
        assert not tiles.add(partition, counts, expected=None, advance_to=10)
        assert tiles.marks(partition).next_offset == 10
        assert tiles.read(partition, [hour])[hour].num_events.tolist() == [3]
    tiles.put_domain_trending({d: Trending((d,), (1.0,)) for d in range(9)})
    notes = {bucket: SessionNote(7, b"", b"1", ((1, b"record"),)) for bucket in range(9)}
    assert [sessions.note(bucket, [note]) for bucket, note in notes.items()] == [1] * 9
    assert sessions.note(0, [notes[0]]) == 0
    assert sessions.markers({7: 3}) == {7: b"1"}
    unsent = sessions.unsent(range(9))
    assert [(one.bucket, one.record) for one in unsent] == [(b, b"record") for b in range(9)]
    sessions.sent(unsent)
    assert sessions.unsent(range(9)) == []


def test_a_node_that_forgot_the_scripts_gets_them_again(
    cluster: RedisCluster, store: StateStore
) -> None:
    put_states(store, {user: events(user, 3) for user in USERS})
    for node in cluster.nodes:
        node.script_flush()
    before = store.load(list(USERS))
    assert put_states(store, {user: events(user, 5) for user in USERS}) != before


def test_half_a_slot_takes_no_write_and_the_whole_one_does(
    cluster: RedisCluster, store: StateStore
) -> None:
    """Between the two nodes some keys are here and some are there: no script may run on either."""
    user = 5
    written = put_states(store, {user: events(user, 30)})
    slot = slot_of(cluster, keys.row_key(store.generation, user))
    source = cluster.owner_of(slot)
    target = (source + 1) % 3
    for at_most in (0, 1):
        if not at_most:
            cluster.begin_move(slot, to=target)
        cluster.move_keys(slot, source=source, to=target, at_most=at_most)
        assert store.load([user]) == written, "reading follows each key to where it is"
    with pytest.raises(StoreUnavailableError, match="writing states"):
        put_states(store, {user: events(user, 40)})
    cluster.move_keys(slot, source=source, to=target)
    cluster.end_move(slot, to=target)
    assert store.load([user]) == written, "the refused write has touched nothing"
    after = put_states(store, {user: events(user, 40)})
    assert after[user].next_ordinal == 40
    assert store.load([user]) == after
    assert cluster.nodes[source].execute_command("CLUSTER COUNTKEYSINSLOT", slot) == 0


def test_slots_that_move_while_a_worker_writes_lose_nothing(
    cluster: RedisCluster, kafka: KafkaConfig, topics: Topics, store: StateStore
) -> None:
    traffic = Traffic(seed=51, num_users=40)
    sent = traffic.make(2_000)
    publish(kafka, topics.events, sent)
    slots = sorted({slot_of(cluster, keys.row_key(1, user)) for user in range(40)})
    with running(kafka, topics, store, batch_max=50) as worker:
        worker.wait("events_total", 200)
        for slot in slots:
            cluster.move(slot, to=(cluster.owner_of(slot) + 1) % 3)
            more = traffic.make(40)
            publish(kafka, topics.events, more)
            sent += more
        wait_caught_up(kafka, topics, worker)
    assert worker.counted("events_total") > 200
    assert assert_equals_oracle(store, kafka, topics, sent) > 20


def test_a_node_that_may_evict_is_refused(cluster: RedisCluster, store: StateStore) -> None:
    store.refuse_eviction()
    cluster.nodes[2].config_set("maxmemory-policy", "allkeys-lru")
    try:
        with pytest.raises(UnsafeStoreError, match="allkeys-lru"):
            store.refuse_eviction()
    finally:
        cluster.nodes[2].config_set("maxmemory-policy", "noeviction")


def test_a_cluster_that_is_away_is_an_error_of_ours() -> None:
    with pytest.raises(StoreUnavailableError, match="moveline status"):
        connect("redis+cluster://127.0.0.1:1", timeout_s=0.5)


def test_a_node_that_hangs_is_away_for_its_users_alone(
    cluster: RedisCluster, store: StateStore
) -> None:
    """What is on other nodes is still read; when the node is back, so are its users."""
    states = put_states(store, {user: events(user, 3) for user in USERS})
    for node in cluster.nodes:
        node.config_set("cluster-node-timeout", 120_000)  # the others do not give it up meanwhile
    hanging = int(cluster.nodes[2].info("server")["process_id"])
    impatient = connect(cluster.url, timeout_s=2)
    few = StateStore(impatient, store.generation, store.config)
    owners = {u: cluster.owner_of(slot_of(cluster, keys.row_key(1, u))) for u in USERS}
    elsewhere = [user for user, owner in owners.items() if owner != 2]
    os.kill(hanging, signal.SIGSTOP)
    try:
        with pytest.raises(StoreUnavailableError, match="loading states"):
            few.load(list(USERS))
        assert few.load(elsewhere) == {user: states[user] for user in elsewhere}
    finally:
        os.kill(hanging, signal.SIGCONT)
    until(lambda: _loads(few, states), what="the node's users again")
    impatient.close()


def _loads(store: StateStore, states: dict[int, object]) -> bool:
    try:
        return bool(store.load(list(states)) == states)
    except StoreUnavailableError:
        return False
