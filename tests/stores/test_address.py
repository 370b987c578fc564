"""What `redis.url` may say, and the sentence for what it may not."""

from __future__ import annotations

import doctest

import pytest

from features import redis_address
from features.errors import AddressError
from features.redis import connect
from features.redis_address import RedisAddress, parse_address


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("redis://h:1/2", RedisAddress(kind="single", nodes=(("h", 1),), options={"db": 2})),
        ("redis://", None),
        (
            "rediss://us%40er:p%2Fw@h?ssl_ca_certs=/ca.pem&socket_timeout=0.5",
            RedisAddress(
                kind="single",
                nodes=(("h", 6379),),
                options={
                    "username": "us@er",
                    "password": "p/w",
                    "ssl_ca_certs": "/ca.pem",
                    "socket_timeout": 0.5,
                    "ssl": True,
                    "db": 0,
                },
            ),
        ),
        (
            "unix:///run/redis.sock?db=3",
            RedisAddress(kind="unix", path="/run/redis.sock", options={"db": 3}),
        ),
        (
            "redis+sentinel://:secret@a:1,b/main/4?sentinel_password=own",
            RedisAddress(
                kind="sentinel",
                nodes=(("a", 1), ("b", 26379)),
                master="main",
                options={"password": "secret", "db": 4},
                sentinel_options={"password": "own"},
            ),
        ),
        (
            "rediss+cluster://a:7000,[::1]:7001",
            RedisAddress(kind="cluster", nodes=(("a", 7000), ("::1", 7001)), options={"ssl": True}),
        ),
    ],
)
def test_an_address_is_read(url: str, address: RedisAddress | None) -> None:
    if address is None:
        with pytest.raises(AddressError, match="redis://HOST"):
            parse_address(url)
    else:
        assert parse_address(url) == address


@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("localhost:6379", "no address of a Redis"),
        ("http://h:1", "no address of a Redis"),
        ("redis://a:1,b:2/0", "several servers"),
        ("redis://h:port", "no HOST:PORT"),
        ("redis://h/zero", "no database number"),
        ("redis://h?db=x", "db='x' is no number"),
        ("redis+sentinel://a:1", "names no primary"),
        ("redis+sentinel:///main", "names no sentinel"),
        ("redis+cluster://a:1/3", "database 0 alone"),
    ],
)
def test_what_is_no_address_is_refused(url: str, sentence: str) -> None:
    with pytest.raises(AddressError, match=sentence):
        connect(url)


def test_a_password_is_in_no_message() -> None:
    with pytest.raises(AddressError) as refused:
        parse_address("redis://user:secret@a:1,b:2")
    assert "secret" not in str(refused.value)
    assert "secret" not in repr(parse_address("redis://user:secret@a"))


def test_the_examples_hold() -> None:
    assert doctest.testmod(redis_address).failed == 0
