"""What the tests of several areas share: small rules, states to read, and where all of it lies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from features.config import StateConfig
from features.keys import bucket_of, checkpoints_key
from features.redis import WRITTEN, BucketWrite, execute
from features.row import encode_write
from features.state import step

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.redis import StateStore
    from features.state import Accepted, UserState

REPOSITORY: Final = Path(__file__).parents[1]
# Small streams: a few dozen events of a user reach chunks, departures and the duplicate window.
SMALL: Final = StateConfig(recent=8, mid=24, chunk=6, dedup_window=16)
# Settings of commands that export: compiling a graph takes a minute, and
# tests/scoring/test_machine_code.py does it, once.
UNCOMPILED: Final = {"MOVELINE_TRAINING__MACHINE_CODE": "never"}


def put_states(
    store: StateStore, events_of: Mapping[int, Sequence[Accepted]]
) -> dict[int, UserState]:
    """Continue each user's row by these events in one write each; return the states there now.

    For tests that only read. A worker goes through a partition once and skips what its checkpoint
    has; here every user's offsets may begin anew, so a checkpoint only ever grows.
    """
    store.claim_generation()
    before = store.load(list(events_of))
    after = {}
    for user, events in events_of.items():
        change = step(before[user], events, store.config)
        last, bucket = events[-1].position, bucket_of(user)
        field = f"{last.source}:{last.partition}"
        found = execute(store.client, "HGET", checkpoints_key(store.generation, bucket), field)
        held = -1 if found is None else int(found)
        end = max(held, last.offset + 1)
        row = encode_write(before[user], change, len(store.config.actions))
        write = BucketWrite(bucket, last.source, last.partition, held, end, {user: row})
        assert store.write_buckets([write]) == [WRITTEN]
        after[user] = change.state
    return after
