"""`moveline dlq list|show|redrive`: records that were no events."""

from __future__ import annotations

import heapq
from collections import Counter
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options

if TYPE_CHECKING:
    from streams.dead_letters import StoredLetter
    from streams.redrive import Marks

# Bytes of a record's value that `show` prints; all of them are in the topic.
SHOWN_BYTES = 20_000
Reason = Annotated[str | None, typer.Option(help="Only this reason, for example unknown_action.")]
dlq_app = typer.Typer(help="The dead letters.", no_args_is_help=True)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.add_typer(dlq_app, name="dlq")


@dlq_app.command("list")
def list_letters(
    *,
    reason: Reason = None,
    since: Annotated[
        str | None, typer.Option(help="Only those set aside since; ISO or epoch ms.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Letters to show, the newest.")] = 20,
    kafka: options.Kafka = None,
    config: options.Config = None,
) -> None:
    """Count the dead letters by reason and show the newest first."""
    from compose.cli.operate import parse_time
    from streams.dead_letters import read_letters
    from streams.redrive import is_redriven, read_marks

    kafka_config, topics = options.kafka_of(options.settings_of(config, kafka=kafka))
    since_ms = 0 if since is None else parse_time(since)
    marks = read_marks(kafka_config, topics)
    counts: Counter[str] = Counter()
    redriven: Counter[str] = Counter()
    newest: list[tuple[int, int, int, StoredLetter]] = []
    for letter in read_letters(kafka_config, topics):
        if letter.stored_ms < since_ms or reason not in {None, letter.reason}:
            continue
        counts[letter.reason] += 1
        redriven[letter.reason] += is_redriven(letter, marks)
        entry = (letter.stored_ms, letter.partition, letter.offset, letter)
        (heapq.heappush if len(newest) < limit else heapq.heappushpop)(newest, entry)
    console = Console()
    console.print(_counts_table(counts, redriven))
    console.print(_letters_table([entry[3] for entry in sorted(newest, reverse=True)], marks))


@dlq_app.command("show")
def show_letter(
    place: Annotated[str, typer.Argument(help="PARTITION:OFFSET as `list` prints it.")],
    *,
    kafka: options.Kafka = None,
    config: options.Config = None,
) -> None:
    """Show one dead letter: why, where from, its headers and its original bytes."""
    from streams.dead_letters import read_letter

    partition, _, offset = place.partition(":")
    if not (partition.isdecimal() and offset.isdecimal()):
        raise typer.BadParameter(f"{place!r} is not PARTITION:OFFSET, for example 0:17")
    kafka_config, topics = options.kafka_of(options.settings_of(config, kafka=kafka))
    letter = read_letter(kafka_config, topics, int(partition), int(offset))
    console = Console(highlight=False, soft_wrap=True)
    table = Table(show_header=False, box=None)
    table.add_row("set aside", _time(letter.stored_ms))
    for name, value in letter.facts.items():
        table.add_row(name, value)
    table.add_row("key", readable(letter.key))
    for name, raw in letter.own_headers:
        table.add_row(f"header {name}", readable(raw))
    console.print(table)
    console.print(readable(letter.value), markup=False)


@dlq_app.command("redrive")
def redrive_letters(
    *,
    reason: Reason = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be sent, send nothing.")
    ] = False,
    kafka: options.Kafka = None,
    config: options.Config = None,
) -> None:
    """Send dead letters into the events topic again: their own key, bytes and headers.

    For when the cause is gone (an action was added to a new generation, a key was mended by an
    upgrade). Each letter is sent once; one that is refused again comes back as a new letter.
    """
    from streams.chain import current_topics
    from streams.redrive import redrive

    kafka_config, topics = options.kafka_of(options.settings_of(config, kafka=kafka))
    topics = current_topics(kafka_config, topics)
    report = redrive(kafka_config, topics, reason=reason, dry_run=dry_run, shown=not dry_run)
    counts = ", ".join(f"{n:,} {why}" for why, n in report.sent.most_common()) or "none"
    verb = "would be sent" if dry_run else "sent"
    Console(stderr=True).print(
        f"{verb}: {counts}; sent before: {report.num_before:,}; "
        f"second letters of one record: {report.num_twins:,}"
    )


def readable(raw: bytes | None) -> str:
    r"""Return bytes as text where they are text, escaped byte by byte where they are not.

    >>> readable(b"{broken"), readable(b"\xff1"), readable(None)
    ('{broken', '\\xff1', '(none)')
    """
    if raw is None:
        return "(none)"
    text = raw[:SHOWN_BYTES].decode(errors="backslashreplace")
    more = len(raw) - SHOWN_BYTES
    return text if more <= 0 else f"{text}... and {more:,} bytes more"


def _time(time_ms: int) -> str:
    return datetime.fromtimestamp(time_ms / 1000, UTC).isoformat(timespec="seconds")


def _counts_table(counts: Counter[str], redriven: Counter[str]) -> Table:
    table = Table("reason", title="dead letters", title_justify="left")
    table.add_column("letters", justify="right")
    table.add_column("sent again", justify="right")
    for reason, count in counts.most_common():
        table.add_row(reason, f"{count:,}", f"{redriven[reason]:,}")
    return table


def _letters_table(letters: list[StoredLetter], marks: Marks) -> Table:
    from streams.redrive import is_redriven

    table = Table("letter", "set aside", "reason", "detail", "from", "sent again")
    for letter in letters:
        table.add_row(
            letter.place,
            _time(letter.stored_ms),
            letter.reason,
            letter.facts.get("detail", ""),
            ":".join(letter.source[1:]),
            "yes" if is_redriven(letter, marks) else "no",
        )
    return table
