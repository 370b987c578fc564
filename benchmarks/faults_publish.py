"""Does what was live go on answering whatever happens to a publication, and does the next one heal?

Workload: real Kafka, Redis and Triton on this machine, one small version live. For each case of
benchmarks/publish_faults.py a publication is begun and broken, while one caller asks `recommend`
for eight users in turn, 20 times a second, and compares each answer with what the version that
spoke is known to answer. Then the next publication has to go live, and nothing may be left in the
repository that no pointers ever named. Not measured: time.

  CASES=name,...   some of the cases

A wrong answer: a request that failed, a version that is neither the live one nor (from step 8 on)
the new one, weights of another version than it says, or trending items while nothing was away.
Answers that say that Redis was late (STORE_AWAY) are counted apart.
"""

from __future__ import annotations

import os
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from benchmarks.common import CONSOLE, is_recording, kafka_home
from benchmarks.publish_bench import Asker, installation
from benchmarks.publish_faults import CASES, NotRefusedError
from compose.errors import ComposeError
from compose.figures import report
from features.errors import FeatureError
from scoring.errors import ScoringError
from streams.errors import StreamError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.publish_bench import Answer, Installation
    from benchmarks.publish_faults import Case


@dataclass
class Verdict:
    """How one case ended."""

    note: str = ""
    num_answers: int = 0
    num_store_away: int = 0
    wrong: list[Answer] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    is_healed: bool = False
    seconds: float = 0.0


def run_case(bench: Installation, case: Case) -> Verdict:
    """Break a publication while somebody asks; then publish, and look at what is left."""
    verdict, began_s = Verdict(), time.monotonic()
    before = bench.versions().live or 0
    asker = Asker(bench.settings.triton.address)
    try:
        with asker.asking():
            verdict.note = case.run(bench)
        _note_if_live(bench, before)
        allowed = {before, *bench.models} if case.may_go_live else {before}
        verdict.num_answers = len(asker.answers)
        verdict.num_store_away = sum(one.is_store_away for one in asker.answers)
        verdict.wrong = [
            one
            for one in asker.answers
            if bench.is_wrong(one, allowed, may_fall_back=case.may_fall_back)
            and not (one.error and case.may_fail)
        ]
        version = bench.publish(bench.packages[0])
        verdict.left = bench.leftovers()
        verdict.is_healed = bench.versions().live == version and not verdict.left
    except (
        ComposeError,
        FeatureError,
        NotRefusedError,
        RuntimeError,
        ScoringError,
        StreamError,
        TimeoutError,
    ) as error:
        verdict.note += f" {type(error).__name__}: {error}"
    verdict.seconds = time.monotonic() - began_s
    return verdict


def _note_if_live(bench: Installation, before: int) -> None:
    """Remember what the interrupted publication's version answers if it answers already."""
    live = bench.versions().live
    if live is not None and live != before and live not in bench.models:
        bench.note(live)


def print_table(verdicts: Mapping[str, Verdict]) -> None:
    """Print a line for each case."""
    table = Table(title="faults of publishing", title_justify="left")
    for column in ("case", "what was done", "answers", "wrong", "left behind", "healed", "s"):
        table.add_column(column)
    for name, one in verdicts.items():
        table.add_row(
            name,
            one.note,
            f"{one.num_answers:,}",
            f"{len(one.wrong):,}",
            ", ".join(one.left) or "nothing",
            "yes" if one.is_healed else "[bold red]NO[/bold red]",
            f"{one.seconds:.0f}",
        )
    Console(width=200).print(table)


def main() -> int:
    """Run the cases and return 1 if one did not heal or an answer was wrong."""
    keep = is_recording(__doc__)
    chosen = [name for name in os.environ.get("CASES", "").split(",") if name] or list(CASES)
    unknown = sorted(set(chosen) - CASES.keys())
    if unknown:
        sys.exit(f"CASES names {', '.join(unknown)}; there are {', '.join(CASES)}")
    verdicts = {}
    with installation(machine_code="auto") as bench:
        for package in bench.packages:
            bench.publish(package)
        for name in chosen:
            CONSOLE.rule(name)
            verdicts[name] = run_case(bench, CASES[name])
            for one in verdicts[name].wrong[:3]:
                CONSOLE.print(f"wrong: {one}", markup=False)
            CONSOLE.print(f"healed: {verdicts[name].is_healed}; {verdicts[name].note}")
    print_table(verdicts)
    num_healed = sum(one.is_healed for one in verdicts.values())
    num_wrong = sum(len(one.wrong) for one in verdicts.values())
    report(
        "faults-publish",
        {
            "cases": len(verdicts),
            "healed": num_healed,
            "wrong_answers": num_wrong,
            "answers": sum(one.num_answers for one in verdicts.values()),
            "store_away": sum(one.num_store_away for one in verdicts.values()),
        },
        command="make faults-publish",
        caveats={"broker": "Apache Kafka" if kafka_home() else "the embedded broker"},
        keep=keep,
    )
    return int(num_healed < len(verdicts) or num_wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
