"""Which model ranks best on real data, and what is live state worth?

    make bench-quality SET=complete_journey SEEDS=1 [PROTOCOL=global] [MODELS=name,...|all]
                       [BUDGET_S=200] [DATA=folder]

Workload: one data set and one protocol (docs/quality.md). Every model named is trained from
nothing with the same seconds of a processor (BUDGET_S), labels, targets and judge, and asked about
the same sample of labels after the split, each before its events are shown: with the state of the
moment (live) and, on the global protocol, with the state of the split (frozen). One file a model
and seed under benchmarks/results/quality/SET; a file that was made with the same settings is not
made again, so that a run that was stopped goes on. `make quality-pages` makes tables and plots.
Not measured: latency (bench-score) and training speed (bench-train).

The last line says of each model hr10, ndcg10, recall100 and spread (the standard deviation of
ndcg10 over seeds, null for one seed), and of the served one how much live state adds to frozen
state and how much it adds to the best model of one 64-event stream for users with more than 64
events, both relative: 0.1 is ten percent.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.common import CONSOLE
from benchmarks.quality_data import DATA_SETS, DataMissingError, load_log
from benchmarks.quality_figures import MixedResultsError, summary
from compose.figures import commit, machine, report
from trainer.batches import in_order
from trainer.contest import Budget, Contest
from trainer.protocols import Sample, Task, global_split, leave_one_out
from trainer.rivals import DEFAULT_RIVALS, RIVALS
from trainer.streaming_evaluation import RECENT, STREAMS, judge_task

if TYPE_CHECKING:
    from benchmarks.quality_data import DataSet
    from trainer.batches import BatchSource
    from trainer.contest import Entry
    from trainer.dataset import Bools, EventLog
    from trainer.rivals import Rival

QUALITY: Final = Path("benchmarks/results/quality")
# Raise it where a change of the code makes older files incomparable.
REVISION: Final = 1
# Labels that are ranked one by one for the time of an answer: those with the longest histories.
TIMED_LABELS: Final = 24


@dataclass(frozen=True, kw_only=True)
class Request:
    """What one run was asked for."""

    set_name: str
    protocol: str
    models: tuple[str, ...]
    num_seeds: int
    budget: Budget
    sample: Sample
    folder: Path = QUALITY

    def path(self, model: str, seed: int) -> Path:
        """Where the result of a model and seed is kept."""
        return self.folder / self.set_name / f"{self.protocol}-{model}-s{seed}.json"

    def seeds(self, rival: Rival) -> range:
        """Seeds from 1 on; what needs no training comes out the same for each and runs once."""
        return range(1, 2 if rival.kind == "free" else self.num_seeds + 1)


@dataclass(frozen=True)
class Ground:
    """A loaded data set, cut by a protocol."""

    data: DataSet
    log: EventLog
    task: Task

    @classmethod
    def of(cls, request: Request) -> Ground:
        """Load and cut.

        Raises:
            DataMissingError: The set is not there.
        """
        data = DATA_SETS[request.set_name]
        log, judged = load_log(data)
        return cls(data, log, _cut(data, log, judged, request))

    def facts(self) -> dict[str, int]:
        """How much there is, and how many judged users reach beyond each stream."""
        live = self.task.live
        known = live.first_row_G - self.log.offsets[live.user_G]
        return {
            "events": self.log.num_events,
            "users": len(self.log.user_ids_U),
            "items": len(np.unique(self.log.item_id_N)),
            "judged_labels": len(live),
            "judged_events": int(live.num_rows_G.sum()),
            "judged_users": len(np.unique(live.user_G)),
            "judged_users_beyond_recent": len(np.unique(live.user_G[known > RECENT])),
            "judged_users_beyond_mid": len(np.unique(live.user_G[known > STREAMS])),
        }


def _cut(data: DataSet, log: EventLog, judged: Bools | None, request: Request) -> Task:
    if request.protocol == "leave_one_out":
        return leave_one_out(log, request.sample)
    return global_split(log, request.sample, judged_N=judged, fitted_events=data.fitted_events)


def settings_of(request: Request, ground: Ground, rival: Rival, seed: int) -> dict[str, Any]:
    """Everything that decides a result; two results with the same settings are one."""
    neural = rival.kind != "free"
    return {
        "revision": REVISION,
        "set": request.set_name,
        "protocol": request.protocol,
        "rival": {
            "kind": rival.kind,
            "base": rival.base,
            "window": rival.window,
            **rival.changes,
            "sources": rival.sources,
            # Left out of the first definition, which results of old do not name.
            **({"definition": rival.definition} if rival.definition > 1 else {}),
        },
        "seed": seed,
        "sample": dataclasses.asdict(request.sample),
        "budget": dataclasses.asdict(request.budget) if neural else None,
        "repeats": ground.data.repeats,
        "half_life_ms": ground.data.half_life_ms,
        "fitted_events": ground.data.fitted_events,
        "events": ground.log.num_events,
    }


def hash_of(settings: dict[str, Any]) -> str:
    """16 hex digits of the settings."""
    text = json.dumps(settings, sort_keys=True, default=list)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def run(request: Request) -> None:
    """Make every result that is not there.

    Raises:
        DataMissingError: The set is not there.
    """
    ground = Ground.of(request)
    for seed in range(1, request.num_seeds + 1):
        contest = _contest(request, ground, seed)
        for model in request.models:
            if seed not in request.seeds(RIVALS[model]):
                continue
            settings = settings_of(request, ground, RIVALS[model], seed)
            path = request.path(model, seed)
            if path.is_file() and json.loads(path.read_text())["hash"] == hash_of(settings):
                CONSOLE.print(f"{model}, seed {seed}: there already")
                continue
            _write(path, _measured(request, ground, contest, model, settings))


def _contest(request: Request, ground: Ground, seed: int) -> Contest:
    return Contest.of(
        ground.task,
        repeats=ground.data.repeats,
        half_life_ms=ground.data.half_life_ms,
        budget=request.budget,
        seed=seed,
    )


def _measured(
    request: Request, ground: Ground, contest: Contest, model: str, settings: dict[str, Any]
) -> dict[str, Any]:
    seed = contest.seed
    started = time.monotonic()
    entry = contest.enter(model)
    ready_s = time.monotonic() - started
    judgement = judge_task(contest.source, ground.task, entry.rank, name=model)
    seconds = time.monotonic() - started
    CONSOLE.print(
        f"{model}, seed {seed}: NDCG@10 {judgement.live['ndcg10']:.4f}, "
        f"ready in {ready_s:.0f} s, judged in {seconds - ready_s:.0f} s"
    )
    return {
        "set": request.set_name,
        "protocol": request.protocol,
        "model": model,
        "seed": seed,
        "hash": hash_of(settings),
        "settings": settings,
        "facts": ground.facts(),
        **dataclasses.asdict(judgement),
        "training": _training(entry),
        "contribution": entry.contribution,
        "weights": entry.weights,
        "answer_ms": answer_ms(entry, contest.source, ground.task),
        "seconds": round(seconds, 1),
        "commit": commit(),
        "machine": machine(),
        "command": f"make bench-quality SET={request.set_name} PROTOCOL={request.protocol} "
        f"MODELS={model} BUDGET_S={request.budget.seconds:g}",
    }


def answer_ms(entry: Entry, source: BatchSource, task: Task) -> float:
    """Median processor time of ranking one label, among those that know most."""
    longest = np.argsort(-source.history_lengths(task.live), kind="stable")[:TIMED_LABELS]
    seconds = []
    for one in in_order(task.live.select(longest), size=1):
        started = time.process_time()
        entry.rank(one)
        seconds.append(time.process_time() - started)
    return round(1000 * float(np.median(seconds)), 2)


def _training(entry: Entry) -> dict[str, Any] | None:
    if entry.fitted is None:
        return None
    return {
        "steps": len(entry.fitted.losses),
        "seconds": round(entry.fitted.seconds, 1),
        "ended_by": entry.fitted.ended_by,
        "tokens": entry.fitted.num_tokens,
        "last_loss": round(float(np.mean(entry.fitted.losses[-50:])), 4),
    }


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write whole or not at all: a run may be stopped at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result) + "\n", encoding="utf-8")
    new.replace(path)


def request_of(arguments: argparse.Namespace) -> Request:
    """What the command line asks for."""
    data = DATA_SETS[arguments.set]
    protocol = arguments.protocol or data.protocols[0]
    named = {"default": DEFAULT_RIVALS, "all": tuple(RIVALS)}
    models = named.get(arguments.models) or tuple(arguments.models.split(","))
    if not data.repeats:
        models = tuple(one for one in models if not one.startswith("own_"))
    share = 1.0 if protocol == "leave_one_out" else data.label_share
    return Request(
        set_name=arguments.set,
        protocol=protocol,
        models=models,
        num_seeds=arguments.seeds,
        budget=Budget(seconds=arguments.budget_s, label_share=share),
        sample=Sample(test_users=arguments.test_users),
        folder=arguments.results,
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--set", choices=tuple(DATA_SETS), default="complete_journey")
    parser.add_argument("--protocol", choices=("global", "leave_one_out"), help="default: by set")
    parser.add_argument(
        "--models", default="default", help=f"default, all, or names of {', '.join(RIVALS)}"
    )
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 1 on")
    parser.add_argument(
        "--budget-s", type=float, default=Budget().seconds, help="seconds of training for each"
    )
    parser.add_argument("--test-users", type=int, default=Sample().test_users)
    parser.add_argument("--results", type=Path, default=QUALITY, help="folder of the result files")
    found = parser.parse_args()
    named = () if found.models in {"default", "all"} else found.models.split(",")
    if unknown := set(named) - set(RIVALS):
        parser.error(f"no model is called {', '.join(sorted(unknown))}; --help lists them")
    if found.protocol and found.protocol not in DATA_SETS[found.set].protocols:
        parser.error(f"{found.set} is measured by {' or '.join(DATA_SETS[found.set].protocols)}")
    return found


def main() -> None:
    """Measure what is missing and say what is there."""
    request = request_of(parsed())
    try:
        run(request)
        figures = summary(request.folder, request.set_name, request.protocol)
    except (DataMissingError, MixedResultsError) as error:
        CONSOLE.print(f"[bold red]{error}[/bold red]")
        raise SystemExit(2) from error
    report(
        f"bench-quality-{request.set_name}",
        figures,
        command=f"make bench-quality SET={request.set_name}",
        caveats={},
        keep=False,
    )


if __name__ == "__main__":
    main()
