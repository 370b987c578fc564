"""Many commands in one round trip, sent while later ones are still being made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from redis.exceptions import ResponseError

if TYPE_CHECKING:
    from collections.abc import Iterable

    import redis

# Redis works on what has come while the next part is put together. Smaller parts cost more system
# calls, larger ones let it wait.
SEND_BYTES: Final = 64 * 1024


def replies_to(client: redis.Redis, commands: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Return the replies in order; one that is an error stands in its command's place.

    redis-py's own pipeline makes every command before it sends the first. Here the two sides
    work at the same time. Replies wait in the socket, so they have to be small.

    Raises:
        redis.RedisError: the connection broke; any part of the commands may have run.
    """
    pool = client.connection_pool
    connection: Any = pool.get_connection()
    try:
        num_sent = _send(connection, commands)
        return [_reply(connection) for _ in range(num_sent)]
    except BaseException:
        # Replies nobody has read would answer the next caller's commands.
        connection.disconnect()
        raise
    finally:
        pool.release(connection)


def _send(connection: Any, commands: Iterable[tuple[Any, ...]]) -> int:  # noqa: ANN401 - redis-py's classes of it share no base
    num_sent = num_bytes = 0
    parts: list[bytes] = []
    for command in commands:
        num_sent += 1
        for part in connection.pack_command(*command):
            parts.append(part)
            num_bytes += len(part)
        if num_bytes >= SEND_BYTES:
            connection.send_packed_command([b"".join(parts)])
            parts, num_bytes = [], 0
    if parts:
        connection.send_packed_command([b"".join(parts)])
    return num_sent


def _reply(connection: Any) -> Any:  # noqa: ANN401 - as above; what Redis replies
    try:
        return connection.read_response()
    except ResponseError as error:
        return error
