"""Where Redis is: one server, sentinels that know the primary, or nodes of a cluster.

Pure: nothing here connects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, unquote, urlsplit

from features.errors import AddressError

Kind = Literal["single", "unix", "sentinel", "cluster"]

PORT_DEFAULT: Final = 6379
SENTINEL_PORT_DEFAULT: Final = 26379
_KINDS: Final[dict[str, tuple[Kind, bool]]] = {
    "redis": ("single", False),
    "rediss": ("single", True),
    "unix": ("unix", False),
    "redis+sentinel": ("sentinel", False),
    "rediss+sentinel": ("sentinel", True),
    "redis+cluster": ("cluster", False),
    "rediss+cluster": ("cluster", True),
}
_FORMS: Final = (
    "redis://HOST:PORT/DB, unix:///PATH, redis+sentinel://HOST:PORT,HOST:PORT/MASTER/DB or "
    "redis+cluster://HOST:PORT,HOST:PORT (rediss for TLS); see docs/bring_your_own.md"
)
# Options that are not text, by redis-py's names.
_FLAGS: Final = {"ssl_check_hostname", "socket_keepalive", "require_full_coverage"}
_NUMBERS: Final = {
    "db": int,
    "max_connections": int,
    "health_check_interval": int,
    "socket_timeout": float,
    "socket_connect_timeout": float,
}
_SENTINEL_PREFIX: Final = "sentinel_"


@dataclass(frozen=True, kw_only=True)
class RedisAddress:
    """How to reach one Redis, whatever it is made of.

    Attributes:
        kind: what stands at the nodes.
        nodes: (host, port) of the server, of the sentinels, or of some nodes of the cluster.
        path: of a unix socket.
        master: what the sentinels call the primary.
        options: redis-py's keyword arguments for every server.
        sentinel_options: those that only sentinels get.
    """

    kind: Kind
    nodes: tuple[tuple[str, int], ...] = ()
    path: str = ""
    master: str = ""
    options: dict[str, Any] = field(default_factory=dict, repr=False)
    sentinel_options: dict[str, Any] = field(default_factory=dict, repr=False)


def parse_address(url: str) -> RedisAddress:
    """Return what the URL says.

    Raises:
        AddressError: a scheme, port or option that is none, or a part that is missing.

    >>> parse_address("redis+sentinel://a,b:26380/main/2").nodes
    (('a', 26379), ('b', 26380))
    """
    scheme, _, rest = url.partition("://")
    if scheme not in _KINDS or not rest:
        raise AddressError(f"{_hidden(url)!r} is no address of a Redis: write {_FORMS}.")
    kind, is_tls = _KINDS[scheme]
    rest, _, query = rest.partition("?")
    hosts, _, path = rest.partition("/")
    credentials, _, hosts = hosts.rpartition("@")
    options = {**_credentials(credentials), **_options(query, url)}
    if is_tls:
        options["ssl"] = True
    own = {name: options.pop(name) for name in list(options) if name.startswith(_SENTINEL_PREFIX)}
    if kind == "unix":
        return RedisAddress(kind=kind, path=f"/{unquote(path)}", options=options)
    port = SENTINEL_PORT_DEFAULT if kind == "sentinel" else PORT_DEFAULT
    nodes = tuple(_node(part, port, url) for part in hosts.split(","))
    master, database = _path(kind, unquote(path), url)
    if kind == "single" and len(nodes) > 1:
        raise AddressError(f"{_hidden(url)!r} names several servers: write {_FORMS}.")
    if kind != "cluster":
        options.setdefault("db", database)
    elif database or options.pop("db", 0):
        raise AddressError(f"{_hidden(url)!r}: a cluster has database 0 alone; leave it out.")
    sentinel_options = {name.removeprefix(_SENTINEL_PREFIX): value for name, value in own.items()}
    return RedisAddress(
        kind=kind, nodes=nodes, master=master, options=options, sentinel_options=sentinel_options
    )


def _credentials(text: str) -> dict[str, Any]:
    if not text:
        return {}
    username, _, password = text.partition(":")
    given = {"username": unquote(username), "password": unquote(password)}
    return {name: value for name, value in given.items() if value}


def _options(query: str, url: str) -> dict[str, Any]:
    options: dict[str, Any] = {}
    for name, value in parse_qsl(query, keep_blank_values=True):
        try:
            number = _NUMBERS.get(name)
            options[name] = number(value) if number else value
        except ValueError as error:
            raise AddressError(f"{_hidden(url)!r}: {name}={value!r} is no number.") from error
        if name in _FLAGS:
            options[name] = value.lower() in {"1", "true", "yes"}
    return options


def _node(text: str, port: int, url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(f"//{text}")
        found = parts.port
    except ValueError as error:
        raise AddressError(f"{_hidden(url)!r}: {text!r} is no HOST:PORT ({error}).") from error
    # An empty host is redis-py's own shorthand for this machine.
    if parts.hostname is None and port == SENTINEL_PORT_DEFAULT:
        raise AddressError(f"{_hidden(url)!r} names no sentinel: write {_FORMS}.")
    return parts.hostname or "localhost", port if found is None else found


def _path(kind: Kind, path: str, url: str) -> tuple[str, int]:
    """Return the sentinels' name of the primary, and the database."""
    parts = [part for part in path.split("/") if part]
    master = ""
    if kind == "sentinel":
        if not parts:
            raise AddressError(f"{_hidden(url)!r} names no primary: write {_FORMS}.")
        master = parts.pop(0)
    if len(parts) > 1 or not all(part.isdecimal() for part in parts):
        raise AddressError(f"{_hidden(url)!r}: {path!r} is no database number: write {_FORMS}.")
    return master, int(parts[0]) if parts else 0


def _hidden(url: str) -> str:
    """Return the URL as it may stand in a log: without a password."""
    before, at, after = url.rpartition("@")
    scheme, separator, _ = before.partition("://")
    return f"{scheme}{separator}***@{after}" if at else url
