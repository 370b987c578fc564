"""The `moveline` command: one file a group of verbs, one place where errors become sentences."""

from __future__ import annotations

import logging
import sys
from typing import Final

import typer
from rich.console import Console
from rich.logging import RichHandler

from compose.cli import (
    answers,
    canary,
    data,
    forget,
    lake,
    lifelong,
    models,
    nearline,
    operate,
    repartition,
    skew,
    stack,
    trainer,
    versions,
)
from compose.errors import ComposeError
from features.errors import FeatureError
from scoring.errors import ScoringError

app = typer.Typer(
    name="moveline",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help=(
        "Keep every user's stream live and recommend from it: events in on Kafka, state in "
        "Redis, models in Triton.\n\n"
        "Start with [bold]moveline up[/bold] (local servers) or point at your own with "
        "--kafka, --redis, --triton, MOVELINE_* variables or moveline.toml."
    ),
    epilog=(
        "A first tour: moveline up; moveline worker & moveline lake &; moveline produce "
        "events.parquet; moveline train; moveline publish; moveline recommend 42"
    ),
)
stack.register(app)
data.register(app)
lake.register(app)
lifelong.register(app)
models.register(app)
trainer.register(app)
versions.register(app)
canary.register(app)
answers.register(app)
operate.register(app)
repartition.register(app)
nearline.register(app)
forget.register(app)
skew.register(app)


@app.callback()
def _options(
    *, verbose: bool = typer.Option(False, "--verbose", "-v", help="Show what happens inside.")
) -> None:
    handler = RichHandler(console=Console(stderr=True), show_path=False)
    if not verbose:
        handler.addFilter(OnceInAWhile())
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(name)s: %(message)s",
        handlers=[handler],
    )


# While a broker is away librdkafka says so several times a second; a person wants it once.
REPEAT_S: Final = 30.0
KAFKA_LOGGER: Final = "moveline.kafka"


class OnceInAWhile(logging.Filter):
    """Lets one line of each kind through per REPEAT_S; its first word is a Kafka line's kind."""

    def __init__(self) -> None:
        super().__init__()
        self._said_at: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the line should be shown."""
        if record.name != KAFKA_LOGGER:
            return True
        kind = record.getMessage().partition(" ")[0]
        last = self._said_at.get(kind)
        if last is not None and record.created - last < REPEAT_S:
            return False
        self._said_at[kind] = record.created
        return True


def main() -> None:
    """Run the command line; an error of ours is one sentence on stderr and exit code 1."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except _expected_errors() as error:
        Console(stderr=True, soft_wrap=True, highlight=False).print(
            f"moveline: {error}", style="red", markup=False
        )
        sys.exit(1)


def _expected_errors() -> tuple[type[Exception], ...]:
    """Return the roots of our errors; those of packages not imported cannot have been raised."""
    roots: list[type[Exception]] = [ComposeError, FeatureError, ScoringError]
    for module, name in (("streams.errors", "StreamError"), ("trainer.errors", "TrainerError")):
        if module in sys.modules:
            roots.append(getattr(sys.modules[module], name))
    return tuple(roots)
