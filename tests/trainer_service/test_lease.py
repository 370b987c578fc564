"""Goal: one holder at a time, and one that was overtaken knows it; on a real Redis."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import pytest

from features.errors import LeaseLostError
from features.lease import Lease, holder
from features.redis import execute
from tests.waiting import until

if TYPE_CHECKING:
    import redis

KEY = "moveline:test-lease"


def take(client: redis.Redis, owner: str, lease_s: float = 5.0) -> Lease | None:
    return Lease.take(client, KEY, owner=owner, lease_s=lease_s)


def test_one_holds_it_and_the_next_gets_it_afterwards(redis_client: redis.Redis) -> None:
    first = take(redis_client, "a")
    assert first is not None
    with first:
        first.check()
        assert take(redis_client, "b") is None
        assert holder(redis_client, KEY) == "a"
    assert holder(redis_client, KEY) is None
    second = take(redis_client, "b")
    assert second is not None
    second.release()


def test_one_that_waits_gets_it_when_it_is_given_back(redis_client: redis.Redis) -> None:
    first = take(redis_client, "a")
    assert first is not None
    releasing = threading.Timer(0.3, first.release)
    releasing.start()
    second = Lease.take(redis_client, KEY, owner="b", wait_s=30)
    releasing.join()
    assert second is not None
    with second:
        assert holder(redis_client, KEY) == "b"


def test_it_lasts_as_long_as_its_holder(redis_client: redis.Redis) -> None:
    lease = take(redis_client, "a", lease_s=3.0)
    assert lease is not None
    with lease:
        begun = time.monotonic()
        until(lambda: time.monotonic() - begun > 3.5)
        lease.check()
        assert take(redis_client, "b") is None


def test_a_holder_that_was_overtaken_knows_it_and_frees_nothing(
    redis_client: redis.Redis,
) -> None:
    lease = take(redis_client, "a", lease_s=0.3)
    assert lease is not None
    with lease:
        execute(redis_client, "SET", KEY, "b")
        until(lambda: not lease.is_held, what="it is noticed")
        with pytest.raises(LeaseLostError, match="Somebody else"):
            lease.check()
    assert holder(redis_client, KEY) == "b"


def test_a_redis_that_was_emptied_is_a_lost_lease(redis_client: redis.Redis) -> None:
    lease = take(redis_client, "a", lease_s=0.3)
    assert lease is not None
    with lease:
        redis_client.flushall()
        until(lambda: not lease.is_held, what="it is noticed")


def test_a_holder_that_does_not_say_that_it_lives_loses_it(redis_client: redis.Redis) -> None:
    """As a process that stands still: nothing renews, and its own clock tells when it goes on."""
    lease = take(redis_client, "a", lease_s=0.3)
    assert lease is not None
    lease._end.set()
    lease._thread.join()
    until(lambda: holder(redis_client, KEY) is None, what="the end of the lease")
    second = take(redis_client, "b")
    assert second is not None
    with second:
        assert not lease.is_held
        with pytest.raises(LeaseLostError):
            lease.check()
        lease.release()
        assert holder(redis_client, KEY) == "b"
