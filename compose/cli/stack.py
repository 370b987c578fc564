"""`moveline up`, `down`, `status`: the local stack, and the state of whatever is there."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from compose.cli import options
from compose.settings import ADDRESSES_FILE, Settings, load_settings

if TYPE_CHECKING:
    from compose.local.stack import StackOptions
    from compose.local.state import Addresses


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("up")(up)
    app.command("down")(down)
    app.command("status")(status)


def up(
    *,
    kafka_home: Annotated[
        Path | None,
        typer.Option(
            envvar="KAFKA_HOME",
            help="Start this Apache Kafka (needs java) instead of the embedded broker.",
        ),
    ] = None,
    run_dir: options.RunDir = None,
    repository: options.Repository = None,
    config: options.Config = None,
) -> None:
    """Start Kafka, Redis and Triton on free ports, create the topics, load the models.

    The addresses are remembered in the run folder, so the other commands find the stack by
    themselves. `moveline down` stops it. Running it again does nothing.
    """
    from compose.local.stack import LocalStack

    console = Console(stderr=True)
    given = load_settings(config, run_dir=run_dir, model_repository=repository)
    stack = LocalStack(given.run_dir)
    addresses = stack.up(stack_options(given, kafka_home), report=console.print)
    settings = remember(given, addresses)
    prepare(settings, console)
    print_addresses(settings, Console())


def down(*, run_dir: options.RunDir = None) -> None:
    """Stop everything `moveline up` started; data stays in the run folder."""
    from compose.local.stack import LocalStack

    settings = load_settings(run_dir=run_dir)
    LocalStack(settings.run_dir).down()
    (settings.run_dir / ADDRESSES_FILE).unlink(missing_ok=True)
    Console(stderr=True).print(f"stopped; data and logs stay in {settings.run_dir}")


def stack_options(
    settings: Settings, kafka_home: Path | None, *, persist: bool = True
) -> StackOptions:
    """Return what to start for these settings."""
    from compose.local.stack import StackOptions

    return StackOptions(
        run_dir=settings.run_dir,
        model_repository=settings.model_repository,
        kafka_home=kafka_home,
        persist=persist,
        triton_environment={
            "MOVELINE_REDIS__URL": "{redis}",
            "MOVELINE_KAFKA__BOOTSTRAP": "{kafka}",
            "MOVELINE_KAFKA__PREFIX": settings.kafka.prefix,
            "MOVELINE_FEATURE_LOG__SHARE": str(settings.feature_log.share),
        },
    )


def remember(settings: Settings, addresses: Addresses) -> Settings:
    """Write where the stack answers for later commands; return the settings that use it.

    The worker's metrics get a free port too: its default may be taken by another stack.
    """
    from compose.local.ports import free_ports

    # A second `up` of a running stack must not move the port of its running worker.
    known = settings.kafka.bootstrap == addresses.kafka
    metrics_port = settings.worker.metrics_port if known else free_ports(1)[0]
    settings.run_dir.mkdir(parents=True, exist_ok=True)
    (settings.run_dir / ADDRESSES_FILE).write_text(
        "# Written by `moveline up`, removed by `moveline down`.\n"
        f'[kafka]\nbootstrap = "{addresses.kafka}"\n'
        f'[redis]\nurl = "{addresses.redis}"\n'
        f'[triton]\ngrpc = "{addresses.triton_grpc}"\nhttp = "{addresses.triton_http}"\n'
        f"[worker]\nmetrics_port = {metrics_port}\n",
        encoding="utf-8",
    )
    return settings.model_copy(
        update={
            "kafka": settings.kafka.model_copy(update={"bootstrap": addresses.kafka}),
            "redis": settings.redis.model_copy(update={"url": addresses.redis}),
            "triton": settings.triton.model_copy(
                update={"grpc": addresses.triton_grpc, "http": addresses.triton_http}
            ),
            "worker": settings.worker.model_copy(update={"metrics_port": metrics_port}),
        }
    )


def prepare(settings: Settings, console: Console) -> None:
    """Create the topics and load what Triton serves."""
    from compose.serving import load_served_models
    from streams.chain import ensure_installation

    created = ensure_installation(
        *options.kafka_of(settings),
        partitions=settings.kafka.partitions,
        replication=settings.kafka.replication,
    )
    console.print(f"topics created: {', '.join(created) or 'none, all were there'}")
    console.print(f"models loaded: {', '.join(load_served_models(settings))}")


def print_addresses(settings: Settings, console: Console) -> None:
    """Say where the stack answers and what to try."""
    table = Table(show_header=False, box=None)
    table.add_row("Kafka", settings.kafka.bootstrap)
    table.add_row("Redis", settings.redis.url)
    table.add_row("Triton gRPC", settings.triton.grpc)
    table.add_row("Triton HTTP", settings.triton.http)
    table.add_row("run folder", str(settings.run_dir))
    console.print(table)
    console.print(
        "Next: `moveline worker` and `moveline lake` in two terminals, then `moveline produce "
        "FILE`, `moveline status`, `moveline features USER`, `moveline recommend USER`."
    )


def status(
    *,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    lake: options.Lake = None,
    run_dir: options.RunDir = None,
    config: options.Config = None,
) -> None:
    """Show topics, lag, users, model versions, the live pointers and freshness."""
    from compose.status import print_status

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, triton=triton, lake=lake, run_dir=run_dir
    )
    if not print_status(settings, Console()):
        raise typer.Exit(code=1)
