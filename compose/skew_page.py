"""A skew report as one HTML file: tables, and plots that are part of it."""

from __future__ import annotations

import base64
import io
from datetime import UTC, datetime
from html import escape
from typing import TYPE_CHECKING, Any, Final

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from features.skew_report import EXPLAINED

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes

    from features.skew_report import Example, SkewReport

# Differing reads shown in full; a page is read by a person.
_READS_SHOWN: Final = 20
_USERS_SHOWN: Final = 20
_VALUES_SHOWN: Final = 8
_DPI: Final = 110
_STYLE: Final = """
body { font: 15px/1.5 sans-serif; margin: 2em auto; max-width: 70em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0 } img { max-width: 100% }
th, td { border-bottom: 1px solid #ddd; padding: .2em .8em; text-align: left; vertical-align: top }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.bad { color: #b00020; font-weight: bold }
"""


def write_page(report: SkewReport, path: Path, *, title: str) -> None:
    """The page is at `path`; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(report, title=title), encoding="utf-8")


def page(report: SkewReport, *, title: str) -> str:
    """Return the page."""
    parts = [
        f"<h1>{escape(title)}</h1>",
        _summary(report),
        "<h2>By feature</h2>",
        _image(_features_figure(report), "rates by feature"),
        _feature_table(report),
        "<h2>Streams: edit distance of the items</h2>",
        _image(_distances_figure(report), "edit distances"),
        "<h2>Over time, and by model version</h2>",
        _image(_time_figure(report), "share of differing reads"),
        *_users(report),
        *(_example(one) for one in report.examples[:_READS_SHOWN]),
    ]
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _summary(report: SkewReport) -> str:
    reads = report.reads
    kind = ' class="bad"' if reads.num_differing else ""
    behind = f"{report.num_events_unseen:,} events together; no difference"
    lines = [
        f"{reads.num_compared:,} reads compared, {report.num_values:,} values",
        f"<span{kind}>{reads.num_differing:,} reads differ ({reads.rate:.3%})</span>",
        f"{report.num_late_reads:,} reads of a worker that was behind by {behind}",
        *(
            f"not compared: {number:,}: {escape(EXPLAINED[reason])}"
            for reason, number in report.skipped.items()
        ),
    ]
    return "<ul>" + "".join(f"<li>{line}</li>" for line in lines) + "</ul>"


def _features_figure(report: SkewReport) -> Figure:
    names = list(report.by_feature)
    rates = [tally.rates() for tally in report.by_feature.values()]
    figure = Figure(figsize=(9, 0.28 * len(names) + 1), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(names)
    for place, (kind, colour) in enumerate(
        (("mismatch", "#b00020"), ("missing", "#e69f00"), ("extra", "#0072b2"))
    ):
        widths = [100 * rate[place] for rate in rates]
        axes.barh(names, widths, left=left, label=kind, color=colour)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlim(0, max(1.0, 1.05 * max(left)))
    axes.set_xlabel("% of values")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def _distances_figure(report: SkewReport) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, len(report.edit_distances))
    for axes, (stream, counts) in zip(panels, report.edit_distances.items(), strict=True):
        axes.bar(list(counts), list(counts.values()))
        axes.set_xlim(-0.6, max(counts, default=0) + 0.6)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_yscale("symlog")
        axes.set_title(stream)
        axes.set_xlabel("edit distance")
        axes.set_ylabel("reads")
    return figure


def _time_figure(report: SkewReport) -> Figure:
    figure = Figure(figsize=(9, 3), layout="constrained")
    over_time, by_version = figure.subplots(1, 2)
    hours = sorted(report.by_hour)
    when: list[Any] = [datetime.fromtimestamp(hour / 1000, UTC) for hour in hours]
    over_time.plot(when, [100 * report.by_hour[hour].rate for hour in hours], marker="o")
    over_time.set_title("by hour, UTC")
    over_time.tick_params(axis="x", labelrotation=30)
    versions = sorted(report.by_version)
    names = [str(version or "none") for version in versions]
    by_version.bar(names, [100 * report.by_version[version].rate for version in versions])
    by_version.set_title("by model version")
    for axes in (over_time, by_version):
        axes.set_ylabel("% of reads differ")
        axes.set_ylim(bottom=0)
    return figure


def _image(figure: Figure, about: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    return f'<img alt="{escape(about)}" src="data:image/png;base64,{encoded}">'


def _feature_table(report: SkewReport) -> str:
    header = ("feature", "values", "reads differing", "mismatch", "missing", "extra")
    rows = []
    for name, tally in report.by_feature.items():
        rates = (f"{rate:.3%}" for rate in tally.rates())
        rows.append((name, f"{tally.num_values:,}", f"{tally.num_reads_differing:,}", *rates))
    return _table(header, rows)


def _users(report: SkewReport) -> list[str]:
    if not report.by_user:
        return []
    rows = [(str(user), f"{n:,}") for user, n in report.by_user.most_common(_USERS_SHOWN)]
    return ["<h2>Users with most differing reads</h2>", _table(("user", "reads differing"), rows)]


def _example(example: Example) -> str:
    served = example.served
    when = datetime.fromtimestamp(served.served_at_ms / 1000, UTC)
    title = (
        f"User {served.user_id}, {when:%Y-%m-%d %H:%M:%S} UTC, g{served.generation}, "
        f"{served.ordinal} events, model version {served.model_version or 'none'}"
    )
    rows = [
        (one.feature, _values(one.served), _values(one.expected))
        for one in example.skew.differences
        if not one.is_equal
    ]
    if example.skew.is_reordered:
        rows.append(("order of the events", "differs", ""))
    return f"<h3>{escape(title)}</h3>" + _table(("feature", "served", "lake"), rows)


def _values(values: Sequence[object]) -> str:
    shown = ", ".join(str(value) for value in values[:_VALUES_SHOWN])
    return shown + (
        f", {len(values) - _VALUES_SHOWN:,} more" if len(values) > _VALUES_SHOWN else ""
    )


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in header)
    body = "".join(f"<tr>{''.join(_cell(cell) for cell in row)}</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _cell(text: str) -> str:
    kind = ' class="number"' if text.replace(",", "").rstrip("%").replace(".", "").isdigit() else ""
    return f"<td{kind}>{escape(text)}</td>"
