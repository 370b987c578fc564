"""What is it worth to train again, and what is live state worth?

    make bench-staleness [SERVED=gems|gems_no_sources] [DATA=folder] [RECORD=1]

Workload: globo_clicks, six weeks of a news portal, 1 to 16 October 2017 (UTC). One user in six, by
hash, with every click of theirs. One model is trained on 1 to 9 October and answers from the 10th
on, in event time: it is never trained again (once), each midnight (daily), or every six hours
(sixhourly). Each training goes on from the arm's model before (warm start), on the labels of the 24
hours before it, for a fixed number of seconds of one processor: 160 a day for both arms, so one
times 160 or four times 40. Items that are new by then get their ids, and an arm that is not trained
cannot name them.

Judged: 1,200 users that click after the 9th, at most 12 clicks of each on each day, drawn by seed.
Every click is ranked against all items before it is shown, the clicks of a user at one time
together; with the state of the moment (live), and with the state of the arm's last training
(frozen): what a user did since, and what is popular since, is not known then. SERVED=gems is what
is served: the model and the live sources, weighed by the gate that the training left, in which the
model's odds follow from the clicks since the training before; gems_no_sources is the model alone.
Beside them, what needs no model: clicks lately, halved every three hours, and what others clicked
after the user's last item.

Not measured: the time that a training takes to be published (bench-publish). One file an arm and
training is kept under benchmarks/results/staleness, with the newest model of each arm, so that a
run that was stopped goes on. About an hour of one processor.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import CONSOLE
from benchmarks.quality_data import DATA_SETS, DataMissingError, load_log
from benchmarks.staleness import REFERENCES, Ground, run_arm, run_references
from benchmarks.staleness_protocol import ARMS, DAY_MS, SERVED, Protocol
from compose.errors import ComposeError
from compose.figures import RESULTS, report
from trainer.streaming_evaluation import PerUser, Targets, figures, paired_bootstrap

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

STATES: Final = ("frozen", "live")
COLOURS: Final = {"once": "tab:red", "daily": "tab:orange", "sixhourly": "tab:blue"}
# 1, 10 and 17 October 2017, midnight UTC.
BEGIN_MS, SPLIT_MS, END_MS = 1_506_816_000_000, 1_507_593_600_000, 1_508_198_400_000


class UnfinishedError(ComposeError):
    """A result is not there yet."""


def places_of(ground: Ground, arm: str, name: str) -> dict[str, NDArray[np.int64]]:
    """The place of every judged event, with live and with frozen state, intervals in order.

    Args:
        ground: What was run.
        arm: Whose moments cut the time.
        name: What was ranked: the arm itself, or a ranking without a model.

    Raises:
        UnfinishedError: An interval was not judged.
    """
    parts = []
    for moment_ms in ground.protocol.moments(arm):
        found = ground.found(name, moment_ms)
        if found is None:
            raise UnfinishedError(f"{ground.path(name, moment_ms)} is missing: run it again")
        parts.append(found)
    return {
        state: np.concatenate([np.array(part[state], np.int64) for part in parts])
        for state in STATES
    }


def all_places(ground: Ground) -> dict[str, NDArray[np.int64]]:
    """By name: the six arms, then the rankings without a model."""
    found = {}
    for arm in ARMS:
        for state, place_E in places_of(ground, arm, arm).items():
            found[f"{arm}_{state}"] = place_E
    for name in REFERENCES:
        # Live, the moments of an arm decide nothing.
        found[f"{name}_live"] = places_of(ground, "once", f"{name}-once")["live"]
    for arm in ARMS:
        kept = places_of(ground, arm, f"recent_popularity-{arm}")["frozen"]
        found[f"recent_popularity_frozen_{arm}"] = kept
    return found


def summary(ground: Ground) -> dict[str, Any]:
    """The six figures, and everything else that was found."""
    targets = Targets.of(ground.contest.source, ground.labels)
    found = all_places(ground)
    overall = {name: figures(targets, place_E) for name, place_E in found.items()}
    arms = [f"{arm}_{state}" for arm in ARMS for state in STATES]
    best = PerUser.of(targets, found["sixhourly_live"])
    gains = {
        name: dataclasses.asdict(
            paired_bootstrap(best, PerUser.of(targets, found[name]), seed=ground.protocol.seed)
        )
        for name in found
        if name != "sixhourly_live"
    }
    return {
        **{name: overall[name]["ndcg10"] for name in arms},
        **{f"{name}_live": overall[f"{name}_live"]["ndcg10"] for name in REFERENCES},
        "served": ground.protocol.served,
        "users": len(ground.log.user_ids_U),
        "events": ground.log.num_events,
        "judged_users": len(np.unique(ground.labels.user_G)),
        "judged_labels": len(ground.labels),
        "judged_events": overall[arms[0]]["events"],
        "overall": overall,
        "by_day": by_day(ground, targets, found),
        "sixhourly_live_minus": gains,
    }


def by_day(
    ground: Ground, targets: Targets, found: Mapping[str, NDArray[np.int64]]
) -> dict[str, dict[str, float]]:
    """NDCG@10 of each day, by name."""
    day_E = ground.labels.time_ms_G[targets.group_E] // DAY_MS
    return {
        str(np.datetime64(int(day), "D")): {
            name: figures(targets, place_E, day_E == day)["ndcg10"]
            for name, place_E in found.items()
        }
        for day in np.unique(day_E)
    }


def draw(figures_by_day: Mapping[str, Mapping[str, float]], path: Path, *, served: str) -> None:
    """Leave NDCG@10 by day as a picture."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    days = list(figures_by_day)
    labels = {"once": "trained once", "daily": "daily", "sixhourly": "every six hours"}
    for arm, colour in COLOURS.items():
        for state, style in (("live", "-o"), ("frozen", "--o")):
            values = [figures_by_day[day][f"{arm}_{state}"] for day in days]
            axes.plot(days, values, style, color=colour, label=f"{labels[arm]}, {state} state")
    values = [figures_by_day[day]["recent_popularity_live"] for day in days]
    axes.plot(days, values, ":", color="grey", label="recent popularity, live, no model")
    axes.set_ylim(bottom=0)
    axes.set_ylabel("NDCG@10")
    axes.set_title(f"globo_clicks, every click predicted before it is shown ({served})")
    axes.grid(visible=True, alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    figure.savefig(path, dpi=120)


def protocol_of(arguments: argparse.Namespace) -> Protocol:
    """What the command line asks for."""
    return Protocol(
        begin_ms=BEGIN_MS,
        split_ms=SPLIT_MS,
        end_ms=END_MS,
        served=arguments.served,
        one_user_in=arguments.one_user_in,
        test_users=arguments.test_users,
        first_s=arguments.first_s,
        day_s=arguments.day_s,
        seed=arguments.seed,
    )


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    of = {one.name: one.default for one in dataclasses.fields(Protocol)}
    parser.add_argument("--served", choices=SERVED, default=of["served"])
    parser.add_argument("--one-user-in", type=int, default=of["one_user_in"])
    parser.add_argument("--test-users", type=int, default=of["test_users"])
    parser.add_argument("--first-s", type=float, default=of["first_s"])
    parser.add_argument("--day-s", type=float, default=of["day_s"])
    parser.add_argument("--seed", type=int, default=of["seed"])
    parser.add_argument(
        "--results",
        type=Path,
        default=RESULTS / "staleness",
        help="folder of the result files and models",
    )
    parser.add_argument(
        "--record", action="store_true", help="keep the result under benchmarks/results"
    )
    return parser.parse_args()


def main() -> None:
    """Make what is missing, and report all of it."""
    arguments = parsed()
    try:
        log, _ = load_log(DATA_SETS["globo_clicks"])
    except DataMissingError as error:
        CONSOLE.print(f"[bold red]{error}[/bold red]")
        raise SystemExit(2) from error
    ground = Ground.of(log, protocol_of(arguments), arguments.results)
    del log
    CONSOLE.print(f"{ground.log.num_events:,} events, {len(ground.labels):,} labels to judge")
    run_references(ground)
    for arm in ARMS:
        run_arm(ground, arm)
    found = summary(ground)
    # The model alone is another benchmark: it has no live counts to make up for its age.
    name = "bench-staleness" + ("" if arguments.served == SERVED[0] else "-alone")
    picture = (RESULTS if arguments.record else arguments.results) / f"{name}.png"
    draw(found["by_day"], picture, served=arguments.served)
    CONSOLE.print(f"drawn: {picture}")
    report(
        name,
        found,
        command=f"make bench-staleness SERVED={arguments.served}",
        caveats={
            "data": "one portal, one week; users that were not sampled are in no count",
            "delay": "a training answers from its own moment on: training and publishing take none",
        },
        keep=arguments.record,
    )


if __name__ == "__main__":
    main()
