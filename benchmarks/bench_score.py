"""How long does an answer take for users with 1,000 to 1,000,000 events, and what do they cost?

Workload: real Redis and Triton on this machine. One user of each lifetime is written as the worker
writes (R 64, M 448, C 64), in parts, and after each part the compactor folds what waits through the
model `lifelong` in Triton. A retrieval model of the default sizes over 20,000 items answers (its
training is short: quality is not measured). Then `recommend` is asked for one
user at a time, the lifetimes taking turns, so that noise meets all of them alike; and by eight
callers at once for requests/s. Bytes are what Redis says of the keys of the oldest user.
Beside it: mid-term attention with the indexer against full attention over 5,000 events
(benchmarks/indexer.py), and the machine code of the exported graph against the graph interpreted,
one user and one thread, without Triton. Not measured: a network, Triton on another machine,
batches of many users.

  ROUNDS=n    requests of each lifetime (300)
  LIFETIMES=a,b,...   events of the users (1000,10000,100000,1000000)
  TRAIN_S=n   seconds the indexer's model may learn (240); 0 leaves recall out, loudly
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from benchmarks.common import CONSOLE, is_recording
from benchmarks.indexer import TRAIN_S, latencies, recalls
from compose.figures import report
from compose.local.foreground import running_stack
from compose.local.stack import StackOptions
from compose.memories import memory_of
from features.config import StateConfig
from features.keys import bucket_of, chunks_key, memories_key, row_key
from features.lifelong_store import LifelongStore
from features.nearline import SessionStore, markers_key
from features.redis import WRITTEN, BucketWrite, CatalogueStore, Pointers, StateStore, connect
from features.redis_client import execute
from features.row import encode_write
from features.state import EMPTY_STATE, Accepted, Position, step
from scoring.client import Recommender
from scoring.live import REFRESH_S
from scoring.signature import RECOMMEND_MODEL, Degraded
from scoring.triton import TritonServer
from streams.fold import TritonFold
from streams.lifelong import Compactor
from streams.progress import progress_bar
from trainer.dataset import EventLog
from trainer.export import Provenance, export
from trainer.golden import golden_inputs
from trainer.loop import LoopConfig
from trainer.package import Package
from trainer.publish import publish
from trainer.train import TrainConfig, train

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from features.lifelong import LiveMemory
    from features.state import UserState

RULES: Final = StateConfig()
LIFETIMES: Final = tuple(
    int(text) for text in os.environ.get("LIFETIMES", "1000,10000,100000,1000000").split(",")
)
ROUNDS: Final = int(os.environ.get("ROUNDS", "300"))
NUM_ITEMS: Final = 20_000
CALLERS: Final = 8
LOAD_S: Final = 5.0
# Events written and then compacted together; as many chunks wait at most.
PART: Final = 2_048
_WARM_UP: Final = 20
_GRAPH_CALLS: Final = 50
_START_MS: Final = 1_600_000_000_000
_GAP_MS: Final = 30_000
_DEADLINE_S: Final = 10.0
_SETTLE_S: Final = 30.0
# Said of a session that never ends, so that its chunks count as free to go.
_ALL_CLOSED: Final = b"4294967295!"


def item_at(user: int, number: int) -> int:
    """Return the item of a user's event: mostly one of its own 200."""
    return (user * 7_919 + number * number % 200 * 101) % NUM_ITEMS


def events(user: int, begin: int, end: int) -> list[Accepted]:
    """Return a part of a user's log."""
    return [
        Accepted(
            position=Position(0, 0, number),
            append_time_ms=_START_MS + number * _GAP_MS,
            item_id=item_at(user, number),
            event_time_ms=_START_MS + number * _GAP_MS,
            domain=number % 30,
            event_hash=(user << 32) + number,
            dwell_ms=number % 5_000,
            value=float("nan"),
            action=1 + number % 7,
        )
        for number in range(begin, end)
    ]


def export_model(folder: Path) -> Path:
    """Return a package of the default sizes, trained for a moment."""
    rng = np.random.default_rng(5)
    user = np.repeat(np.arange(500), 60)
    log = EventLog.from_columns(
        {
            "user_id": user,
            # Every item once, so that the vocabulary is whole.
            "item_id": np.concatenate(
                (np.arange(NUM_ITEMS), rng.integers(0, NUM_ITEMS, len(user) - NUM_ITEMS))
            ),
            "event_time_ms": _START_MS + rng.integers(0, 10**9, len(user)),
            "ordinal": np.tile(np.arange(60), 500),
            "domain": (np.arange(len(user)) % 30).astype(np.uint64),
            "action": np.ones(len(user), np.uint8),
        }
    )
    loop = LoopConfig(epochs=0.01, num_threads=1)
    trained = train(log, TrainConfig(train_quantile=0.98, loop=loop))
    package = folder / "package"
    provenance = Provenance(
        name="gems",
        created_ms=_START_MS,
        window_from={},
        window_to={},
        feature_schema_hash="0" * 16,
        metrics={},
    )
    export(trained, package, provenance, machine_code="auto")
    return package


def write_user(store: StateStore, compactor: Compactor, live: LiveMemory, user: int) -> None:
    """Write a user's lifetime as worker and compactor do, by turns."""
    bucket, state, checkpoint = bucket_of(user), EMPTY_STATE, -1
    execute(store.client, "HSET", markers_key(store.generation, bucket), user, _ALL_CLOSED)
    lifetime = LIFETIMES[user]
    with progress_bar(f"user of {lifetime:,}", total=lifetime, shown=True) as advance:
        for begin in range(0, lifetime, PART):
            end = min(begin + PART, lifetime)
            state = _write_part(store, state, user, range(begin, end), checkpoint)
            checkpoint = end
            failure = compactor.compact([user], [live])
            if failure is not None:
                raise failure
            advance(end - begin)


def _write_part(
    store: StateStore, state: UserState, user: int, numbers: range, checkpoint: int
) -> UserState:
    change = step(state, events(user, numbers.start, numbers.stop), RULES)
    row = encode_write(state, change, len(RULES.actions))
    write = BucketWrite(bucket_of(user), 0, 0, checkpoint, numbers.stop, {user: row})
    assert store.write_buckets([write]) == [WRITTEN]
    return change.state


def user_bytes(store: StateStore, user: int) -> int:
    """Return what Redis holds for a user, its overhead per key in it."""
    names = [make(store.generation, user) for make in (row_key, chunks_key, memories_key)]
    found = [execute(store.client, "MEMORY", "USAGE", name, "SAMPLES", 0) for name in names]
    return sum(size for size in found if size is not None)


def ask_in_turn(recommender: Recommender) -> dict[int, list[float]]:
    """Return milliseconds of the answers by user, the users taking turns."""
    taken: dict[int, list[float]] = {user: [] for user in range(len(LIFETIMES))}
    with progress_bar("ask", total=ROUNDS, shown=True) as advance:
        for number in range(_WARM_UP + ROUNDS):
            for user, milliseconds in taken.items():
                started = time.perf_counter()
                answer = recommender.recommend(user, k=10, deadline_s=_DEADLINE_S)
                if number >= _WARM_UP:
                    milliseconds.append(1000 * (time.perf_counter() - started))
                assert answer.provenance.degraded is Degraded.NONE, answer.provenance
            advance(int(number >= _WARM_UP))
    return taken


def requests_per_s(recommender: Recommender) -> float:
    """Return answers per second of callers that each wait for theirs."""
    until = time.perf_counter() + LOAD_S
    counts = [0] * CALLERS

    def call(caller: int) -> None:
        while time.perf_counter() < until:
            user = (caller + counts[caller]) % len(LIFETIMES)
            recommender.recommend(user, k=10, deadline_s=_DEADLINE_S)
            counts[caller] += 1

    threads = [threading.Thread(target=call, args=(caller,)) for caller in range(CALLERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(counts) / LOAD_S


def wait_for_memories(recommender: Recommender) -> None:
    """Return once every instance of `recommend` reads the memories of the oldest user.

    Raises:
        TimeoutError: answers come without.
    """
    oldest, deadline = len(LIFETIMES) - 1, time.monotonic() + _SETTLE_S
    followed = time.monotonic()
    while time.monotonic() < deadline:
        answer = recommender.recommend(oldest, k=1, deadline_s=_DEADLINE_S)
        if answer.provenance.contribution[2] == 0:
            followed = time.monotonic()
        if time.monotonic() - followed > 2 * REFRESH_S:
            return
    raise TimeoutError("answers come without lifelong memory")


def graph_ms(folder: Path) -> dict[str, float]:
    """Return the median ms of one user's answer by the graph, compiled and interpreted."""
    package = Package.load(folder)
    inputs = {
        name: torch.from_numpy(array)
        for name, array in golden_inputs(package.manifest, package.item_ids_V).items()
    }
    batched = {spec["name"] for spec in package.manifest["inputs"] if spec["batched"]}
    one = [array[:1] if name in batched else array for name, array in inputs.items()]
    taken: dict[str, list[float]] = {"compiled": [], "interpreted": []}
    with torch.inference_mode():
        # By turns, so that noise meets both alike.
        for _ in range(_WARM_UP + _GRAPH_CALLS):
            for kind, graph in (("compiled", package.graph), ("interpreted", package.portable)):
                started = time.perf_counter()
                graph(*one)
                taken[kind].append(1000 * (time.perf_counter() - started))
    return {kind: round(statistics.median(ms[_WARM_UP:]), 3) for kind, ms in taken.items()}


def measure(addresses: Any, repository: Path, folder: Path) -> Mapping[str, Any]:  # noqa: ANN401
    """Return the figures of the served model."""
    client = connect(addresses.redis)
    store = StateStore(client, 1, RULES)
    store.claim_generation()
    package = export_model(folder)
    graph = graph_ms(package)
    CONSOLE.print(f"the graph, one user, ms: {graph}")
    with TritonServer(addresses.triton_grpc) as server:
        version = publish(package, repository, [server]).version
        live = memory_of(repository, version)
        assert live is not None
        compactor = Compactor(
            LifelongStore.of(store), SessionStore(client, store.generation), TritonFold(server)
        )
        for user in range(len(LIFETIMES)):
            write_user(store, compactor, live, user)
        CatalogueStore(client).put_pointers(Pointers(version, 1, live.memory_version))
        server.load(RECOMMEND_MODEL)
    with Recommender(addresses.triton_grpc) as recommender:
        wait_for_memories(recommender)
        taken = ask_in_turn(recommender)
        rate = requests_per_s(recommender)
    p50 = {LIFETIMES[user]: statistics.median(values) for user, values in taken.items()}
    p99 = {LIFETIMES[user]: float(np.quantile(values, 0.99)) for user, values in taken.items()}
    CONSOLE.print(f"p50 ms by lifetime: {p50}")
    return {
        **{f"p50_ms_{short(lifetime)}": round(value, 3) for lifetime, value in p50.items()},
        **{f"p99_ms_{short(lifetime)}": round(value, 3) for lifetime, value in p99.items()},
        "ratio_1m_10k": round(p50[LIFETIMES[-1]] / p50[LIFETIMES[min(1, len(LIFETIMES) - 1)]], 3),
        "requests_per_s": round(rate, 1),
        "graph_compiled_ms": graph["compiled"],
        "graph_interpreted_ms": graph["interpreted"],
        "bytes_per_user_1m": user_bytes(store, len(LIFETIMES) - 1),
    }


def short(lifetime: int) -> str:
    """Return a lifetime as figures name it.

    >>> short(1_000), short(1_000_000), short(1_500)
    ('1k', '1m', '1500')
    """
    if lifetime % 1_000_000 == 0:
        return f"{lifetime // 1_000_000}m"
    return f"{lifetime // 1_000}k" if lifetime % 1_000 == 0 else str(lifetime)


def versions_apart(folder: str, names: list[str]) -> Iterator[str]:
    """Yield what is a published version of `gems` or `lifelong`: no part of the measurement."""
    for name in names:
        if name.isdecimal() and Path(folder).name != RECOMMEND_MODEL:
            yield name


def main() -> None:
    """Measure everything and report."""
    keep = is_recording(__doc__)
    torch.set_num_threads(1)
    attention = latencies(torch.device("cpu"))
    CONSOLE.print(f"mid-term attention on one CPU thread: {attention}")
    recall: dict[str, float] = {}
    if TRAIN_S > 0:
        recall = recalls()
    else:
        CONSOLE.print("[bold red]TRAIN_S=0: the indexer's recall is left out.[/bold red]")
    with tempfile.TemporaryDirectory(prefix="moveline-bench-") as name:
        folder = Path(name)
        repository = folder / "model_repo"
        shutil.copytree("model_repo", repository, ignore=lambda f, n: list(versions_apart(f, n)))
        options = StackOptions(
            run_dir=folder,
            model_repository=repository,
            services=frozenset({"redis", "triton"}),
            triton_environment={"MOVELINE_REDIS__URL": "{redis}"},
            persist=False,
        )
        with running_stack(options, report=CONSOLE.print) as stack:
            served = measure(stack.addresses, repository, folder)
    report(
        "bench-score",
        {
            **served,
            "indexer_latency_ratio_5k": attention["ratio_served"],
            "indexer_recall_ratio_5k": recall.get("recall_ratio"),
            "attention": attention,
            "recall": recall,
            "rules": {"recent": RULES.recent, "mid": RULES.mid, "chunk": RULES.chunk},
            "indexer_sizes": dataclasses.asdict(TrainConfig().model.indexer),
        },
        command="make bench-score",
        caveats={
            "machine": "callers, Triton and Redis share the cores",
            "indexer": "one CPU thread; python -m benchmarks.indexer on a GPU",
        },
        keep=keep,
    )


if __name__ == "__main__":
    main()
