"""Streams as a reader of a memory sees them: recent, and all else that is not in the memory.

Memory, waiting chunks and tail hold each of a user's events once. So the mid-term stream of such a
reader is what waits and the tail without recent, and grows from M up to M + C - 1 records beside
the chunks that wait; the memory has the rest. A reader without a memory has the newest M
(`features.view`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH
from features.lifelong_store import LifelongStore, decode_memory
from features.state import RECORD
from features.user_batch import UserBatch, decode_batch
from features.view import PADDING_ITEM, StreamBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.lifelong import Memory
    from features.lifelong_store import WithMemory
    from features.redis import StateStore
    from features.view import Records

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class LifelongBatch:
    """B users with the memories of one version, each as of one instant.

    Attributes:
        users: rows, the whole tail among their records.
        waiting: of each user, the records of chunks that are not in the memory.
        state_BLW: float32 [B, LIFELONG_ROWS, LIFELONG_WIDTH]; zeros without a memory.
        num_events_B: events in the memory, int64 [B].
        num_folded_B: chunks in the memory, int64 [B].
        is_incomplete_B: bool [B]: events are in neither memory, chunks nor tail.
    """

    users: UserBatch
    waiting: Sequence[Records]
    state_BLW: Array
    num_events_B: Array
    num_folded_B: Array
    is_incomplete_B: Array

    def streams(self) -> StreamBatch:
        """Return recent and mid-term stream: M wide, or a multiple of C where some are longer."""
        batch, config = self.users.streams(), self.users.config
        held = [mid[mid["item_id"] != PADDING_ITEM] for mid in batch.mid_BM]
        mids = [with_waiting(*pair) for pair in zip(self.waiting, held, strict=True)]
        longest = max((mid.size for mid in mids), default=0)
        padding = np.zeros((), RECORD)
        padding["item_id"] = PADDING_ITEM
        width = max(config.mid, -(-longest // config.chunk) * config.chunk)
        mid_BM = np.full((len(mids), width), padding, RECORD)
        for row, mid in zip(mid_BM, mids, strict=True):
            if mid.size:
                row[-mid.size :] = mid
        return batch._replace(
            mid_BM=mid_BM, memory_BLW=self.state_BLW, memory_events_B=self.num_events_B
        )


def with_waiting(waiting: Records, mid: Records) -> Records:
    """Return both in the order of streams: a late event may be older than what left before it."""
    if not waiting.size:
        return mid
    both = np.concatenate([waiting, mid])
    return both[np.lexsort((both["ordinal"], both["event_time_ms"]))]


def read_lifelong(
    store: StateStore, user_ids: Sequence[int], memory_version: str, *, now_ms: int
) -> LifelongBatch:
    """Return users' state with their memories, in the order asked, in one round trip.

    Args:
        store: from `features.store.open_state`.
        user_ids: any number; one may come twice.
        memory_version: of the model that is to read them; no other's is looked at.
        now_ms: the clock at which sessions are judged.

    Raises:
        StoreError: Redis did not answer.
        CorruptRowError: stored bytes are not a row.
    """
    config = store.config
    found = LifelongStore.of(store).read_with_chunks(user_ids, memory_version)
    users = decode_batch(
        user_ids,
        [one.row for one in found],
        newest=config.tail_max - 1,
        now_ms=now_ms,
        config=config,
        formats=store.formats,
    )
    num_chunks_B = users.trailers_B["num_chunks"].astype(np.int64)
    size = len(found)
    state_BLW = np.zeros((size, LIFELONG_ROWS, LIFELONG_WIDTH), np.float32)
    num_events_B, num_folded_B = np.zeros(size, np.int64), np.zeros(size, np.int64)
    is_incomplete_B = np.zeros(size, np.bool_)
    waiting = []
    for row, one in enumerate(found):
        memory = decode_memory(one.memory, memory_version)
        if memory is not None:
            state_BLW[row] = memory.state
            num_events_B[row], num_folded_B[row] = memory.num_events, memory.num_chunks
        waiting.append(np.frombuffer(one.chunks, RECORD))
        is_incomplete_B[row] = _lacks(one, memory, int(num_chunks_B[row]), config.chunk)
    return LifelongBatch(users, waiting, state_BLW, num_events_B, num_folded_B, is_incomplete_B)


def _lacks(found: WithMemory, memory: Memory | None, num_chunks: int, chunk: int) -> bool:
    """Return whether chunks are in neither the memory nor what was read."""
    folded = 0 if memory is None else memory.num_chunks
    num_read = len(found.chunks) // (RECORD.itemsize * chunk)
    return folded + num_read < num_chunks
