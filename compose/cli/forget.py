"""`moveline forget`: a user's past leaves every part, and what remains is listed."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options

if TYPE_CHECKING:
    from pathlib import Path

    from streams.forget import Forgotten


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("forget")(forget)


def forget(
    *,
    user: Annotated[str, typer.Option(help="The user's id; a text is hashed as producers do.")],
    at_once: Annotated[
        bool,
        typer.Option(
            "--at-once",
            help="Delete the lake's replaced files now; whoever is reading them gets an error.",
        ),
    ] = False,
    timeout_s: Annotated[
        float, typer.Option("--timeout", min=1, help="Seconds that workers and lake may take.")
    ] = 120.0,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    lake: options.Lake = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Forget a user: states, lake and replays lose all that came before; later events count again.

    The wish is a record in the user's own partition, so nothing that is redelivered, replayed or
    restored brings the past back. Worker and `moveline lake` must be running. Ends with a search,
    and a list of what still names the user and until when; exits with 1 if something was found
    that a part of the system could still read.
    """
    from compose.cli.operate import installation
    from features.events import parse_id
    from streams.forget import Forgetting

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, lake=lake, repository=repository
    )
    folder = settings.lake.path if settings.lake.path.is_dir() else None
    forgetting = Forgetting(
        here=installation(settings), lake=folder, at_once=at_once, timeout_s=timeout_s
    )
    done = forgetting.forget(parse_id(user))
    _print(done, settings.model_repository)
    if not done.is_clean:
        raise typer.Exit(code=1)


def _print(done: Forgotten, repository: Path) -> None:
    console = Console()
    console.print(
        f"user {done.user_id} is forgotten before offset {done.offset} of partition "
        f"{done.partition}: {len(done.kept)} generations, {done.num_rewritten} lake revisions, "
        f"{done.num_traces} notes of sessions."
    )
    table = Table("where", "what", "until", title="what remains", title_justify="left")
    for one in done.remains:
        table.add_row(one.where, one.what, one.until)
    for version in _versions(repository):
        table.add_row(f"model {version}", "weights that learned from the events", "it is deleted")
    console.print(table)
    found = "nothing earlier was found" if done.is_clean else "[red]earlier events were found[/red]"
    console.print(f"searched again: {found} where a part of the system would read it.")


def _versions(repository: Path) -> list[str]:
    """Return the published versions of models with weights, and when each was made."""
    found = (path for path in repository.glob("*/*/manifest.json"))
    return [
        f"{path.parent.parent.name} {path.parent.name} "
        f"({datetime.fromtimestamp(path.stat().st_mtime, UTC):%F %T} UTC)"
        for path in sorted(found)
    ]
