"""`moveline produce`, `items`, `topics`, `worker`, `lake`: events on their way in."""

from __future__ import annotations

import gc
import signal
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from compose.cli import options
from streams.errors import DeliveryError

if TYPE_CHECKING:
    from types import FrameType

Maps = Annotated[
    list[str] | None,
    typer.Option("--map", help="FIELD=COLUMN, for example user_id=household_id. Repeat."),
]
Constants = Annotated[
    list[str] | None,
    typer.Option("--const", help="FIELD=VALUE for every row, for example action=click. Repeat."),
]
FileFormat = Annotated[
    str | None, typer.Option("--format", help="csv, parquet or jsonl; by the ending if left out.")
]
items_app = typer.Typer(help="The item catalogue.", no_args_is_help=True)
topics_app = typer.Typer(help="The topics.", no_args_is_help=True)


# A micro-batch makes hundreds of thousands of small objects and no cycle: looking for cycles every
# 700 of them cost a third of the worker's time.
GC_THRESHOLD = 200_000


def collect_seldom() -> None:
    """Let this process look for cycles seldom, as suits one that applies micro-batches."""
    gc.set_threshold(GC_THRESHOLD)


def register(app: typer.Typer) -> None:
    """Add the commands."""
    app.command("produce")(produce)
    app.command("worker")(worker)
    app.command("lake")(lake)
    app.add_typer(items_app, name="items")
    app.add_typer(topics_app, name="topics")


def stop_on_signals() -> threading.Event:
    """Return an event that Ctrl-C and SIGTERM set, so that work ends between two effects."""
    stop = threading.Event()

    def request_stop(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    signal.signal(signal.SIGINT, request_stop)
    signal.signal(signal.SIGTERM, request_stop)
    return stop


def produce(
    source: Annotated[str, typer.Argument(help="CSV, Parquet or JSON-lines file; - for stdin.")],
    *,
    maps: Maps = None,
    constants: Constants = None,
    time_unit: Annotated[str, typer.Option(help="Unit of event times: s, ms or iso.")] = "ms",
    file_format: FileFormat = None,
    rate: Annotated[float | None, typer.Option(help="Events per second at most.")] = None,
    msgpack: Annotated[bool, typer.Option(help="Send MessagePack instead of JSON.")] = False,
    kafka: options.Kafka = None,
    config: options.Config = None,
) -> None:
    """Publish a file's rows as events, acknowledged one and all.

    Sending the same file twice changes nothing: event ids come from the file's hash and the row.

    Example: moveline produce tx.parquet --map user_id=household_id --map item_id=product_id
    --map event_time_ms=transaction_timestamp --map domain=department --const action=purchase
    """
    from streams.chain import current_topics
    from streams.columns import parse_mapping
    from streams.producer import EventProducer
    from streams.publish import publish_events
    from streams.sources import read_events

    settings = options.settings_of(config, kafka=kafka)
    kafka_config, topics = options.kafka_of(settings)
    topics = current_topics(kafka_config, topics)
    mapping = parse_mapping(maps or (), constants or (), time_unit=time_unit)
    events = read_events(source, mapping=mapping, file_format=file_format)
    with EventProducer(kafka_config, topics.events, msgpack=msgpack) as producer:
        report = publish_events(producer, events, rate=rate)
    Console(stderr=True).print(
        f"{report.num_delivered:,} events acknowledged in {report.seconds:.1f} s, "
        f"{report.events_per_s:,.0f} events/s"
    )
    if report.num_failed:
        raise DeliveryError(
            f"{report.num_failed} of {report.num_sent} events were not delivered "
            f"({report.first_failure}). Send the same file again: what arrived is not doubled.",
            retriable=True,
        )


@items_app.command("load")
def load_items(
    source: Annotated[str, typer.Argument(help="CSV, Parquet or JSON-lines file; - for stdin.")],
    *,
    maps: Maps = None,
    constants: Constants = None,
    file_format: FileFormat = None,
    kafka: options.Kafka = None,
    config: options.Config = None,
) -> None:
    """Publish a file's rows as catalogue entries; the last entry of an item wins.

    Fields: item_id, name, categories, available. Several columns join with +:
    --map name=brand+product_type --map categories=department+product_category
    """
    from streams.columns import parse_mapping
    from streams.publish import publish_items
    from streams.sources import read_items

    settings = options.settings_of(config, kafka=kafka)
    kafka_config, topics = options.kafka_of(settings)
    mapping = parse_mapping(maps or (), constants or ())
    items = read_items(source, mapping=mapping, file_format=file_format)
    report = publish_items(kafka_config, topics, items)
    Console(stderr=True).print(f"{report.num_delivered:,} items acknowledged")


@topics_app.command("create")
def create_topics(*, kafka: options.Kafka = None, config: options.Config = None) -> None:
    """Create the topics that are missing and check those that exist."""
    from streams.chain import ensure_installation

    settings = options.settings_of(config, kafka=kafka)
    created = ensure_installation(
        *options.kafka_of(settings),
        partitions=settings.kafka.partitions,
        replication=settings.kafka.replication,
    )
    Console(stderr=True).print(f"created: {', '.join(created) or 'none, all were there and right'}")


def worker(
    *,
    instance: Annotated[
        str | None,
        typer.Option(help="Static member id: unique per worker, the same after a restart."),
    ] = None,
    metrics_port: Annotated[
        int | None, typer.Option(help="Prometheus port; 0 takes a free one and says which.")
    ] = None,
    batch_wait: Annotated[
        float | None, typer.Option(help="Seconds a micro-batch may wait to fill.")
    ] = None,
    kafka: options.Kafka = None,
    redis: options.Redis = None,
    lake_path: options.Lake = None,
    generation: options.Generation = None,
    config: options.Config = None,
) -> None:
    """Keep every user's streams and session in Redis up to date until Ctrl-C.

    Run as many as there are partitions. Malformed events go to the dead-letter topic. While Redis
    is away or full, consumption pauses and nothing is lost.
    """
    from prometheus_client import start_http_server

    from features.generations import Generations
    from streams.worker import Worker

    settings = options.settings_of(
        config, kafka=kafka, redis=redis, lake=lake_path, generation=generation
    )
    kafka_config, topics = options.kafka_of(settings)
    store, catalogue = options.stores_of(settings)
    Generations(store.client).refuse_some_users(store.generation)
    hot = Worker(
        kafka_config,
        topics,
        store,
        catalogue,
        options.worker_config(settings, instance=instance, batch_wait_s=batch_wait),
    )
    port = settings.worker.metrics_port if metrics_port is None else metrics_port
    collect_seldom()
    try:
        server, thread = start_http_server(
            port, addr=settings.worker.metrics_host, registry=hot.metrics.registry
        )
    except OSError as error:
        raise typer.BadParameter(
            f"metrics port {port} cannot be opened ({error}): give another --metrics-port"
        ) from error
    Console(stderr=True).print(f"metrics at http://127.0.0.1:{server.server_port}/metrics")
    try:
        hot.run(stop_on_signals())
    finally:
        server.shutdown()
        thread.join()


def lake(
    *,
    until_end: Annotated[
        bool, typer.Option(help="Stop at the end the topic has now, with a progress bar.")
    ] = False,
    kafka: options.Kafka = None,
    path: options.Lake = None,
    config: options.Config = None,
) -> None:
    """Write the event log to Parquet, each event exactly once, until Ctrl-C.

    Where it continues is decided by the files alone; a crash leaves whole files only.
    """
    from streams.lake_chain import LogSink

    settings = options.settings_of(config, kafka=kafka, lake=path)
    kafka_config, topics = options.kafka_of(settings)
    sink = LogSink(kafka_config, topics, Path(settings.lake.path), flush_s=settings.lake.flush_s)
    report = sink.run(stop_on_signals(), until_end=until_end, progress=True)
    Console(stderr=True).print(
        f"{report.num_rows:,} events written, "
        f"{report.num_invalid:,} that are no events left out; lake at {settings.lake.path}"
    )
