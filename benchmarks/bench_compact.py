"""How many events a second does compaction fold, near-line and from the lake?

Workload: USERS users (2,000) with EVENTS events each (1,024) under the default rules (64, 448, 64),
so that eight chunks of each have left the tail; items drawn from 50,000 by Zipf's law. The
compressor is that of a model of default size, exported and served by Triton as any other; its
weights are what a second of training leaves, which changes no time.

- near-line: the app's compaction over all users, from chunks in Redis to memories, chunks dropped.
- batch: the builder's, from a lake of four partitions to the same memories, read included.
- compressor: Triton's answers alone, 64 chunks a call.

The memories of both ways are compared. Redis, Triton and the process share the machine's cores. Not
measured: Faust and its budget of a second in five, several apps at once. `--record` keeps the
figures.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa
import torch

from benchmarks.common import CONSOLE, TOPICS, is_recording
from compose.figures import report
from compose.local.foreground import running_stack
from compose.local.stack import StackOptions
from compose.memories import memory_of
from features.config import StateConfig
from features.keys import bucket_of, buckets_of
from features.lake import BLOCK_OFFSETS, LAKE_SCHEMA, file_name, partition_folder, write_file
from features.lake_users import stream_users
from features.lifelong import MEMORY_BYTES, memory_difference
from features.lifelong_store import LifelongStore, decode_memory, put_live_memories
from features.nearline import SessionStore, markers_key
from features.redis import WRITTEN, BucketWrite, StateStore, connect, execute
from features.row import encode_write
from features.schema import schema_hash
from features.state import EMPTY_STATE, RECORD, Accepted, Position, step
from scoring.triton import TritonServer
from streams.fold import TritonFold
from streams.lifelong import FOLD_CHUNKS_MAX, Compactor
from streams.lifelong_build import MemoryBuilder
from streams.progress import progress_bar
from trainer.dataset import EventLog
from trainer.export import Provenance, export
from trainer.loop import LoopConfig
from trainer.publish import publish
from trainer.train import TrainConfig, train

if TYPE_CHECKING:
    from features.lifelong import LiveMemory

NUM_USERS: Final = int(os.environ.get("USERS", "2000"))
NUM_EVENTS: Final = int(os.environ.get("EVENTS", "1024"))
NUM_ITEMS: Final = 50_000
NUM_PARTITIONS: Final = 4
_RULES: Final = StateConfig()
_START_MS: Final = 1_763_700_000_000
_SEED: Final = 7
_CALLS: Final = 20
_Columns = dict[str, "np.ndarray[Any, Any]"]


def drawn() -> _Columns:
    """Return everybody's events, those of all users by turns."""
    source = np.random.default_rng(_SEED)
    size = NUM_USERS * NUM_EVENTS
    return {
        "user_id": np.tile(np.arange(NUM_USERS), NUM_EVENTS),
        "item_id": np.minimum(source.zipf(1.2, size), NUM_ITEMS),
        "event_time_ms": _START_MS + np.repeat(np.arange(NUM_EVENTS), NUM_USERS) * 60_000,
        "event_hash": np.arange(1, size + 1),
        "dwell_ms": source.integers(0, 60_000, size),
    }


def publish_model(events: _Columns, folder: Path, triton: str) -> LiveMemory:
    """Return what a published model of default size reads."""
    few = slice(0, 20_000)
    size = events["user_id"][few].size
    log = EventLog.from_columns(
        {
            "user_id": events["user_id"][few],
            "item_id": events["item_id"][few],
            "event_time_ms": events["event_time_ms"][few],
            "ordinal": np.arange(size) // NUM_USERS,
            "action": np.ones(size, np.uint8),
            "domain": np.zeros(size, np.uint64),
            "dwell_ms": events["dwell_ms"][few],
        }
    )
    loop = LoopConfig(budget_s=1.0, num_threads=1)
    trained = train(log, TrainConfig(loop=loop))
    provenance = Provenance(
        name="gems",
        created_ms=_START_MS,
        window_from={"0": 0},
        window_to={"0": size},
        feature_schema_hash=schema_hash(_RULES),
        metrics={},
    )
    export(trained, folder / "package", provenance)
    with TritonServer(triton) as server:
        version = publish(folder / "package", folder / "model_repo", [server]).version
    found = memory_of(folder / "model_repo", version)
    assert found is not None
    return found


def write_states(store: StateStore, events: _Columns) -> None:
    """Every user's row and chunks are in Redis, and every session is out."""
    store.claim_generation()
    order = np.argsort(events["user_id"], kind="stable")
    columns = {name: column[order].reshape(NUM_USERS, -1) for name, column in events.items()}
    offsets = dict.fromkeys(range(1_024), -1)
    with progress_bar("states", total=NUM_USERS, unit="users") as advance:
        for user in range(NUM_USERS):
            rows = zip(*(columns[name][user].tolist() for name in _FIELDS), strict=True)
            log = [
                Accepted(Position(0, 0, n), time_ms, item, time_ms, 0, hashed, dwell, 0.0, 1)
                for n, (item, time_ms, hashed, dwell) in enumerate(rows)
            ]
            change = step(EMPTY_STATE, log, _RULES)
            write = encode_write(EMPTY_STATE, change, len(_RULES.actions))
            bucket = bucket_of(user)
            before = offsets[bucket]
            offsets[bucket] = max(before, 0) + 1
            one = BucketWrite(bucket, 0, 0, before, offsets[bucket], {user: write})
            assert store.write_buckets([one]) == [WRITTEN]
            name = markers_key(store.generation, bucket)
            execute(store.client, "HSET", name, user, b"4294967295!")
            advance(1)


_FIELDS: Final = ("item_id", "event_time_ms", "event_hash", "dwell_ms")


def write_lake(root: Path, events: _Columns) -> None:
    """The same events lie in a lake."""
    partition_of = buckets_of(events["user_id"]) % NUM_PARTITIONS
    for partition in range(NUM_PARTITIONS):
        own = {name: column[partition_of == partition] for name, column in events.items()}
        folder = partition_folder(root, TOPICS.events, partition)
        folder.mkdir(parents=True)
        for start in range(0, own["user_id"].size, BLOCK_OFFSETS):
            part = {name: column[start : start + BLOCK_OFFSETS] for name, column in own.items()}
            size = part["user_id"].size
            write_file(folder / file_name(start, start + size - 1), _table(part, start, size))


def _table(part: _Columns, start: int, size: int) -> pa.Table:
    columns = {
        "offset": np.arange(start, start + size),
        "append_time_ms": part["event_time_ms"],
        "user_id": part["user_id"],
        "item_id": part["item_id"],
        "action": pa.array(["click"] * size),
        "event_time_ms": part["event_time_ms"],
        "event_hash": part["event_hash"].astype(np.uint64),
        "event_id": pa.array([""] * size),
        "domain": pa.nulls(size, pa.string()),
        "dwell_ms": part["dwell_ms"].astype(np.int32),
        "value": np.zeros(size, np.float32),
        "request_id": pa.nulls(size, pa.string()),
        "position": pa.nulls(size, pa.int32()),
    }
    return pa.table([columns[name] for name in LAKE_SCHEMA.names], names=LAKE_SCHEMA.names)


def fold_rate(fold: TritonFold, live: LiveMemory) -> float:
    """Return the events a second of the compressor alone."""
    records = np.zeros((FOLD_CHUNKS_MAX, _RULES.chunk), RECORD)
    records["item_id"] = np.random.default_rng(_SEED).integers(1, NUM_ITEMS, records.shape)
    fold(live.lifelong_model_version, records)
    started = time.perf_counter()
    for _ in range(_CALLS):
        fold(live.lifelong_model_version, records)
    return _CALLS * records.size / (time.perf_counter() - started)


def measure(folder: Path) -> dict[str, object]:
    """Return the figures."""
    shutil.copytree("model_repo", folder / "model_repo", ignore=_versions)
    options = StackOptions(
        run_dir=folder / "run",
        services=frozenset({"redis", "triton"}),
        model_repository=folder / "model_repo",
        persist=False,
    )
    events = drawn()
    with running_stack(options, report=CONSOLE.print) as stack:
        live = publish_model(events, folder, stack.addresses.triton_grpc)
        store = StateStore(connect(stack.addresses.redis), 1, _RULES)
        memories = LifelongStore.of(store)
        write_states(store, events)
        write_lake(folder / "lake", events)
        put_live_memories(store.client, [live])
        with TritonServer(stack.addresses.triton_grpc) as server:
            return compare(memories, live, TritonFold(server), folder / "lake")


def compare(
    memories: LifelongStore, live: LiveMemory, fold: TritonFold, lake: Path
) -> dict[str, object]:
    """Compact, build, and return how fast both were and how much they differ."""
    compressor = fold_rate(fold, live)
    compactor = Compactor(memories, SessionStore(memories.client, memories.generation), fold)
    started = time.perf_counter()
    compactor.round()
    streaming_s = time.perf_counter() - started
    version, users = live.memory_version, list(range(NUM_USERS))
    streamed = [decode_memory(raw or b"", version) for raw in memories.read(users, version)]
    memories.discard_version(version)
    with progress_bar("memories", total=NUM_USERS, unit="users") as advance:
        builder = MemoryBuilder(memories, live, fold, advance=advance)
        started = time.perf_counter()
        done = builder.run(stream_users(lake, TOPICS.events, _RULES))
        batch_s = time.perf_counter() - started
    built = [decode_memory(raw or b"", version) for raw in memories.read(users, version)]
    pairs = [(a, b) for a, b in zip(streamed, built, strict=True) if a and b]
    num_events = sum(memory.num_events for memory, _ in pairs)
    assert len(pairs) == NUM_USERS
    assert num_events == done.num_chunks * _RULES.chunk
    return {
        "events_per_s_nearline": round(num_events / streaming_s),
        "events_per_s_batch": round(num_events / batch_s),
        "events_per_s_compressor": round(compressor),
        "events_folded": num_events,
        "users": NUM_USERS,
        "difference_max": max(memory_difference(*pair) for pair in pairs),
        "memory_bytes_per_user": MEMORY_BYTES,
    }


def _versions(folder: str, names: list[str]) -> list[str]:
    """Leave out what was published into the checkout's own repository."""
    return [name for name in names if name.isdecimal() and Path(folder).name != "recommend"]


def main() -> None:
    """Measure and print."""
    keep = is_recording(__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="moveline-bench-") as folder:
        figures = measure(Path(folder))
    report(
        "bench-compact",
        figures,
        command=f"make bench-compact USERS={NUM_USERS} EVENTS={NUM_EVENTS}",
        caveats={"shared": "Redis, Triton and the process share the machine's cores"},
        keep=keep,
    )


if __name__ == "__main__":
    main()
