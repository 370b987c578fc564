"""`moveline nearline`: the near-line app, in a process that becomes Faust's own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from compose.cli import options
from streams.nearline_config import LATENESS_S_DEFAULT, PORT_DEFAULT, NearlineConfig
from streams.nearline_metrics import METRICS_PORT_DEFAULT


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command("nearline")(nearline)


def nearline(
    *,
    port: Annotated[
        int, typer.Option(envvar="MOVELINE_NEARLINE__PORT", help="Web port of the status page.")
    ] = PORT_DEFAULT,
    metrics_port: Annotated[
        int, typer.Option(envvar="MOVELINE_NEARLINE__METRICS_PORT", help="0 takes a free one.")
    ] = METRICS_PORT_DEFAULT,
    lateness: Annotated[
        float,
        typer.Option(
            envvar="MOVELINE_NEARLINE__LATENESS_S",
            help="Seconds after its gap that a session waits for late events.",
        ),
    ] = LATENESS_S_DEFAULT,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    triton: options.Triton = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Keep trending items, sessions, memories and pointers up to date until Ctrl-C.

    This process becomes `faust -A streams.app worker`. Run several to share the work.
    """
    settings = options.settings_of(
        config, kafka=kafka, redis=redis, triton=triton, generation=generation
    )
    kafka_config, topics = options.kafka_of(settings)
    nearline_config = NearlineConfig(
        kafka=kafka_config,
        topics=topics,
        redis_url=settings.redis.url,
        generation=settings.generation_number,
        port=port,
        metrics_port=metrics_port,
        triton=settings.triton.address,
        lateness_s=lateness,
    )
    environment = os.environ | nearline_config.to_environment()
    # Faust reads the port its own way from the command line, and listens on 6066 without.
    command = [*faust_command(), "--web-port", str(port)]
    sys.stderr.flush()
    os.execve(command[0], command, environment)  # noqa: S606 - Faust owns signals and its loop


def faust_command() -> list[str]:
    """Return what starts the app with this interpreter, wherever its `faust` script is."""
    script = Path(sys.executable).with_name("faust")
    start = [str(script)] if script.exists() else [sys.executable, "-m", "faust"]
    return [*start, "-A", "streams.app", "worker", "--loglevel", "info"]
