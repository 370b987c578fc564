"""The one door to Redis: one server, a Sentinel's primary or a Cluster, behind the same few calls.

Everything else says which commands to run; only this module knows how many servers there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import redis
from redis.backoff import NoBackoff
from redis.cluster import ClusterNode, RedisCluster
from redis.exceptions import AskError as AskedElsewhereError
from redis.exceptions import (
    ClusterDownError,
    NoScriptError,
    OutOfMemoryError,
    RedisClusterException,
    RedisError,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from redis.retry import Retry
from redis.sentinel import Sentinel

from features.errors import StoreError, StoreFullError, StoreUnavailableError
from features.redis_address import RedisAddress, parse_address

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    Command = tuple[Any, ...]

RedisClient = redis.Redis | RedisCluster
# redis-py says little about the types of its cluster and its sentinels.
_Untyped = Any
# (server, connection, names of the commands) -> replies
Receive = Callable[[_Untyped, _Untyped, Sequence[str]], list[Any]]

# A read for scoring that takes longer is worth less than a degraded answer.
TIMEOUT_S_DEFAULT: Final = 5.0
# One pipeline's size: past it Redis buffers replies for nothing.
PIPELINE_MAX: Final = 2_000
# What a reply has beside its string: a sign, the length, and two ends of lines. An error's line,
# which takes the place of a string, is short too.
_FRAME_BYTES_MAX: Final = 1_024
_STRING: Final = ord("$")
# As much as one system call takes at most.
_RECEIVE_BYTES: Final = 1 << 20
# Redis works on what has come while the next part is put together. Smaller parts cost more system
# calls, larger ones let it wait.
SEND_BYTES: Final = 64 * 1024
# Where the first key stands in commands that do not begin with it.
_KEY_AT: Final = {"EVALSHA": 3, "EVAL": 3, "FCALL": 3}


@contextmanager
def mapped_errors(doing: str) -> Iterator[None]:
    """Inside the block, what Redis raises becomes an error of ours that says what was tried."""
    try:
        yield
    except (
        RedisConnectionError,
        RedisTimeoutError,
        RedisClusterException,  # no node of the cluster answered
        ClusterDownError,
        TryAgainError,  # the slot is on its way from one node to another
        AskedElsewhereError,
    ) as error:
        raise StoreUnavailableError(
            f"Redis did not answer while {doing} ({str(error).rstrip('.')}). "
            "Check `moveline status` and the redis.url setting."
        ) from error
    except OutOfMemoryError as error:
        raise StoreFullError(
            f"Redis is at maxmemory while {doing}: raise it, or drop a generation."
        ) from error
    except RedisError as error:
        raise StoreError(f"Redis refused while {doing}: {error}") from error


class ScriptMissingError(StoreError):
    """Redis does not know the script: load it and run the pipeline again.

    Running the whole pipeline twice is safe: a bucket that was written refuses its second write.
    """


def connect(url: str, *, timeout_s: float = TIMEOUT_S_DEFAULT) -> RedisClient:
    """Return a client that never retries by itself: a lost reply must not be written twice.

    Raises:
        AddressError: the URL is none of those in docs/bring_your_own.md.
        StoreUnavailableError: no node of a cluster answers; other kinds connect when first used.
    """
    return connect_to(parse_address(url), timeout_s=timeout_s)


def connect_to(address: RedisAddress, *, timeout_s: float = TIMEOUT_S_DEFAULT) -> RedisClient:
    """Return the client for an address, as `connect` does."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_s,
        "socket_connect_timeout": timeout_s,
        "decode_responses": False,
        **address.options,
    }
    if address.kind == "cluster":
        make_node: _Untyped = ClusterNode
        nodes = [make_node(host, port) for host, port in address.nodes]
        with mapped_errors("looking for the cluster's nodes"):
            return RedisCluster(startup_nodes=nodes, retry=_no_retry(), **options)
    if address.kind == "sentinel":
        # What it takes to reach a sentinel: the timeouts and TLS of the servers, its own password.
        own = {
            name: value for name, value in options.items() if name.startswith(("socket_", "ssl"))
        }
        make_sentinel: _Untyped = Sentinel
        sentinel = make_sentinel(
            list(address.nodes), sentinel_kwargs={**own, **address.sentinel_options}
        )
        primary: redis.Redis = sentinel.master_for(address.master, retry=_no_retry(), **options)
        return primary
    if address.kind == "unix":
        return redis.Redis(unix_socket_path=address.path, retry=_no_retry(), **options)
    ((host, port),) = address.nodes
    return redis.Redis(host=host, port=port, retry=_no_retry(), **options)


def _no_retry() -> Retry:
    return Retry(NoBackoff(), 0)


def execute(client: RedisClient, *command: str | bytes | float) -> Any:  # noqa: ANN401 - Redis replies
    """Return the reply to one command; the library's own type of it says nothing."""
    run: Callable[..., Any] = client.execute_command
    return run(*command)


def run_script(client: RedisClient, source: bytes, keys: Sequence[str], args: Sequence[Any]) -> int:
    """Return a script's number; the library loads it where Redis does not know it yet."""
    untyped: _Untyped = client
    return int(untyped.register_script(source)(keys, args))


def load_script(client: RedisClient, source: bytes) -> None:
    """Return once every server knows the script, so that EVALSHA finds it."""
    with mapped_errors("loading a script"):
        for server in primaries(client):
            execute(server, "SCRIPT LOAD", source)


def pipelined(client: RedisClient, commands: Sequence[Command], doing: str) -> list[Any]:
    """Return the replies to commands of one key each, in order: one round trip to every server.

    Raises:
        ScriptMissingError: a script is unknown; what else was in the pipeline has run.
        StoreError: Redis did not answer, is full, or refused one of them; others may have run.
    """
    return _in_turn(client, commands, doing, _receive)


def read_strings(
    client: RedisClient, commands: Sequence[Command], doing: str, *, bytes_max: int
) -> list[memoryview]:
    """Return what `pipelined` returns, for commands whose replies are strings: as they came.

    Half of the time that redis-py takes for a string of some kilobytes goes into copies of it. The
    views returned lie in the buffer that the socket was read into.

    Args:
        client: whose keys.
        commands: of one key each.
        doing: for messages.
        bytes_max: no reply is longer.

    Raises:
        StoreError: as `pipelined`.
    """

    def receive(server: _Untyped, connection: _Untyped, names: Sequence[str]) -> list[Any]:
        del server
        return _receive_strings(connection, len(names), bytes_max)

    return _in_turn(client, commands, doing, receive)


def _in_turn(
    client: RedisClient, commands: Sequence[Command], doing: str, receive: Receive
) -> list[Any]:
    replies: list[Any] = []
    for start in range(0, len(commands), PIPELINE_MAX):
        with mapped_errors(doing):
            replies += _run(client, commands[start : start + PIPELINE_MAX], receive)
    return _without_errors(replies, doing)


def _without_errors(replies: list[Any], doing: str) -> list[Any]:
    for reply in replies:
        if isinstance(reply, NoScriptError):
            raise ScriptMissingError(str(reply))
        if isinstance(reply, ResponseError):
            with mapped_errors(doing):
                raise reply
    return replies


def streamed(client: RedisClient, commands: Iterable[Command], doing: str) -> list[Any]:
    """Do as `pipelined` does while `commands` are still being made: the first are sent already.

    Where one server has all the keys, it works while the next commands are put together. Replies
    wait in the socket meanwhile, so they have to be small.
    """
    if isinstance(client, RedisCluster):
        return pipelined(client, list(commands), doing)
    with mapped_errors(doing):
        (replies,) = _exchange([(client, commands)], _receive)
    return _without_errors(replies, doing)


def _send(connection: _Untyped, commands: Iterable[Command]) -> list[str]:
    """Send commands in parts as they come; return their names."""
    names: list[str] = []
    parts: list[bytes] = []
    num_bytes = 0
    for command in commands:
        names.append(command[0])
        for part in connection.pack_command(*command):
            parts.append(part)
            num_bytes += len(part)
        if num_bytes >= SEND_BYTES:
            connection.send_packed_command([b"".join(parts)])
            parts, num_bytes = [], 0
    if parts:
        connection.send_packed_command([b"".join(parts)])
    return names


def _run(client: RedisClient, commands: Sequence[Command], receive: Receive) -> list[Any]:
    """Return replies, errors among them; a slot that moved is followed, command by command.

    redis-py's own pipelines are not used: the one for clusters sends again what a broken connection
    may have written, and both spend on each reply what a user's row takes to travel.
    """
    if not isinstance(client, RedisCluster):
        return _exchange([(client, commands)], receive)[0]
    cluster: _Untyped = client
    places: dict[str, list[int]] = {}
    for i, command in enumerate(commands):
        key = command[_KEY_AT.get(command[0], 1)]
        places.setdefault(cluster.get_node_from_key(key).name, []).append(i)
    nodes = [cluster.get_redis_connection(cluster.get_node(node_name=name)) for name in places]
    parts = [[commands[i] for i in of_node] for of_node in places.values()]
    try:
        found = _exchange(list(zip(nodes, parts, strict=True)), receive)
    except (RedisConnectionError, RedisTimeoutError):
        # Somebody else may own its slots by now; who asks again asks whoever that is.
        cluster.nodes_manager.initialize()
        raise
    replies: list[Any] = [None] * len(commands)
    for of_node, part in zip(places.values(), found, strict=True):
        for i, reply in zip(of_node, part, strict=True):
            is_elsewhere = isinstance(reply, AskedElsewhereError)  # MOVED is one of these too
            replies[i] = execute(client, *commands[i]) if is_elsewhere else reply
    return replies


def _exchange(
    parts: Sequence[tuple[redis.Redis, Iterable[Command]]], receive: Receive
) -> list[list[Any]]:
    """Send every server its commands before any reply is read, so that they work side by side."""
    connections: list[_Untyped] = []
    sent: list[list[str]] = []
    replies: list[list[Any]] = []
    try:
        for server, commands in parts:
            connection: _Untyped = server.connection_pool.get_connection()
            connections.append(connection)
            sent.append(_send(connection, commands))
        for (server, _), connection, names in zip(parts, connections, sent, strict=True):
            replies.append(receive(server, connection, names))
    finally:
        for i, connection in enumerate(connections):
            if i >= len(replies):  # replies that nobody has read must not reach the next user
                connection.disconnect()
            parts[i][0].connection_pool.release(connection)
    return replies


def _receive(server: _Untyped, connection: _Untyped, names: Sequence[str]) -> list[Any]:
    """Return redis-py's idea of each reply, errors among them."""
    return [_reply(server, connection, name) for name in names]


def _reply(server: _Untyped, connection: _Untyped, name: str) -> Any:  # noqa: ANN401 - Redis replies
    try:
        return server.parse_response(connection, name)
    except ResponseError as error:
        return error


def _receive_strings(connection: _Untyped, count: int, bytes_max: int) -> list[Any]:
    """Return the replies, strings as views of one buffer, errors as redis-py makes them."""
    room = count * (bytes_max + _FRAME_BYTES_MAX)
    buffer = bytearray(room)  # pages that nothing is written to cost nothing
    view, filled, at = memoryview(buffer), 0, 0
    replies: list[Any] = []
    while len(replies) < count:
        end = buffer.find(b"\r\n", at, filled)
        stop = end + 2
        if end >= 0 and buffer[at] == _STRING:
            stop += int(buffer[at + 1 : end]) + 2
        if end < 0 or stop > filled:
            filled += _received(connection, view[filled : filled + _RECEIVE_BYTES])
            continue
        if buffer[at] == _STRING:
            replies.append(view[end + 2 : stop - 2])
        else:
            replies.append(_refusal(connection, buffer[at + 1 : end].decode()))
        at = stop
    return replies


def _received(connection: _Untyped, space: memoryview) -> int:
    """Return how many bytes came, at least one."""
    try:
        count: int = connection._sock.recv_into(space)  # noqa: SLF001 - redis-py only hands out copies
    except TimeoutError as error:
        raise RedisTimeoutError("Timeout reading from socket") from error
    except OSError as error:
        raise RedisConnectionError(f"reading from socket: {error}") from error
    if not count:
        raise RedisConnectionError("Connection closed by server")
    return count


def _refusal(connection: _Untyped, text: str) -> Exception:
    """Return the error that redis-py makes of a reply that is none."""
    error: Exception = connection._parser.parse_error(text)  # noqa: SLF001 - likewise
    if isinstance(error, ResponseError):
        return error
    raise error


def primaries(client: RedisClient) -> list[redis.Redis]:
    """Return a client of every server that takes writes, always in the same order."""
    if not isinstance(client, RedisCluster):
        return [client]
    cluster: _Untyped = client
    nodes = sorted(cluster.get_primaries(), key=lambda node: node.name)
    return [cluster.get_redis_connection(node) for node in nodes]


def scan(client: RedisClient, pattern: str, *, count: int) -> Iterator[bytes]:
    """Yield the keys that match; some may come twice. Looks at every key.

    Args:
        client: whose keys.
        pattern: as Redis' SCAN takes it.
        count: keys looked at before Redis turns to others.
    """
    for server in primaries(client):
        yield from server.scan_iter(match=pattern, count=count)


def scan_step(
    client: RedisClient, cursor: int, pattern: str, *, count: int
) -> tuple[int, list[bytes]]:
    """Return the next cursor (0: that was all) and some keys; server after server."""
    servers = primaries(client)
    own, which = divmod(cursor, len(servers))
    after, found = execute(servers[which], "SCAN", own, "MATCH", pattern, "COUNT", count)
    if int(after):
        return int(after) * len(servers) + which, found
    return (which + 1) % len(servers), found


def infos(client: RedisClient, section: str) -> list[dict[str, Any]]:
    """Return a section of INFO from every server that takes writes."""
    return [execute(server, "INFO", section) for server in primaries(client)]
