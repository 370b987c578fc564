"""`moveline canary`: a version tried on a share of users, and what is made of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options

if TYPE_CHECKING:
    from compose.canary import CanaryState

canary_app = typer.Typer(
    no_args_is_help=True,
    help="Try a version on a share of users before everybody gets it.",
)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(canary_app, name="canary")


@canary_app.command("start")
def start(
    version: Annotated[
        int | None, typer.Argument(help="A version of gems that Triton has loaded.")
    ] = None,
    *,
    package: Annotated[
        Path | None, typer.Option(help="A package that Triton does not have yet, instead.")
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            min=0.0001,
            max=0.5,
            help="Share of users, with as many for comparison [MOVELINE_CANARY__SHARE].",
        ),
    ] = None,
    shadow: Annotated[
        bool, typer.Option("--shadow", help="Show nobody its answers; only log them beside.")
    ] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    lake: options.Lake = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Give a share of users the answers of another version, always the same users.

    Its memories are made first where it reads others than the live version. Publishing or a
    rollback ends a canary.

    Example: moveline canary start --package models/gems-1763700000000 --share 0.1, then
    moveline canary watch
    """
    from compose.canary import CanaryRequest, start_package
    from compose.canary import start as begin

    if (version is None) == (package is None):
        raise typer.BadParameter("name a version that Triton has, or --package; not both")

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, triton=triton, lake=lake, repository=repository
    )
    request = CanaryRequest(share, "shadow" if shadow else "canary")
    if package is not None:
        canary = start_package(settings, package, request)
    else:
        assert version is not None
        canary = begin(settings, version, request)
    Console(stderr=True).print(
        f"version {canary.version} is tried as a {canary.mode} on {canary.share:.1%} of users. "
        "Next: moveline canary watch"
    )


@canary_app.command("status")
def status(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object.")] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """Show what both arms came to so far, and what the rules say."""
    from compose.canary import CanaryWatch

    state = CanaryWatch(options.settings_of(config, kafka=kafka, redis=redis)).look()
    if state is None:
        Console(stderr=True).print("no version is being tried: moveline canary start VERSION")
        raise typer.Exit(code=1)
    if as_json:
        Console().out(json.dumps(_plain(state)), highlight=False)
    else:
        _print(state)


@canary_app.command("promote")
def promote(
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    config: options.Config = None,
) -> None:
    """Make the version that is tried the live one, whatever its figures."""
    from compose.canary import promote as make_live

    settings = options.settings_of(config, kafka=kafka, redis=redis, triton=triton)
    canary = make_live(settings)
    Console(stderr=True).print(f"version {canary.version} is live")


@canary_app.command("stop")
def stop(
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    config: options.Config = None,
) -> None:
    """Try the version no longer; what is live stays live."""
    from compose.canary import stop as take_back

    settings = options.settings_of(config, kafka=kafka, redis=redis, triton=triton)
    canary = take_back(settings)
    Console(stderr=True).print(f"version {canary.version} is tried no longer")


@canary_app.command("watch")
def watch(
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    config: options.Config = None,
) -> None:
    """Look every `canary.check_s` seconds until the rules decide, and do what they say.

    Exits with 1 if the version was taken back.
    """
    from compose.canary import CanaryWatch
    from compose.canary_rules import Decision

    settings = options.settings_of(config, kafka=kafka, redis=redis, triton=triton)
    console = Console(stderr=True)

    def report(state: CanaryState) -> None:
        verdict = state.verdict
        console.print(f"version {state.canary.version}: {verdict.decision}: {verdict.reason}")

    ended = CanaryWatch(settings).run(report)
    if ended is None:
        console.print("no version is being tried: moveline canary start VERSION")
    if ended is None or ended.verdict.decision is Decision.TAKE_BACK:
        raise typer.Exit(code=1)


def _print(state: CanaryState) -> None:
    canary = state.canary
    table = Table(
        "arm",
        title=f"version {canary.version}, {canary.mode} on {canary.share:.1%} of users",
        caption=f"{state.verdict.decision}: {state.verdict.reason}",
        title_justify="left",
        caption_justify="left",
    )
    for name in ("version", "answers", "failed", "p99 ms", "users", "hits"):
        table.add_column(name, justify="right")
    live = state.pointers.model_version
    for name, version, arm in (
        ("control", live, state.control),
        (canary.mode, canary.version, state.tried),
    ):
        table.add_row(
            name,
            str(version),
            f"{arm.num_answers:,}",
            f"{arm.failed_share:.2%}",
            f"{arm.p99_ms:.1f}",
            f"{len(arm.hits):,}",
            f"{arm.hit_rate:.2%}",
        )
    Console().print(table)


def _plain(state: CanaryState) -> dict[str, object]:
    def arm(name: str) -> dict[str, object]:
        figures = state.control if name == "control" else state.tried
        return {
            "answers": figures.num_answers,
            "failed": figures.num_failed,
            "p99_ms": figures.p99_ms,
            "users": len(figures.hits),
            "hit_rate": figures.hit_rate,
        }

    return {
        "version": state.canary.version,
        "live_version": state.pointers.model_version,
        "mode": state.canary.mode,
        "share": state.canary.share,
        "since_ms": state.canary.since_ms,
        "control": arm("control"),
        "tried": arm("tried"),
        "decision": str(state.verdict.decision),
        "reason": state.verdict.reason,
    }
