"""`moveline replay`, `generations`, `audit`, `promote`, `demote`, `drop`: backfills."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import letters, options
from compose.cli.data import collect_seldom, stop_on_signals

if TYPE_CHECKING:
    from threading import Event as StopEvent

    from compose.settings import Settings
    from streams.audit import AuditReport
    from streams.compare import Comparison
    from streams.control import Promotion
    from streams.generations import GenerationInfo, Installation
    from streams.replay import Replay, ReplayReport, ReplayRequest

# Users a dry run builds in memory: tens of kB each under the default sizes.
DRY_RUN_USERS = 2_000
MaxLag = Annotated[
    int | None, typer.Option("--max-lag", help="Records the generation may be behind.")
]
Name = Annotated[str, typer.Argument(help="A generation: g1, g2, ...")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    letters.register(app)
    app.command("replay")(replay)
    app.command("generations")(generations)
    app.command("audit")(audit)
    app.command("promote")(promote)
    app.command("demote")(demote)
    app.command("drop")(drop)


def replay(
    *,
    into: Annotated[str, typer.Option(help="The generation to build: g2, g3, ...")],
    origin: Annotated[
        str,
        typer.Option(
            "--from",
            help="earliest; lake (its files first, then Kafka); or a time, ISO or epoch ms.",
        ),
    ] = "earliest",
    to: Annotated[
        str | None, typer.Option("--to", help="End before this append time; ISO or epoch ms.")
    ] = None,
    users: Annotated[
        str | None, typer.Option(help="Only these: ids with commas, or a file with one a line.")
    ] = None,
    rate: Annotated[float | None, typer.Option(min=1, help="Events per second at most.")] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Write nothing: build a sample, compare with the live one."),
    ] = False,
    sample: Annotated[int, typer.Option(min=1, help="Users of a dry run.")] = DRY_RUN_USERS,
    follow: Annotated[
        bool, typer.Option("--follow", help="Then keep it up to date, as its worker.")
    ] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    lake: options.Lake = None,
    config: options.Config = None,
) -> None:
    """Build a generation from the log with the same steps, beside the live one.

    The rules are those of the settings now (stream sizes, gap, actions). Ctrl-C pauses between two
    micro-batches, and the same command goes on from there, also after a kill. Joins no group.

    Example: moveline replay --into g2 && moveline audit g2 && moveline promote g2
    """
    settings = options.settings_of(config, kafka=kafka, redis=redis, lake=lake, generation=into)
    request = _request(settings, origin, to, users, rate)
    if follow and (dry_run or request.users is not None):
        raise typer.BadParameter("--follow goes with a generation for all users, and no dry run")
    stop = stop_on_signals()
    if dry_run:
        _print_comparison(_dry_run(settings, request, sample, stop), "the live generation")
        return
    builder = _replay(settings, request)
    collect_seldom()
    report = builder.run(stop, shown=True)
    _print_report(report, into, Console(stderr=True))
    if follow and not report.num_missing:
        _follow(settings, builder, stop)


def generations(
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """List the generations: how each was built, how far it is, which one is live."""
    found = installation(options.settings_of(config, kafka=kafka, redis=redis)).list()
    table = Table("generation", "is", "rules", "built", title="generations", title_justify="left")
    table.add_column("users", justify="right")
    table.add_column("lag", justify="right")
    for info in found:
        table.add_row(
            f"g{info.number}",
            _standing(info),
            info.config.digest(),
            "by its workers" if info.built is None else f"replay {info.built}",
            f"{info.num_users:,}",
            f"{info.lag:,}",
        )
    Console().print(table)


def audit(
    generation: Name,
    *,
    users: Annotated[int, typer.Option(min=1, help="About how many users.")] = 200,
    against: Annotated[
        str | None, typer.Option(help="Compare with this generation too; default: the live one.")
    ] = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    lake: options.Lake = None,
    config: options.Config = None,
) -> None:
    """Check sampled users against an independent oracle over the log, and another generation.

    Exits with 1 if a user differs from the oracle, or from a generation with the same rules.
    """
    from features.generations import Generations
    from streams.audit import audit as run_audit
    from streams.compare import compare_generations
    from streams.event_log import some_buckets

    settings = options.settings_of(config, kafka=kafka, redis=redis, lake=lake)
    here = installation(settings)
    store = here.store(_number(generation))
    built = Generations(here.client).built(store.generation)
    origin = "earliest" if built is None else built.origin
    logs = here.logs(lake=settings.lake.path, prefer_lake=origin == "lake")
    report = run_audit(logs, store, built, num_users=users, shown=True)
    is_right = _print_audit(report, generation)
    other = here.live() if against is None else _number(against)
    if other is not None and other != store.generation:
        total = max(1, report.num_users)
        share = min(1.0, users / max(total, Generations(here.client).count_users()[other]))
        partitions = {events.source: events.end_offsets() for events in logs}
        result = compare_generations(store, here.store(other), some_buckets(share), partitions)
        _print_comparison(result, f"g{other}")
        is_right &= result.is_equal or not result.same_rules
    if not is_right:
        raise typer.Exit(code=1)


def promote(
    generation: Name,
    *,
    model_version: Annotated[
        int | None, typer.Option(min=1, help="The model that goes live with it.")
    ] = None,
    max_lag: MaxLag = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Make a generation the live one for every reader; `moveline demote` takes it back."""
    from compose.memories import memory_of
    from streams.generations import LAG_MAX

    settings = options.settings_of(config, kafka=kafka, redis=redis, repository=repository)
    here = installation(settings)
    memory = memory_of(settings.model_repository, model_version) if model_version else None
    done = here.promote(
        _number(generation),
        model_version=model_version,
        memory_version=None if memory is None else memory.memory_version,
        lag_max=LAG_MAX if max_lag is None else max_lag,
    )
    _print_promotion(done)


def demote(
    *,
    to: Annotated[
        str | None, typer.Option(help="The generation to go back to; default: the one before.")
    ] = None,
    max_lag: MaxLag = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """Take the last promotion back. The generation before must have been followed meanwhile."""
    from streams.generations import LAG_MAX

    here = installation(options.settings_of(config, kafka=kafka, redis=redis))
    done = here.demote(
        to=None if to is None else _number(to), lag_max=LAG_MAX if max_lag is None else max_lag
    )
    _print_promotion(done)


def drop(
    generation: Name,
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """Delete a generation that is not live, in small steps that live traffic does not notice."""
    here = installation(options.settings_of(config, kafka=kafka, redis=redis))
    num_keys = here.drop(_number(generation), shown=True)
    Console(stderr=True).print(f"{generation} is gone: {num_keys:,} keys deleted")


def parse_time(text: str) -> int:
    """Return epoch ms of an ISO time (UTC unless it says otherwise) or of epoch ms.

    >>> parse_time("1763700000000"), parse_time("2025-11-21T04:40:00")
    (1763700000000, 1763700000000)
    """
    if text.isdecimal():
        return int(text)
    try:
        parsed = datetime.fromisoformat(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a time: write 2026-01-31T12:00:00Z or epoch ms"
        ) from error
    aware = parsed if parsed.tzinfo is not None else parsed.replace(tzinfo=UTC)
    return round(aware.timestamp() * 1000)


def parse_users(text: str) -> frozenset[int]:
    """Return the ids in a comma-separated list, or in a file, one a line; strings are hashed."""
    from features.events import parse_id

    path = Path(text)
    raw = path.read_text("utf-8").splitlines() if path.is_file() else text.split(",")
    names = [name.strip() for name in raw if name.strip()]
    if not names:
        raise typer.BadParameter(f"--users {text!r} names nobody")
    return frozenset(map(parse_id, names))


def _request(
    settings: Settings, origin: str, to: str | None, users: str | None, rate: float | None
) -> ReplayRequest:
    from streams.replay import ReplayRequest

    is_time = origin not in {"earliest", "lake"}
    return ReplayRequest(
        origin="time" if is_time else origin,
        from_ms=parse_time(origin) if is_time else None,
        to_ms=None if to is None else parse_time(to),
        users=None if users is None else parse_users(users),
        rate=rate,
        batch_max=settings.worker.batch_max,
        lake=settings.lake.path,
        waiting_chunks_max=settings.worker.waiting_chunks_max,
    )


def _replay(settings: Settings, request: ReplayRequest) -> Replay:
    from features.redis import CatalogueStore, StateStore, connect
    from streams.replay import Replay

    kafka, topics = options.kafka_of(settings)
    client = connect(settings.redis.url)
    # The rules of the settings, not those recorded: a difference is to be refused, not ignored.
    store = StateStore(client, settings.generation_number, settings.state_config())
    return Replay(kafka, topics, store, CatalogueStore(client), request)


def _dry_run(
    settings: Settings, request: ReplayRequest, sample: int, stop: StopEvent
) -> Comparison:
    from features.generations import Generations
    from streams.compare import dry_run
    from streams.event_log import some_buckets
    from streams.generations import UNPUBLISHED

    here = installation(settings)
    live = here.store(here.live() or UNPUBLISHED)
    total = Generations(here.client).count_users()[live.generation]
    keep = some_buckets(sample / max(sample, total))
    if request.users is not None:
        keep = request.users.__contains__
    logs = here.logs(lake=settings.lake.path, prefer_lake=request.origin == "lake")
    return dry_run(logs, request, settings.state_config(), live, keep, stop, shown=True)


def _follow(settings: Settings, builder: Replay, stop: StopEvent) -> None:
    from streams.worker import Worker

    Console(stderr=True).print(f"following as worker of g{builder.store.generation}, Ctrl-C ends")
    worker = Worker(
        builder.kafka,
        builder.topics,
        builder.store,
        builder.catalogue,
        options.worker_config(settings),
    )
    worker.run(stop)


def installation(settings: Settings) -> Installation:
    """Return the installation that the settings name."""
    from features.redis import connect
    from streams.generations import Installation

    return Installation(*options.kafka_of(settings), connect(settings.redis.url))


def _number(name: str) -> int:
    from features.keys import parse_generation

    try:
        return parse_generation(name)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def _standing(info: GenerationInfo) -> str:
    parts = [
        "[green]live[/green]" if info.is_live else "",
        "followed" if info.is_followed else "",
        "partial" if info.built is not None and info.built.is_partial else "",
        "[red]being dropped[/red]" if info.built is not None and info.built.is_dropping else "",
    ]
    return ", ".join(part for part in parts if part) or "-"


def _print_report(report: ReplayReport, into: str, console: Console) -> None:
    rate = report.num_records / max(report.seconds, 1e-9)
    console.print(
        f"{report.num_records:,} records in {report.seconds:.1f} s ({rate:,.0f}/s): "
        f"{report.num_applied:,} applied, {report.num_duplicates:,} repeats"
    )
    if report.dead_letters:
        counts = ", ".join(f"{n:,} {reason}" for reason, n in report.dead_letters.most_common())
        console.print(f"no events under these rules: {counts} (set aside when they came in)")
    if report.num_missing:
        console.print(f"paused, {report.num_missing:,} offsets left: the same command goes on")
    else:
        console.print(
            f"{into} is built. Next: moveline audit {into}; moveline worker --generation {into} "
            f"keeps it up to date; moveline promote {into} makes it live"
        )


def _print_comparison(result: Comparison, other: str) -> None:
    console = Console()
    rules = "same rules" if result.same_rules else "other rules, so contents are compared"
    console.print(
        f"{result.num_users:,} users compared with {other} ({rules}): {result.num_equal:,} equal, "
        f"{result.different:,} different, {result.missing:,} missing, {result.extra:,} extra, "
        f"{result.moving:,} moved on meanwhile"
    )
    for user, what in result.examples.items():
        console.print(f"  user {user}: {what}", highlight=False)
    for reason, count in result.dead_letters.most_common():
        console.print(f"  {count:,} records of the sample are no events: {reason}")


def _print_audit(report: AuditReport, generation: str) -> bool:
    console = Console()
    console.print(
        f"{generation}: {report.num_users:,} users, {report.num_events:,} events: "
        f"{report.num_users - report.num_wrong:,} as the oracle says, {report.num_wrong:,} not"
    )
    if report.num_dropped:
        console.print(f"{report.num_dropped:,} chunks had left Redis for the lake, as marked")
    for user, what in report.wrong.items():
        console.print(f"  user {user}: {what}", highlight=False)
    return not report.num_wrong


def _print_promotion(done: Promotion) -> None:
    before = "nothing" if done.previous is None else f"g{done.previous}"
    Console(stderr=True).print(f"g{done.generation} is live; before: {before}")
