"""`make quality-pages`: tables and plots of the quality results that are there, nothing by hand.

Every set and protocol with results under benchmarks/results/quality gets a page and a plot in
docs/results; README.md has a table of them all.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Final

from matplotlib.figure import Figure

from benchmarks.bench_quality import QUALITY
from benchmarks.quality_data import DATA_SETS
from benchmarks.quality_figures import (
    SERVED,
    Outcome,
    difference,
    live_against_frozen,
    long_history_gain,
    outcomes,
)
from benchmarks.quality_overview import rendered, table
from trainer.rivals import RIVALS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from trainer.streaming_evaluation import Figures

# The model without the live sources, which its ablations are compared with.
WHOLE: Final = "gems_no_sources"
PAGES: Final = Path("docs/results")
# Has the table of all sets.
OVERVIEW: Final = Path("README.md")
# Models whose bands are drawn, where they are there.
DRAWN: Final = (SERVED, "gems_plain", "hstu", "sasrec", "own_frequency", "recent_popularity")
NAME: Final = re.compile(r"(?P<protocol>global|leave_one_out)-.*-s\d+")
FIGURES: Final = ("hr10", "ndcg10", "recall10", "hr100", "ndcg100", "recall100")
HEADS: Final = ("HR@10", "NDCG@10", "Recall@10", "HR@100", "NDCG@100", "Recall@100")


def present(folder: Path) -> list[tuple[str, str]]:
    """Every (set, protocol) that has results."""
    found = set()
    for path in folder.glob("*/*.json"):
        if named := NAME.fullmatch(path.stem):
            found.add((path.parent.name, named["protocol"]))
    return sorted(found)


def page(folder: Path, set_name: str, protocol: str) -> str:
    """The page of a set and protocol as Markdown."""
    found = outcomes(folder, set_name, protocol)
    first = next(iter(found.values())).seeds[0]
    name = f"{set_name}-{protocol}"
    parts = [
        f"# Quality on {DATA_SETS[set_name].title}, {protocol.replace('_', ' ')} protocol",
        _opening(first, found, set_name, protocol),
        f"![NDCG@10 by model, history and age]({name}.png)",
        "## All models\n\n" + _main_table(found),
        "## By length of the history\n\nNDCG@10, by the events known at the label.\n\n"
        + _band_table(found, "by_history"),
        "## By age of the interest\n\nNDCG@10, by how many events ago the user last met the item."
        "\n\n" + _band_table(found, "by_age"),
        "## Where the served model stands\n\n" + _stands(found),
        "## What each part of the model is worth\n\n" + _ablations(found),
        "## Training\n\n" + _training(found) + _weights(found),
    ]
    return "\n\n".join(parts) + "\n"


def _opening(first: dict, found: dict[str, Outcome], set_name: str, protocol: str) -> str:
    facts, sample = first["facts"], first["settings"]["sample"]
    budgets = [one.seeds[0]["settings"]["budget"] for one in found.values()]
    budget = next((one for one in budgets if one), None)
    seeds = max(len(one.seeds) for one in found.values())
    seconds = f" BUDGET_S={budget['seconds']:g}" if budget else ""
    made = (
        f"Made by `make bench-quality SET={set_name} PROTOCOL={protocol} SEEDS={seeds} "
        f"MODELS=all{seconds}` and `make quality-pages`; what the columns mean and which policies "
        "hold is in [quality.md](../quality.md)."
    )
    counted = (
        f"{facts['events']:,} events of {facts['users']:,} users on {facts['items']:,} items. "
        "Judged: "
        f"{facts['judged_events']:,} events at {facts['judged_labels']:,} times of "
        f"{facts['judged_users']:,} users (at most {sample['test_users']:,} users and, on the "
        f"global protocol, {sample['test_times_per_user']} times of each), "
        f"{facts['judged_users_beyond_recent']:,} of them with a mid-term stream that is not empty "
        f"and {facts['judged_users_beyond_mid']:,} with events older than that."
    )
    told = [made, counted]
    if budget:
        told.append(
            f"Every neural model: {budget['seconds']:g} s of a processor for training at most, on "
            f"{budget['num_threads']} thread, {budget['examples_per_batch']} labels a step, the "
            f"newest {budget['label_share']:.0%} of the labels."
        )
    return "\n\n".join(told)


def _main_table(found: dict[str, Outcome]) -> str:
    rows = []
    best = max(one.live()["ndcg10"] for one in found.values())
    for name, one in found.items():
        live, frozen, gain = one.live(), one.frozen(), live_against_frozen(one)
        shown = f"**{name}**" if live["ndcg10"] == best else name
        spread = one.spread()
        rows.append(
            [
                shown,
                one.note,
                *(f"{live[figure]:.4f}" for figure in FIGURES),
                "" if spread is None else f"{spread:.4f}",
                "" if frozen is None else f"{frozen['ndcg10']:.4f}",
                "" if gain is None else f"{gain:+.1%}",
                f"{one.answer_ms():.1f}",
            ]
        )
    heads = ["model", "what it is", *HEADS, "spread", "NDCG@10 frozen", "live adds", "ms an answer"]
    return table(heads, rows)


def _band_table(found: dict[str, Outcome], kind: str) -> str:
    bands = {name: one.bands(kind) for name, one in found.items()}
    names = list(next(iter(bands.values())))
    counts = next(iter(bands.values()))
    heads = ["model", *(f"{band} ({counts[band]['events']:,.0f} events)" for band in names)]
    rows = [
        [name, *(f"{one[band]['ndcg10']:.4f}" for band in names)] for name, one in bands.items()
    ]
    return table(heads, rows)


def _stands(found: dict[str, Outcome]) -> str:
    if SERVED not in found:
        return f"`{SERVED}` has no result yet."
    others = {name: one for name, one in found.items() if name != SERVED}
    gain = long_history_gain(found)
    told = (
        ""
        if gain is None
        else (
            "\n\nFor labels that know more than 64 events, NDCG@10 of `gems` over the best model "
            f"of one 64-event stream: {gain:+.1%}."
        )
    )
    return _differences(SERVED, found[SERVED], others) + told


def _ablations(found: dict[str, Outcome]) -> str:
    """The whole model, live sources apart, less each of its ablations."""
    others = {
        name: one for name, one in found.items() if name != WHOLE and RIVALS[name].kind == "gems"
    }
    if WHOLE not in found or not others:
        return f"`{WHOLE}` or its ablations have no result yet."
    return _differences(WHOLE, found[WHOLE], others)


def _differences(name: str, one: Outcome, others: dict[str, Outcome]) -> str:
    rows = []
    for other_name, other in others.items():
        gap = difference(one, other)
        recall, other_recall = one.live()["recall10"], other.live()["recall10"]
        rows.append(
            [
                other_name,
                f"{gap.mean:+.4f}",
                f"{gap.low:+.4f} to {gap.high:+.4f}",
                "yes" if gap.is_certain else "no",
                f"{recall / other_recall:.2f}" if other_recall else "",
            ]
        )
    heads = [
        f"{name} less",
        "NDCG@10",
        "95% interval, users drawn anew",
        "certain",
        "Recall@10, times",
    ]
    return table(heads, rows)


def _training(found: dict[str, Outcome]) -> str:
    rows = []
    for name, one in found.items():
        training = [seed["training"] for seed in one.seeds]
        if training[0] is not None:
            share = one.seeds[0]["contribution"]
            rows.append(
                [
                    name,
                    ", ".join(f"{run['steps']:,}" for run in training),
                    ", ".join(f"{run['seconds']:.0f}" for run in training),
                    ", ".join(run["ended_by"] for run in training),
                    "" if share is None else " / ".join(f"{part:.2f}" for part in share),
                ]
            )
    heads = ["model", "steps", "seconds", "ended by", "share of recent / mid-term / lifelong"]
    return table(heads, rows) if rows else "No model that is trained has a result yet."


def _weights(found: dict[str, Outcome]) -> str:
    """What the blends give to their sources, by the first seed."""
    told = []
    for name, one in found.items():
        if weights := one.seeds[0]["weights"]:
            shares = ", ".join(f"{source} {weight:.2f}" for source, weight in weights.items())
            told.append(f"\n\nSources of {name}: {shares}.")
    return "".join(told)


def draw(folder: Path, set_name: str, protocol: str, path: Path) -> None:
    """Leave a picture: NDCG@10 by model, by history and by age."""
    found = outcomes(folder, set_name, protocol)
    figure = Figure(figsize=(12, 9), layout="constrained")
    models, history, age = figure.subplot_mosaic(
        [["models", "models"], ["history", "age"]]
    ).values()
    _draw_models(models, found)
    drawn = {name: found[name] for name in DRAWN if name in found}
    _draw_bands(history, {name: one.bands("by_history") for name, one in drawn.items()})
    history.set_xlabel("events known")
    _draw_bands(age, {name: one.bands("by_age") for name, one in drawn.items()})
    age.set_xlabel("events since the item was last met")
    path.parent.mkdir(parents=True, exist_ok=True)
    # No date and no version: the same results give the same bytes.
    figure.savefig(path, dpi=100, metadata={"Software": None})


def _draw_models(axes: Axes, found: dict[str, Outcome]) -> None:
    names = list(found)
    live = [one.live()["ndcg10"] for one in found.values()]
    spreads = [one.spread() or 0.0 for one in found.values()]
    axes.bar([x - 0.2 for x in range(len(names))], live, 0.4, yerr=spreads, label="live state")
    frozen = [one.frozen() for one in found.values()]
    if all(one is not None for one in frozen):
        values = [one["ndcg10"] for one in frozen if one is not None]
        axes.bar([x + 0.2 for x in range(len(names))], values, 0.4, label="state of the split")
    axes.set_xticks(range(len(names)), names, rotation=35, ha="right")
    axes.set_ylabel("NDCG@10")
    axes.legend()


def _draw_bands(axes: Axes, bands: dict[str, dict[str, Figures]]) -> None:
    for name, one in bands.items():
        axes.plot(list(one), [band["ndcg10"] for band in one.values()], marker="o", label=name)
    axes.set_ylabel("NDCG@10")
    axes.set_ylim(bottom=0)
    if bands:
        axes.legend()


def main() -> None:
    """Write every page and plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=QUALITY, help="folder of the result files")
    parser.add_argument("--pages", type=Path, default=PAGES, help="folder of the pages")
    parser.add_argument("--overview", type=Path, default=OVERVIEW, help="page with all sets")
    asked = parser.parse_args()
    asked.pages.mkdir(parents=True, exist_ok=True)
    found = present(asked.results)
    for set_name, protocol in found:
        name = f"{set_name}-{protocol}"
        text = page(asked.results, set_name, protocol)
        (asked.pages / f"{name}.md").write_text(text, encoding="utf-8")
        draw(asked.results, set_name, protocol, asked.pages / f"{name}.png")
    overview = rendered(asked.overview.read_text(encoding="utf-8"), asked.results, found)
    asked.overview.write_text(overview, encoding="utf-8")


if __name__ == "__main__":
    main()
