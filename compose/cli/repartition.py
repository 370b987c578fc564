"""`moveline repartition`: another number of partitions for the event log."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from compose.cli import options

if TYPE_CHECKING:
    from compose.settings import Settings
    from streams.repartition import Repartition, RepartitionReport


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("repartition")(repartition)


def repartition(
    *,
    partitions: Annotated[
        int | None, typer.Option(min=1, max=10_000, help="Partitions the log shall have.")
    ] = None,
    late: Annotated[
        bool,
        typer.Option(
            "--late", help="Only move what retired topics were sent after they had ended."
        ),
    ] = False,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    config: options.Config = None,
) -> None:
    """Go on with the event log in a new topic that has another number of partitions.

    Nothing needs to stand still: the old topic gets a last record in each partition, workers, the
    lake and the near-line app apply what is before it and go over to the new topic by themselves,
    and replays read both. Producers have to be pointed at the new topic, which the command names;
    moveline produce finds it by itself. What comes into the old topic later does not count there:
    it waits until this command, repeated with --late, moves it.

    Also the way out when somebody has widened the topic in place, which workers refuse. After a
    crash, or a broker that was away, the same command goes on.

    Example: moveline repartition --partitions 8
    """
    settings = options.settings_of(config, kafka=kafka, redis=redis)
    if late == (partitions is not None):
        raise typer.BadParameter("give either --partitions N or --late")
    run = _repartition(settings)
    console = Console(stderr=True, highlight=False)
    if partitions is None:
        console.print(f"{run.move_late():,} late records moved")
    else:
        _print(run.run(partitions), console)


def _repartition(settings: Settings) -> Repartition:
    from features.redis import StateStore, connect
    from streams.control import read_pointers
    from streams.generations import UNPUBLISHED
    from streams.repartition import Repartition

    kafka, topics = options.kafka_of(settings)
    pointers = read_pointers(kafka, topics)
    live = UNPUBLISHED if pointers is None else pointers.generation
    return Repartition(
        kafka,
        topics,
        replication=settings.kafka.replication,
        live=StateStore(connect(settings.redis.url), live, settings.state_config()),
        shown=True,
    )


def _print(report: RepartitionReport, console: Console) -> None:
    console.print(f"{report.num_moved:,} records moved that lay where they do not count")
    if report.old is None:
        console.print(f"{report.new} has {report.num_partitions} partitions already")
        return
    console.print(
        f"{report.old} has ended; the log goes on in {report.new}, {report.num_partitions} "
        f"partitions.\nNext: point the producers at {report.new}; once they are, moveline "
        "repartition --late moves what they still sent to the old one, and moveline status "
        "shows whether more has come."
    )
