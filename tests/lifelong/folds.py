"""A compressor that needs no Triton, for laws about what is folded when.

No mock of the real one: any sum over events obeys the same laws, and this one tells which events
are in a sum. The real compressor is asked in `tests/lifelong/test_triton.py`.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final

import numpy as np

from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH, Folded, LiveMemory

if TYPE_CHECKING:
    from features.lifelong import Chunks, Memory

_PLACES: Final = LIFELONG_ROWS * LIFELONG_WIDTH
V1: Final = LiveMemory("00000000000000a1", 1)
V2: Final = LiveMemory("00000000000000b2", 2)


def fold_ordinals(model_version: int, records_NC: Chunks) -> Folded:
    """Return states in which place `ordinal` counts how often that event was folded."""
    del model_version
    size, chunk = records_NC.shape
    states = np.zeros((size, _PLACES), np.float32)
    rows = np.repeat(np.arange(size), chunk)
    np.add.at(states, (rows, records_NC["ordinal"].ravel() % _PLACES), 1)
    return Folded(
        states.reshape(size, LIFELONG_ROWS, LIFELONG_WIDTH), np.full(size, chunk, np.int64)
    )


def ordinals_in(memory: Memory) -> Counter[int]:
    """Return how often each event is in a memory that `fold_ordinals` made."""
    places = memory.state.ravel()
    return Counter({int(at): int(places[at]) for at in np.flatnonzero(places)})


def fold_values(model_version: int, records_NC: Chunks) -> Folded:
    """Return states of many different sizes, as a real compressor makes them: sums are rounded."""
    size, chunk = records_NC.shape
    state = np.zeros((size, LIFELONG_ROWS, LIFELONG_WIDTH), np.float64)
    for at in range(chunk):
        one = records_NC[:, at]
        seeds = (one["item_id"] * 31 + one["action"] * 7 + model_version) % 1_009
        keys = np.exp(np.sin(np.outer(seeds + 1.0, np.arange(1, LIFELONG_ROWS + 1))))
        hours = (one["event_time_ms"] // 3_600_000 % 24)[:, None]
        values = np.cos(np.outer(seeds + 1.0, np.arange(1, LIFELONG_WIDTH + 1)) + hours)
        state += keys[:, :, None] * values[:, None, :]
    return Folded(state.astype(np.float32), np.full(size, chunk, np.int64))
