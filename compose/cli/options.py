"""Options that several commands share, and the settings they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compose.settings import Settings, load_settings

if TYPE_CHECKING:
    from features.redis import CatalogueStore, StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics
    from streams.worker import WorkerConfig

Config = Annotated[
    Path | None,
    typer.Option("--config", help="Settings file; default moveline.toml.", rich_help_panel="Where"),
]
Kafka = Annotated[
    str | None,
    typer.Option(
        "--kafka", help="Bootstrap servers [MOVELINE_KAFKA__BOOTSTRAP].", rich_help_panel="Where"
    ),
]
Redis = Annotated[
    str | None,
    typer.Option("--redis", help="redis:// URL [MOVELINE_REDIS__URL].", rich_help_panel="Where"),
]
Triton = Annotated[
    str | None,
    typer.Option(
        "--triton", help="Triton's gRPC host:port [MOVELINE_TRITON__GRPC].", rich_help_panel="Where"
    ),
]
Lake = Annotated[
    Path | None,
    typer.Option(
        "--lake", help="Folder of the event log [MOVELINE_LAKE__PATH].", rich_help_panel="Where"
    ),
]
Repository = Annotated[
    Path | None,
    typer.Option(
        "--model-repository",
        help="Folder Triton serves [MOVELINE_MODEL_REPOSITORY].",
        rich_help_panel="Where",
    ),
]
Generation = Annotated[
    str | None,
    typer.Option(
        "--generation",
        help="Generation of state, g1, g2, ... [MOVELINE_GENERATION].",
        rich_help_panel="Where",
    ),
]
RunDir = Annotated[
    Path | None,
    typer.Option(
        "--run-dir", help="Folder of the local stack [MOVELINE_RUN_DIR].", rich_help_panel="Where"
    ),
]


def settings_of(
    config: Path | None = None,
    *,
    kafka: str | None = None,
    redis: str | None = None,
    triton: str | None = None,
    lake: Path | None = None,
    repository: Path | None = None,
    generation: str | None = None,
    run_dir: Path | None = None,
    training: dict[str, object] | None = None,
) -> Settings:
    """Return the settings with a command's options on top."""
    return load_settings(
        config,
        kafka={"bootstrap": kafka},
        redis={"url": redis},
        triton={"grpc": triton},
        lake={"path": lake},
        model_repository=repository,
        generation=generation,
        run_dir=run_dir,
        training=training,
    )


def kafka_of(settings: Settings) -> tuple[KafkaConfig, Topics]:
    """Return how to reach Kafka, and the topics' names."""
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

    return (
        KafkaConfig(settings.kafka.bootstrap, settings.kafka.properties),
        Topics(settings.kafka.prefix),
    )


def stores_of(settings: Settings) -> tuple[StateStore, CatalogueStore]:
    """Return the generation's state (under its recorded rules, if it exists) and the catalogue."""
    from features.redis import CatalogueStore, StateStore, connect

    client = connect(settings.redis.url)
    catalogue = CatalogueStore(client)
    number = settings.generation_number
    config = catalogue.recorded_config(number) or settings.state_config()
    return StateStore(client, number, config), catalogue


def worker_config(
    settings: Settings, *, instance: str | None = None, batch_wait_s: float | None = None
) -> WorkerConfig:
    """Return how a worker consumes, with a command's options on top."""
    from streams.worker import WorkerConfig

    return WorkerConfig(
        instance=instance or settings.worker.instance,
        batch_max=settings.worker.batch_max,
        batch_wait_s=batch_wait_s or settings.worker.batch_wait_s,
        session_timeout_ms=settings.worker.session_timeout_ms,
        lake=settings.lake.path,
        waiting_chunks_max=settings.worker.waiting_chunks_max,
        cache_bytes_max=settings.worker.cache_bytes,
    )
