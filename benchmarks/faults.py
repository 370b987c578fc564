"""`make faults`: is every user's state exact after real processes were killed, stopped, restored?

Workload of each case: 200,000 records (EVENTS) of 5,000 users, Zipf 1.1, 1% malformed, 3% sent
twice, 3% late, in 4 partitions, published while the fault happens (benchmarks/fault_cases.py).
Afterwards every row and chunk must be, byte by byte, what one `step` over the log's valid records
gives; a sample of users must be what the oracle says; every acknowledged record must be in the log
once; the dead letters must stand for the malformed records and no others.
FAULTS=name,name chooses cases, SEED the random moments. Without Apache Kafka the embedded broker is
used, and what it cannot survive is skipped.
"""

from __future__ import annotations

import logging
import os
import random
import sys
import time
from collections import Counter, defaultdict
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import CONSOLE, TOPICS, is_recording, kafka_and_redis, kafka_home
from benchmarks.fault_bench import Bench, CaseFailedError, Publisher, Traffic
from benchmarks.fault_cases import CASES
from compose.errors import ComposeError
from compose.figures import report
from features.errors import FeatureError
from features.generations import Generations
from features.oracle import oracle_state
from features.row import decode_row, encode_row
from features.state import EMPTY_STATE, RECORD, step
from streams.compare import read_held
from streams.dead_letters import read_letters
from streams.errors import StreamError
from streams.event_log import EventLog
from streams.kafka import end_offsets

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.fault_cases import Case
    from features.config import StateConfig
    from features.redis import StateStore
    from features.state import Accepted, Change
    from streams.compare import Held

EVENTS_FULL: Final = 200_000
ORACLE_USERS: Final = 100
# The oracle answers from whole lists: its time grows with the square of a user's events.
ORACLE_EVENTS_MAX: Final = 1_500
_ORACLE_FIELDS: Final = ("item_id", "event_time_ms", "domain", "event_hash", "dwell_ms", "action")


@dataclass(kw_only=True)
class Verdict:
    """What one case left behind; every number but the first four must be 0.

    Attributes:
        num_records: records in the log.
        num_letters: of those, malformed.
        num_repeated: dead letters that came more than once, which is allowed.
        num_users: users compared.
        different: users whose row or chunks are not the expected bytes.
        by_oracle: sampled users of whom the oracle says otherwise.
        lost: events missing from the state or the log.
        doubled: events that are there more than once or should not be.
        letters: malformed records without a dead letter, and dead letters without one.
    """

    num_records: int = 0
    num_letters: int = 0
    num_repeated: int = 0
    num_users: int = 0
    different: int = 0
    by_oracle: int = 0
    lost: int = 0
    doubled: int = 0
    letters: int = 0
    seconds: float = 0.0
    note: str = ""
    failed: bool = False

    @property
    def is_equal(self) -> bool:
        """Whether nothing differs."""
        wrong = self.different + self.by_oracle + self.lost + self.doubled + self.letters
        return not wrong and not self.failed and self.num_users > 0


def judge(bench: Bench, generations: Sequence[int], verdict: Verdict) -> None:
    """Write into the verdict how log, dead letters and generations compare with what was sent."""
    by_user = _read_log(bench, verdict)
    for generation in generations:
        _judge_states(bench.store(generation), by_user, verdict)


def _read_log(bench: Bench, verdict: Verdict) -> dict[int, list[Accepted]]:
    """Return each user's valid events in the log's order, after checking log and dead letters."""
    by_user: dict[int, list[Accepted]] = defaultdict(list)
    malformed: Counter[tuple[bytes, bytes]] = Counter()
    places: set[tuple[str, str, str]] = set()
    ends = end_offsets(bench.kafka, TOPICS.events)
    events = EventLog(kafka=bench.kafka, topic=TOPICS.events)
    batches = events.batches(dict.fromkeys(ends, 0), ends, bench.store().config)
    with closing(batches):
        for batch in batches:
            verdict.num_records += batch.num_records
            for user, accepted in batch.by_user.items():
                by_user[user] += accepted
            for letter in batch.dead_letters:
                record = letter.record
                malformed[record.key or b"", record.value or b""] += 1
                places.add((TOPICS.events, str(record.partition), str(record.offset)))
    # Which records are malformed is the word of who sent them, not only of who decodes them.
    sent = bench.publisher.traffic.malformed
    verdict.letters += (malformed - sent).total() + (sent - malformed).total()
    missing = bench.publisher.num_sent - verdict.num_records
    verdict.lost += max(0, missing)
    verdict.doubled += max(0, -missing)
    found = Counter(letter.source for letter in read_letters(bench.kafka, TOPICS))
    verdict.letters += len(places ^ found.keys())
    verdict.num_letters = len(places)
    verdict.num_repeated = found.total() - len(found)
    return by_user


def _judge_states(
    store: StateStore, by_user: Mapping[int, Sequence[Accepted]], verdict: Verdict
) -> None:
    users = sorted({*by_user, *Generations(store.client).users(store.generation, lambda _: True)})
    held = read_held(store, users)
    few = [user for user in users if len(by_user.get(user, ())) <= ORACLE_EVENTS_MAX]
    # The busiest ones it can do, and the quiet ones.
    few.sort(key=lambda user: -len(by_user.get(user, ())))
    sample = {*few[: ORACLE_USERS // 10], *few[:: max(1, len(few) * 10 // (ORACLE_USERS * 9))]}
    for user in users:
        events = by_user.get(user, ())
        change = step(EMPTY_STATE, events, store.config) if events else None
        _judge_user(change, held.get(user), store.config, verdict)
        if user in sample and change is not None:
            verdict.by_oracle += not _oracle_agrees(change, events, store.config)
    verdict.num_users += len(users)


def _judge_user(
    change: Change | None, held: Held | None, config: StateConfig, verdict: Verdict
) -> None:
    first = 0 if held is None else held.first
    chunks = {c.number: c.records for c in (change.chunks if change else ()) if c.number >= first}
    row = None if change is None else encode_row(change.state, len(config.actions))
    if held is not None and row == held.row and chunks == dict(held.chunks):
        return
    verdict.different += 1
    expected = _hashes([*chunks.values(), b"" if change is None else change.state.tail])
    found = _hashes([] if held is None else [*held.chunks.values(), decode_row(held.row).tail])
    verdict.lost += (expected - found).total()
    verdict.doubled += (found - expected).total()


def _hashes(packed: Sequence[bytes]) -> Counter[int]:
    """Return how often each event is in a user's whole stream."""
    return Counter(np.frombuffer(b"".join(packed), RECORD)["event_hash"].tolist())


def _oracle_agrees(change: Change, events: Sequence[Accepted], config: StateConfig) -> bool:
    """Return whether the state that the row was equal to is also the oracle's."""
    oracle, state = oracle_state(events, config), change.state
    session = state.user_session and state.user_session._asdict()
    if (state.next_ordinal, state.num_late) != (len(oracle.accepted), oracle.num_late):
        return False
    lists = [
        (chunk.records, theirs) for chunk, theirs in zip(change.chunks, oracle.chunks, strict=True)
    ]
    for packed, numbered in [*lists, (state.tail, oracle.tail)]:
        records = np.frombuffer(packed, RECORD)
        if records["ordinal"].tolist() != [n.ordinal for n in numbered]:
            return False
        for name in _ORACLE_FIELDS:
            if records[name].tolist() != [getattr(n.event, name) for n in numbered]:
                return False
    return session == oracle.session


def run_case(name: str, case: Case, *, num_events: int, seed: int, has_apache: bool) -> Verdict:
    """Return how one case ended; what it raised is a verdict too."""
    verdict = Verdict()
    began_s = time.monotonic()
    CONSOLE.rule(name)
    try:
        with kafka_and_redis() as (stack, kafka):
            publisher = Publisher(kafka, Traffic(num_events, seed))
            source = random.Random(f"{name}-{seed}")  # noqa: S311 - moments, not cryptography
            bench = Bench(stack, kafka, publisher, num_events, source, has_apache)
            verdict.note = case.run(bench)
            if bench.num_restarts:
                verdict.note += f", {bench.num_restarts} restarts of workers that ended"
            for worker in list(bench.workers):
                bench.leave(worker)
            judge(bench, case.generations, verdict)
    except (CaseFailedError, ComposeError, FeatureError, StreamError) as error:
        verdict.failed = True
        verdict.note = f"{type(error).__name__}: {error}"
    verdict.seconds = time.monotonic() - began_s
    CONSOLE.print(f"{name}: {'equal' if verdict.is_equal else 'NOT EQUAL'}; {verdict.note}")
    return verdict


def print_table(verdicts: Mapping[str, Verdict], skipped: Sequence[str], broker: str) -> None:
    """Print a line for each case."""
    table = Table(title=f"faults on {broker}", title_justify="left")
    table.add_column("case")
    table.add_column("what was done")
    columns = ("records", "malformed", "letters again", "users", "different", "by oracle")
    for column in (*columns, "lost", "doubled", "letters wrong", "s"):
        table.add_column(column, justify="right")
    table.add_column("equal")
    for name, one in verdicts.items():
        counts = (one.num_records, one.num_letters, one.num_repeated, one.num_users)
        wrong = (one.different, one.by_oracle, one.lost, one.doubled, one.letters)
        cells = [f"{count:,}" for count in (*counts, *wrong)]
        is_equal = "[green]yes[/green]" if one.is_equal else "[bold red]NO[/bold red]"
        table.add_row(name, one.note, *cells, f"{one.seconds:.0f}", is_equal)
    for name in skipped:
        table.add_row(name, "[bold red]SKIPPED: needs Apache Kafka[/bold red]")
    Console(width=200).print(table)


def main() -> int:
    """Run the cases and return 1 if any of them left something that differs."""
    keep = is_recording(__doc__)
    num_events = int(os.environ.get("EVENTS", str(EVENTS_FULL)))
    seed = int(os.environ.get("SEED") or "1")
    chosen = [name for name in os.environ.get("FAULTS", "").split(",") if name] or list(CASES)
    unknown = sorted(set(chosen) - CASES.keys())
    if unknown:
        sys.exit(f"FAULTS names {', '.join(unknown)}; the cases are {', '.join(CASES)}")
    has_apache = kafka_home() is not None
    skipped = [name for name in chosen if CASES[name].needs_apache and not has_apache]
    for name in skipped:
        CONSOLE.print(f"[bold red]SKIPPED {name}: only Apache Kafka keeps what it acknowledged[/]")
    run = [name for name in chosen if name not in skipped]
    # While a broker is dead on purpose librdkafka says so, many times a second.
    logging.getLogger("moveline.kafka").setLevel(logging.CRITICAL)
    verdicts = {
        name: run_case(name, CASES[name], num_events=num_events, seed=seed, has_apache=has_apache)
        for name in run
    }
    broker = "Apache Kafka" if has_apache else "the embedded broker"
    print_table(verdicts, skipped, broker)
    num_equal = sum(one.is_equal for one in verdicts.values())
    report(
        "faults",
        {
            "cases": len(verdicts),
            "equal": num_equal,
            "lost": sum(one.lost for one in verdicts.values()),
            "doubled": sum(one.doubled for one in verdicts.values()),
            "skipped": skipped,
            "events_per_case": num_events,
        },
        command="make faults",
        caveats={"broker": broker, "events": f"{num_events} a case, seed {seed}"},
        keep=keep,
    )
    return int(num_equal < len(verdicts))


if __name__ == "__main__":
    sys.exit(main())
