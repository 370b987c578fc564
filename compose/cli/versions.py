"""`moveline models`, `rollback`, `gc`: versions of the model, and moving between them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options

if TYPE_CHECKING:
    from compose.clear_up import Removal
    from compose.models_table import ModelInfo

_HOUR_S = 3_600


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("models")(models)
    app.command("rollback")(rollback)
    app.command("gc")(gc)


def models(
    *,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Show every version: which is live, which a rollback can reach, age, size, quality.

    Looks at every user's memories; changes nothing.
    """
    from compose.models_table import list_models

    settings = options.settings_of(config, kafka=kafka, redis=redis, repository=repository)
    found = list_models(settings)
    if as_json:
        Console().out(json.dumps(msgspec.to_builtins(found)))
        return
    if not found:
        Console(stderr=True).print("no version was published: `moveline publish` does that.")
        return
    Console().print(_table(found))


def _table(found: list[ModelInfo]) -> Table:
    table = Table("version", "is", "loaded", "memories", title="versions of gems")
    table.title_justify = "left"
    for name in ("whole", "age h", "MB", "HR@10", "NDCG@10"):
        table.add_column(name, justify="right")
    table.add_column("rollback")
    for one in found:
        table.add_row(
            str(one.version),
            one.state,
            "yes" if one.is_loaded else "no",
            one.memory_version or "-",
            "-" if one.coverage is None else f"{one.coverage:.1%}",
            f"{one.age_s / _HOUR_S:.1f}",
            f"{one.num_bytes / 1e6:.1f}",
            *(f"{one.quality[key]:.4f}" if key in one.quality else "-" for key in _QUALITY),
            one.back or "yes",
        )
    return table


_QUALITY = ("hr10_model", "ndcg10_model")


def rollback(
    *,
    to: Annotated[
        int | None,
        typer.Option("--to", min=1, help="The version to go back to; default: the one before."),
    ] = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Make a version that was live the live one again, within seconds.

    Refused, with what to do instead, where its files, its memories or the state it reads are gone.
    A second rollback goes one further back; --to with a larger number goes forward again.
    """
    from compose.rollback import roll_back

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, triton=triton, repository=repository
    )
    done = roll_back(settings, to=to)
    Console(stderr=True).print(
        f"version {done.version} answers instead of {done.before}, {done.seconds:.1f} s after the "
        "start"
    )


def gc(
    *,
    keep: Annotated[
        int | None,
        typer.Option(min=0, help="How many versions besides the live one can be gone back to [5]."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would go and change nothing.")
    ] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Remove versions that nothing can go back to, with their memories and packages.

    The live version, the one before it and one that is being tried always stay.
    """
    from compose.clear_up import KEEP_DEFAULT, clear_up

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, triton=triton, repository=repository
    )
    done = clear_up(settings, keep=KEEP_DEFAULT if keep is None else keep, dry_run=dry_run)
    _print_removal(done, dry_run=dry_run)


def _print_removal(done: Removal, *, dry_run: bool) -> None:
    console = Console(stderr=True)
    for version, folder in done.versions.items():
        console.print(f"version {version}: {folder}")
    for folder in done.unproven:
        console.print(f"never live: {folder}")
    for memory_version in done.memory_versions:
        console.print(f"memories of version {memory_version}")
    for package in done.packages:
        console.print(f"package: {package}")
    console.print(f"{done.num_bytes:,} bytes {'would be' if dry_run else 'are'} removed")
