"""`moveline compact`: the lake's small files become large ones."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from compose.cli import options

if TYPE_CHECKING:
    from features.lake_revisions import Place


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("compact")(compact)


def compact(
    *,
    keep_hours: Annotated[
        float | None,
        typer.Option(min=0, help="Hours that replaced files stay for readers; 48 if left out."),
    ] = None,
    kafka: options.Kafka = None,
    path: options.Lake = None,
    config: options.Config = None,
) -> None:
    """Merge the small files of the lake, and remove those replaced long enough ago.

    Run it as often as you like, beside `moveline lake` and readers: both go on undisturbed. A crash
    at any moment leaves the lake as it was or as it will be.
    """
    from features import lake_compact, lake_revisions
    from features.clock import now_ms
    from streams.progress import progress_bar

    settings = options.settings_of(config, kafka=kafka, lake=path)
    _, topics = options.kafka_of(settings)
    places = lake_revisions.places(settings.lake.path, topics.events)
    kept_ms = (
        lake_revisions.KEPT_MS
        if keep_hours is None
        else timedelta(hours=keep_hours) // timedelta(milliseconds=1)
    )
    total = sum(_num_offsets(place) for place in places)
    num_before = num_after = num_removed = 0
    with progress_bar("compact", total=total, unit="offsets") as advance:
        for place in places:
            done = lake_compact.compact(place, now_ms=now_ms(), advance=advance)
            num_before += done.num_files_before
            num_after += done.num_files_after
            gone = lake_revisions.remove_old_revisions(place, before_ms=now_ms() - kept_ms)
            num_removed += len(gone)
    Console(stderr=True).print(
        f"{num_before:,} files became {num_after:,}; {num_removed:,} replaced files removed; "
        f"lake at {settings.lake.path}"
    )


def _num_offsets(place: Place) -> int:
    files = place.files()
    return files[-1].end + 1 - files[0].start if files else 0
