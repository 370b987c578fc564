"""How fast is a generation built again, from Kafka and from the lake, next to live ingest?

Workload: 1,000,000 JSON events of 100,000 users (Zipf 1.1, seed 1) in 4 partitions, published and
written to the lake beforehand; Redis, broker and the one process that is measured share a machine.
Measured one after the other: a worker into g1 (live ingest), `moveline replay` into g2 from Kafka,
and into g3 from the lake, which has everything. A replay's rate is the one it prints: from its
first look at the log, after Python has started, to its last event in Redis; the worker's is from
its first micro-batch on. Afterwards every user of g2 and g3 must equal g1, byte by byte, and
`moveline audit` must find no difference from the oracle in about 200 users.
EVENTS=n measures less. Not measured: a replay beside live traffic, the lake on another machine.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.common import (
    CONSOLE,
    WorkerProcess,
    is_recording,
    kafka_and_redis,
    kafka_home,
    publish,
    zipf_users,
)
from compose.figures import report
from features.config import StateConfig
from features.redis import StateStore, connect
from streams.compare import compare_generations

if TYPE_CHECKING:
    from compose.local.stack import LocalStack

NUM_EVENTS: Final = int(os.environ.get("EVENTS", "1000000"))
NUM_USERS: Final = 100_000
# A replay's last words: "1,000,000 records in 8.1 s (123,456/s): ...".
_SAID: Final = re.compile(r"([\d,]+) records in [\d.]+ s \(([\d,]+)/s\)")
AUDIT_USERS: Final = 200


class CommandFailedError(Exception):
    """A command of the benchmark ended with an error: there is nothing to measure."""


def moveline(stack: LocalStack, lake: Path, *arguments: str, fails: bool = False) -> str | None:
    """Return what a command printed; None if it failed, where `fails` says that it may."""
    addresses = stack.addresses
    where = ["--kafka", addresses.kafka, "--lake", str(lake)]
    if arguments[0] != "lake":
        where += ["--redis", addresses.redis]
    CONSOLE.print(f"moveline {' '.join(arguments)}")
    ran = subprocess.run(
        [sys.executable, "-m", "compose.cli", *arguments, *where],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "200"},
    )
    CONSOLE.print((ran.stdout + ran.stderr).strip(), highlight=False, markup=False)
    if ran.returncode and not fails:
        raise CommandFailedError(f"moveline {' '.join(arguments)}: {ran.stderr[-2_000:]}")
    return None if ran.returncode else ran.stdout + ran.stderr


def replay_rate(stack: LocalStack, lake: Path, into: str, origin: str) -> float:
    """Return the events/s that `moveline replay` says it made."""
    said = moveline(stack, lake, "replay", "--into", into, "--from", origin) or ""
    found = _SAID.search(said)
    if found is None or found[1] != f"{NUM_EVENTS:,}":
        raise CommandFailedError(f"not a replay of {NUM_EVENTS:,} events: {said[-2_000:]}")
    return float(found[2].replace(",", ""))


def is_equal(stack: LocalStack, lake: Path, into: str) -> bool:
    """Return whether every user is as in g1, and a sample is as the oracle says."""
    client, config = connect(stack.addresses.redis), StateConfig()
    stores = [StateStore(client, number, config) for number in (int(into[1:]), 1)]
    compared = compare_generations(stores[0], stores[1], lambda _: True, {0: range(4)})
    CONSOLE.print(f"{into}: {compared.num_equal:,} of {compared.num_users:,} users as in g1")
    users = str(AUDIT_USERS)
    audited = moveline(stack, lake, "audit", into, "--users", users, "--against", "g1", fails=True)
    return compared.is_equal and compared.num_users > 0 and audited is not None


def main() -> None:
    """Measure live ingest and both replays, compare what they left, and report."""
    keep = is_recording(__doc__)
    rates, equal = {}, {}
    with (
        tempfile.TemporaryDirectory(prefix="moveline-lake-") as folder,
        kafka_and_redis() as (
            stack,
            kafka,
        ),
    ):
        lake = Path(folder)
        publish(kafka, zipf_users(NUM_EVENTS, NUM_USERS, exponent=1.1, seed=1))
        moveline(stack, lake, "lake", "--until-end")
        worker = WorkerProcess(stack)
        rates["live"] = worker.rate_until(NUM_EVENTS)
        stack.stop(worker.name)
        for name, into, origin in (("kafka", "g2", "earliest"), ("lake", "g3", "lake")):
            rates[name] = replay_rate(stack, lake, into, origin)
            equal[name] = is_equal(stack, lake, into)
    report(
        "bench-replay",
        {
            **{f"{name}_events_per_s": round(rate) for name, rate in rates.items()},
            "kafka_ratio": round(rates["kafka"] / rates["live"], 2),
            "lake_ratio": round(rates["lake"] / rates["live"], 2),
            "equal": all(equal.values()),
        },
        command="make bench-replay",
        caveats={
            "broker": "Apache Kafka" if kafka_home() else "embedded",
            "machine": "broker, Redis and the process measured share the cores",
            "events": str(NUM_EVENTS),
        },
        keep=keep,
    )
    if not all(equal.values()):
        sys.exit(f"not equal: {equal}")


if __name__ == "__main__":
    main()
