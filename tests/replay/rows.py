"""Everything a generation holds, as bytes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from features.redis import StateStore

_USER = re.compile(rb":(row|chunks):(\d+)$")


class Everything(NamedTuple):
    """All rows and all chunks, by user."""

    rows: dict[int, bytes]
    chunks: dict[int, dict[bytes, bytes]]


def everything(store: StateStore) -> Everything:
    """Return a generation's users byte by byte."""
    found = Everything({}, {})
    for key in store.client.keys(f"moveline:{{b*}}:g{store.generation}:*"):
        match = _USER.search(key)
        if match is None:
            continue
        user = int(match[2])
        if match[1] == b"row":
            found.rows[user] = store.client.get(key) or b""
        else:
            found.chunks[user] = store.client.hgetall(key)
    return found
