"""Which events left a user's tail in which chunk, from the whole log at once. Pure; numpy only.

`features.state.step` hands out the oldest C records of the tail when it holds R + M + C: the same
is done here with nothing but times and ordinals, which is all that decides it.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import numpy as np

from features.state import RECORD

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from features.config import StateConfig
    from features.lifelong import Chunks
    from features.view import Records

    Int64s = np.ndarray[Any, np.dtype[np.int64]]


def chunk_rows(time_ms_N: Int64s, config: StateConfig) -> Int64s:
    """Return the places [n, C] of the events in each chunk that has left the tail, oldest first.

    Args:
        time_ms_N: event times of one user's accepted events, in the order of arrival.
        config: the generation's rules.
    """
    kept, size = config.recent + config.mid, config.chunk
    if (np.diff(time_ms_N) >= 0).all():
        num_chunks = max(0, (time_ms_N.size - kept) // size)
        return np.arange(num_chunks * size).reshape(num_chunks, size)
    tail: list[tuple[int, int]] = []
    left: list[int] = []
    for place, time_ms in enumerate(time_ms_N.tolist()):
        heapq.heappush(tail, (time_ms, place))
        if len(tail) == config.tail_max:
            left += [heapq.heappop(tail)[1] for _ in range(size)]
    return np.array(left, np.int64).reshape(-1, size)


def records_of(columns: Mapping[str, np.ndarray[Any, Any]]) -> Records:
    """Return accepted events of the lake as RECORDs, without the hashes of their ids.

    Args:
        columns: as `features.lake_users.stream_users` has them.
    """
    records = np.zeros(columns["item_id"].size, RECORD)
    for name in RECORD.names or ():
        if name in columns:
            records[name] = columns[name]
    return records


def by_user(columns: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[tuple[int, Records]]:
    """Yield each user with all records by arrival, from columns sorted by (user, arrival)."""
    records = records_of(columns)
    users, starts = np.unique(columns["user_id"], return_index=True)
    yield from zip(users.tolist(), np.split(records, starts[1:]), strict=True)


def chunks_of(records_N: Records, config: StateConfig) -> Chunks:
    """Return the chunks [n, C] that have left a user's tail, from all records by arrival."""
    chunks: Chunks = records_N[chunk_rows(records_N["event_time_ms"], config)]
    return chunks
