"""How long does reading users' features take: ours, through Feast, and by Feast's own Redis store?

Workload: users with a session and 256 recent events (R 256, M 4,744), read 1, 10, 100 and 1,000 at
a time from one Redis on the same machine. In the same run, round after round:
ours, `features.store.read_users` into arrays of streams and sessions; ours through Feast's API; the
same features as arrays in Feast's own Redis store, through the same call; and as the floor
redis-py's pipeline that fetches the bytes ours reads and looks at none of them.
Both Feast calls end with `to_dict`, as an application's do. Not measured: a network, several
readers at once, Feast's server.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bool, Float32, Int64

from benchmarks.common import CONSOLE, is_recording
from compose.figures import report
from compose.local.foreground import running_stack
from compose.local.stack import StackOptions
from features.config import StateConfig
from features.definitions import apply, open_store
from features.keys import bucket_of, row_key
from features.online_values import user_columns
from features.redis import WRITTEN, BucketWrite, StateStore, connect
from features.row import encode_write, newest_bytes
from features.schema import View, views
from features.state import EMPTY_STATE, Accepted, Position, step
from features.store import open_state, read_users
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from features.redis import RedisClient

RULES: Final = StateConfig(recent=256, mid=4_744, chunk=256)
NUM_USERS: Final = 1_000
NUM_EVENTS: Final = 300
# A session is 20 events, 20 s apart; an hour later comes the next.
BURST: Final = 20
_HOUR_MS: Final = 3_600_000
SIZES: Final = (1, 10, 100, 1_000)
ROUNDS: Final = int(os.environ.get("ROUNDS", "200"))
_START_MS: Final = 1_763_700_000_000
_VIEWS: Final = ("user_session", "user_recent")
_DTYPES: Final = {"int64": Int64, "float32": Float32, "bool": Bool}


def time_ms(number: int) -> int:
    """Return when a user's event of that number happened."""
    burst, within = divmod(number, BURST)
    return _START_MS + burst * _HOUR_MS + within * 20_000


# The newest event is a minute old: every session is open.
_NOW_MS: Final = time_ms(NUM_EVENTS - 1) + 60_000


def events(user: int) -> list[Accepted]:
    """Return a user's log: bursts of events among 50,000 items."""
    return [
        Accepted(
            position=Position(0, 0, number),
            append_time_ms=_START_MS,
            item_id=(user * 7_919 + number * 104_729) % 50_000,
            event_time_ms=time_ms(number),
            domain=0x5418D0ABDCED061A + number % 30,
            event_hash=user * NUM_EVENTS + number,
            dwell_ms=number % 5_000,
            value=float("nan"),
            action=1 + number % 7,
        )
        for number in range(NUM_EVENTS)
    ]


def fill(client: RedisClient) -> None:
    """Write every user as the worker does."""
    store = StateStore(client, 1, RULES)
    store.claim_generation()
    writes = []
    checkpoints: dict[int, int] = {}
    for user in range(NUM_USERS):
        change = step(EMPTY_STATE, events(user), RULES)
        row = encode_write(EMPTY_STATE, change, len(RULES.actions))
        bucket = bucket_of(user)
        before = checkpoints.get(bucket, -1)
        checkpoints[bucket] = before + 1 if before >= 0 else NUM_EVENTS
        writes.append(BucketWrite(bucket, 0, 0, before, checkpoints[bucket], {user: row}))
    assert set(store.write_buckets(writes)) == {WRITTEN}


def stock_store(url: str, folder: Path) -> FeatureStore:
    """Return a Feast over its own Redis store, with the same two views."""
    config = RepoConfig(
        project="stock",
        provider="local",
        registry=str(folder / "stock.db"),
        online_store={"type": "redis", "connection_string": urlsplit(url).netloc},
        offline_store={"type": "dask"},
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.INT64)
    source = FileSource(name="log", path=str(folder / "none"), timestamp_field="event_timestamp")
    store.apply([user, *(stock_view(view, user, source) for view in wanted_views())])
    return store


def stock_view(view: View, user: Entity, source: FileSource) -> FeatureView:
    """Return the view as Feast's own store takes it."""
    fields = [
        Field(name=f.name, dtype=Array(_DTYPES[f.dtype]) if f.length else _DTYPES[f.dtype])
        for f in view.features
    ]
    return FeatureView(
        name=view.name,
        entities=[user],
        ttl=timedelta(seconds=view.ttl_s),
        schema=[Field(name="user_id", dtype=Int64), *fields],
        source=source,
    )


def wanted_views() -> list[View]:
    """Return the views that are read."""
    return [view for view in views(RULES) if view.name in _VIEWS]


def fill_stock(store: FeatureStore, ours: StateStore) -> None:
    """Write the same values into Feast's own store."""
    at = datetime.fromtimestamp(_NOW_MS / 1000, tz=UTC)
    users = list(range(NUM_USERS))
    batch = read_users(ours, users, now_ms=_NOW_MS, newest=RULES.recent)
    provider = store._get_provider()  # noqa: SLF001 - the way in below a DataFrame
    for view in wanted_views():
        table = store.get_feature_view(view.name)
        names = [feature.name for feature in view.features]
        columns = user_columns(view.name, names, batch, NUM_USERS)
        rows = [
            (
                EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=user)]),
                columns.row(user)[1],
                at,
                None,
            )
            for user in users
        ]
        provider.online_write_batch(store.config, table, rows, None)


def raw_pipeline(client: RedisClient, users: Sequence[int]) -> list[bytes]:
    """Fetch the bytes and look at none of them."""
    pipeline = client.pipeline(transaction=False)
    start = -newest_bytes(RULES.recent)
    for user in users:
        pipeline.getrange(row_key(1, user), start, -1)
    replies: list[bytes] = pipeline.execute()
    return replies


def through_feast(store: FeatureStore, users: Sequence[int]) -> dict[str, list[Any]]:
    """Read both views by Feast's public call."""
    refs = [f"{view.name}:{feature.name}" for view in wanted_views() for feature in view.features]
    read: dict[str, list[Any]] = store.get_online_features(
        refs, [{"user_id": user} for user in users]
    ).to_dict()
    return read


def refuse_difference(ours: FeatureStore, stock: FeatureStore) -> None:
    """Return if both answer the same values."""
    users = list(range(5))
    found, wanted = through_feast(ours, users), through_feast(stock, users)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert str(found[name]) == str(values), name


def medians_ms(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median of each call; every round makes each of them once, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-2, rounds):  # two rounds to warm up
        for name, call in calls.items():
            started = time.perf_counter()
            call()
            if number >= 0:
                seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(taken) * 1_000 for name, taken in seconds.items()}


def measure(url: str, folder: Path) -> dict[str, list[float]]:
    """Return the medians by kind of reading, one for each size."""
    client = connect(url)
    fill(client)
    state_store = open_state(client)
    ours, stock = open_store(redis_url=url, registry=folder / "ours.db"), stock_store(url, folder)
    apply(ours, config=RULES, lake=folder / "lake")
    ours._get_provider().online_store.clock = lambda: _NOW_MS  # noqa: SLF001 - a clock of our own
    fill_stock(stock, state_store)
    refuse_difference(ours, stock)

    def read(users: Sequence[int]) -> object:
        batch = read_users(state_store, users, now_ms=_NOW_MS, newest=RULES.recent)
        return batch.streams(), batch.sessions()

    found: dict[str, list[float]] = {}
    with progress_bar("read", total=len(SIZES), shown=True) as advance:
        for size in SIZES:
            users = list(range(size))
            medians = medians_ms(
                {
                    "floor": lambda users=users: raw_pipeline(client, users),
                    "ours": lambda users=users: read(users),
                    "ours_feast_api": lambda users=users: through_feast(ours, users),
                    "stock_feast": lambda users=users: through_feast(stock, users),
                },
                max(5, ROUNDS // (1 + size // 50)),
            )
            for name, median in medians.items():
                found.setdefault(name, []).append(round(median, 3))
            CONSOLE.print(f"{size} users: {medians}")
            advance(1)
    return found


def main() -> None:
    """Measure everything and report."""
    keep = is_recording(__doc__)
    with tempfile.TemporaryDirectory(prefix="moveline-bench-") as folder:
        options = StackOptions(run_dir=Path(folder), services=frozenset({"redis"}), persist=False)
        with running_stack(options, report=CONSOLE.print) as stack:
            found = measure(stack.addresses.redis, Path(folder))
    at_100 = {name: medians[SIZES.index(100)] for name, medians in found.items()}
    report(
        "bench-read",
        {
            "users": list(SIZES),
            "ours_ms": found["ours"],
            "ours_feast_api_ms": found["ours_feast_api"],
            "stock_feast_ms": found["stock_feast"],
            "floor_ms": found["floor"],
            **{f"{name}_100_ms": median for name, median in at_100.items()},
            "speedup_vs_feast_100": round(at_100["stock_feast"] / at_100["ours"], 1),
            "floor_ratio_100": round(at_100["ours"] / at_100["floor"], 2),
        },
        command="make bench-read",
        caveats={"machine": "Redis and reader share the cores"},
        keep=keep,
    )


if __name__ == "__main__":
    main()
