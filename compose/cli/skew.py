"""`moveline skew`: what was served beside what the lake gives."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options
from compose.errors import ComposeError
from features.clock import now_ms
from features.events import parse_id

if TYPE_CHECKING:
    from compose.settings import Settings
    from features.skew_report import Example, SkewReport
    from streams.skew import SkewSource

# About 25 kB each with the default sizes, all in memory.
RECORDS_MAX = 10_000
_HOUR_MS = 3_600_000
# Values of one feature and reads of one user that are printed; JSON and the page count all.
_VALUES_SHOWN = 5
_READS_SHOWN = 10


class NothingToCompareError(ComposeError):
    """No read was compared: a rate of zero would say what nobody looked at."""


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("skew")(skew)


def skew(
    *,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="Exit with 1 if a larger share of reads differs.")
    ] = 0.0,
    hours: Annotated[
        float, typer.Option(min=0, help="How far back to look; the topic keeps a week.")
    ] = 24.0,
    records: Annotated[
        int, typer.Option(min=1, help="The newest so many; about 25 kB of memory each.")
    ] = RECORDS_MAX,
    user: Annotated[
        str | None, typer.Option(help="Only this user, and show every read that differs.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write a page with plots, one file, to this place.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="The report as one JSON object.")] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    lake: options.Lake = None,
    config: options.Config = None,
) -> None:
    """Compare what `recommend` read of sampled users with what the lake gives for the same moment.

    Reads are logged for `feature_log.share` of all users. Exits with 1 if more reads differ than
    the threshold allows, or if none could be compared.

    Example: moveline lake --until-end && moveline skew --html skew.html
    """
    from streams.skew import SkewRequest, compare_log

    settings = options.settings_of(config, kafka=kafka, redis=redis, lake=lake)
    user_id = None if user is None else parse_id(user)
    request = SkewRequest(
        since_ms=max(0, now_ms() - int(hours * _HOUR_MS)), user_id=user_id, records_max=records
    )
    report = compare_log(_source(settings), request, shown=True)
    if as_json:
        Console().out(json.dumps(report.to_json()), highlight=False)
    else:
        _print(report, Console(), with_examples=user is not None)
    if html is not None:
        from compose.skew_page import write_page

        write_page(report, html, title=f"{settings.kafka.prefix}: served and lake")
        Console(stderr=True).print(f"page: {html}")
    if not report.reads.num_compared:
        raise NothingToCompareError(_nothing(report, hours))
    if report.reads.rate > threshold:
        raise typer.Exit(code=1)


def _source(settings: Settings) -> SkewSource:
    from features.lake import log_topics
    from streams.skew import SkewSource

    kafka, topics = options.kafka_of(settings)
    _, catalogue = options.stores_of(settings)
    return SkewSource(
        kafka=kafka,
        feature_log=topics.feature_log,
        events=log_topics(settings.lake.path, topics.events),
        lake=settings.lake.path,
        rules=catalogue.recorded_config,
    )


def _nothing(report: SkewReport, hours: float) -> str:
    if report.num_records:
        return f"none of {report.num_records:,} logged reads could be compared, see the reasons."
    return (
        f"no read was logged within {hours:g} hours. Was anything asked of `recommend`, is "
        "feature_log.share above 0 (MOVELINE_FEATURE_LOG__SHARE of tritonserver), and is the user "
        "among the sampled ones?"
    )


def _print(report: SkewReport, console: Console, *, with_examples: bool) -> None:
    reads = report.reads
    console.print(
        f"{reads.num_compared:,} reads compared, {report.num_values:,} values; "
        f"[bold]{reads.num_differing:,} reads differ ({reads.rate:.3%})[/bold]"
    )
    if report.num_late_reads:
        console.print(
            f"{report.num_late_reads:,} reads lacked {report.num_events_unseen:,} events appended "
            "more than a minute before: the worker was behind. That is no difference."
        )
    for reason, sentence in _reasons(report):
        console.print(f"not compared: {reason}: {sentence}")
    console.print(_feature_table(report))
    for stream, distances in report.edit_distances.items():
        console.print(f"{stream}: edit distance {_distances(distances)}")
    if report.by_user:
        worst = ", ".join(f"{user} ({count})" for user, count in report.by_user.most_common(10))
        console.print(f"users with differing reads: {worst}. Look closer: moveline skew --user U")
    if with_examples:
        for example in report.examples[:_READS_SHOWN]:
            console.print(_example_table(example))


def _reasons(report: SkewReport) -> list[tuple[str, str]]:
    from features.skew_report import EXPLAINED

    return [(f"{number:,}", EXPLAINED[reason]) for reason, number in report.skipped.items()]


def _distances(distances: dict[int, int]) -> str:
    numbers = [f"{distance} in {count:,} reads" for distance, count in sorted(distances.items())]
    shown = ", ".join(numbers[:_VALUES_SHOWN])
    return shown + (f", at most {max(distances)}" if len(numbers) > _VALUES_SHOWN else "")


def _feature_table(report: SkewReport) -> Table:
    table = Table(title="by feature", title_justify="left")
    table.add_column("feature", no_wrap=True)
    for name in ("values", "reads differing", "mismatch", "missing", "extra"):
        table.add_column(name, justify="right")
    for name, tally in report.by_feature.items():
        mismatch, missing, extra = tally.rates()
        table.add_row(
            name,
            f"{tally.num_values:,}",
            f"{tally.num_reads_differing:,}",
            f"{mismatch:.3%}",
            f"{missing:.3%}",
            f"{extra:.3%}",
        )
    return table


def _example_table(example: Example) -> Table:
    served = example.served
    when = datetime.fromtimestamp(served.served_at_ms / 1000, UTC)
    place = served.position
    at = "none" if place is None else f"{place.partition}:{place.offset}"
    table = Table(
        "feature",
        "served",
        "lake",
        title=(
            f"user {served.user_id} at {when:%Y-%m-%d %H:%M:%S}Z, g{served.generation}, "
            f"{served.ordinal} events, position {at}, model version {served.model_version or '-'}"
            + (f", request {served.request_id}" if served.request_id else "")
        ),
        title_justify="left",
    )
    for one in example.skew.differences:
        if not one.is_equal:
            table.add_row(one.feature, _values(one.served), _values(one.expected))
    if example.skew.is_reordered:
        table.add_row("order of the events", "differs", "")
    return table


def _values(values: tuple[object, ...]) -> str:
    shown = ", ".join(str(value) for value in values[:_VALUES_SHOWN])
    rest = f", {len(values) - _VALUES_SHOWN:,} more" if len(values) > _VALUES_SHOWN else ""
    return shown + rest or "-"
