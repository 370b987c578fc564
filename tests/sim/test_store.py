"""The simulated Redis answers and holds what the real one does: the same writes to both.

Writes are computed from the newest state, from an old one and from none, with the right, an old and
no checkpoint; others are bytes nobody would send.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from features import keys
from features.chunks import ChunkStore, Drop
from features.redis import BucketWrite, CatalogueStore, StateStore, connect
from features.row import RowWrite, encode_position, encode_write
from features.state import EMPTY_STATE, Accepted, Position, UserState, step
from tests.sim.store import NUM_BUCKETS, SimRedis, SimStore
from tests.sim.traffic import _USERS, CONFIG, NUM_ACTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator

    import redis

    from compose.local.stack import LocalStack

_IN = {bucket: [u for u in _USERS if keys.bucket_of(u) == bucket] for bucket in range(2)}
USERS = {bucket: users[:3] for bucket, users in _IN.items()}
# One more of each bucket, whose row is never read as one.
RAW_USERS = {bucket: users[3] for bucket, users in _IN.items()}
pytestmark = pytest.mark.servers
# No test of another area counts from here.
_GENERATIONS = itertools.count(900_000)


class Silent:
    """A world in which nothing happens."""

    def at(self, point: str) -> None:
        del point

    def written(self, write: BucketWrite) -> None:
        del write

    def dropped(self, user: int) -> None:
        del user

    def lose_reply(self) -> bool:
        return False

    def is_refused(self) -> bool:
        return False


@pytest.fixture(scope="module")
def client(stack: LocalStack) -> Iterator[redis.Redis]:
    client = connect(stack.addresses.redis)
    yield client
    client.close()


def some_events(start: int, times: list[int]) -> list[Accepted]:
    return [
        Accepted(Position(0, 0, start + i), 5, 7, time_ms * 1_000, 0, start + i, -1, 0.5, 1)
        for i, time_ms in enumerate(times)
    ]


ROWS = st.tuples(
    st.integers(0, 2),  # which user of the bucket
    st.integers(0, 4),  # how many states ago the write was computed from
    st.lists(st.integers(0, 20), min_size=1, max_size=12),  # event times
)
RAW = st.builds(
    RowWrite,
    st.sampled_from([b"", b"x" * 16, encode_position(Position(0, 0, 3))]),
    st.integers(-1, 200),
    st.binary(min_size=1, max_size=200),
    st.sampled_from([(), (b"0", b"records"), (b"1", b"a", b"2", b"b")]),
)
WRITES = st.lists(
    st.tuples(
        st.integers(0, 1),  # bucket
        st.integers(0, 1),  # partition
        st.integers(0, 2),  # how many checkpoints ago
        st.integers(1, 5),  # how far the checkpoint moves
        st.lists(ROWS, max_size=4),
        st.none() | RAW,
        # Drop chunks: whose, before which, with which one as a witness, and is it the same one?
        st.none()
        | st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 3), st.booleans()),
    ),
    max_size=12,
)


@given(WRITES)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_both_take_and_refuse_the_same(client: redis.Redis, plan: list[tuple]) -> None:
    real = StateStore(client, next(_GENERATIONS), CONFIG)
    chunks = ChunkStore(client, real.generation)
    fake = SimStore(SimRedis(), CONFIG, Silent())
    states: dict[int, list[UserState]] = {}
    checkpoints: dict[tuple[int, int], list[int]] = {}
    for bucket, partition, ago, further, rows, raw, drop in plan:
        left = checkpoints.setdefault((bucket, partition), [-1])
        write = BucketWrite(bucket, 0, partition, left[-1 - min(ago, len(left) - 1)], 0, {})
        write = write._replace(advance_to=max(left) + further)
        written: dict[int, RowWrite] = {}
        after: dict[int, UserState] = {}
        for who, states_ago, times in rows:
            user = USERS[bucket][who]
            known = states.setdefault(user, [EMPTY_STATE])
            before = known[-1 - min(states_ago, len(known) - 1)]
            change = step(before, some_events(before.position.offset + 1, times), CONFIG)
            written[user] = encode_write(before, change, NUM_ACTIONS)
            after[user] = change.state
        if raw is not None:
            written[RAW_USERS[bucket]] = raw
        write = write._replace(rows=written)
        replies = real.write_buckets([write])
        assert replies == fake.write_buckets([write])
        if replies == [1]:
            left.append(write.advance_to)
            for user, state in after.items():
                states[user].append(state)
        if drop is not None:
            who, keep_from, newest, is_same = drop
            user = USERS[bucket][who]
            there = fake.redis.chunks(user).get(b"%d" % newest, b"x")
            wanted = {user: Drop(keep_from, newest, there[:48] if is_same else b"another")}
            assert chunks.drop(wanted) == fake.drop(wanted)
    users = [*USERS[0], *USERS[1]]
    assert real.load(users) == fake.load(users)
    everybody = [*users, *RAW_USERS.values()]
    assert real.read_rows(everybody) == [fake.redis.row(user) or None for user in everybody]
    checked = real.read_checkpoints(0, [0, 1])
    assert {p: at[:NUM_BUCKETS] for p, at in checked.items()} == fake.read_checkpoints(0, [0, 1])
    for user in everybody:
        held = client.hgetall(keys.chunks_key(real.generation, user))
        assert held == fake.redis.chunks(user)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=8))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
def test_both_move_the_catalogues_position_alike(
    client: redis.Redis, moves: list[tuple[int, int]]
) -> None:
    client.delete(keys.ITEMS_READ_KEY)
    real, fake = CatalogueStore(client), SimStore(SimRedis(), CONFIG, Silent())
    for expected, offset in moves:
        moved = real.advance_items_read(0, expected=expected, offset=offset)
        assert moved == fake.advance_items_read(0, expected=expected, offset=offset)
    assert real.get_items_read() == fake.get_items_read()


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(0, 20))
def test_going_back_is_being_a_prefix(moves: list[int], back_to: int) -> None:
    """What Redis holds after going back is what it held after that many commands."""
    there, part = SimRedis(), SimRedis()
    for i, key in enumerate(moves):
        there.write({("key", key): i, ("last",): i})
        if i < back_to:
            part.write({("key", key): i, ("last",): i})
    there.restore(back_to)
    assert there.data == part.data
    assert there.journal == part.journal
