"""What `moveline status` says: each part by itself, and a part that is away says so."""

from __future__ import annotations

import urllib.error
import urllib.request
from datetime import timedelta
from typing import TYPE_CHECKING, Final

from prometheus_client.parser import text_string_to_metric_families
from rich.table import Table

from compose.cli.options import kafka_of, stores_of
from compose.local.stack import LocalStack
from compose.trainer_service.look import find_served
from compose.trainer_service.records import RunRecordError, runs_of
from features import lake
from features.clock import now_ms
from features.errors import FeatureError
from features.redis import count_users
from scoring.errors import ScoringError
from scoring.triton import TritonServer
from streams.chain import known_chain, refuse_other_count
from streams.errors import StreamError
from streams.kafka import committed, watermarks
from streams.repartition import num_late
from streams.worker import group_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from compose.settings import Settings

_METRICS_TIMEOUT_S: Final = 2.0


def print_status(settings: Settings, console: Console) -> bool:
    """Print every part; return whether all of them answered."""
    parts: tuple[Callable[[Settings, Console], None], ...] = (
        _stack,
        _topics,
        _state,
        _models,
        _trainer,
        _event_log,
        _freshness,
    )
    complete = True
    for part in parts:
        try:
            part(settings, console)
        except (StreamError, FeatureError, ScoringError, RunRecordError) as error:
            console.print(f"[red]{error}[/red]")
            complete = False
    return complete


def _stack(settings: Settings, console: Console) -> None:
    running = LocalStack(settings.run_dir).running()
    if not running:
        return
    table = Table("process", "pid", "is", "log", title="local stack", title_justify="left")
    for process in running:
        state = "up" if process.alive else "[red]gone[/red]"
        table.add_row(process.name, str(process.pid), state, str(process.log))
    console.print(table)


def _topics(settings: Settings, console: Console) -> None:
    kafka, topics = kafka_of(settings)
    chain = known_chain(kafka, topics)
    topics = topics.at(chain.current)
    group = group_of(topics, settings.generation_number)
    done = committed(kafka, group, topics.events)
    table = Table(
        "topic",
        "partition",
        "first",
        "end",
        f"lag of {group}",
        title=f"topics at {kafka.bootstrap}",
        title_justify="left",
    )
    for topic in (topics.events, topics.items, topics.dead_letters, topics.control):
        for partition, (low, high) in sorted(watermarks(kafka, topic).items()):
            lag = str(high - done.get(partition, low)) if topic == topics.events else ""
            table.add_row(topic, str(partition), str(low), str(high), lag)
    console.print(table)
    for retired, count in num_late(kafka, topics, chain).items():
        late = (
            f"[red]{count:,} not looked at: moveline repartition --late[/red]" if count else "none"
        )
        console.print(f"{retired} has ended, the log goes on in {topics.events}; since: {late}")
    refuse_other_count(kafka, topics, chain)


def _state(settings: Settings, console: Console) -> None:
    store, catalogue = stores_of(settings)
    pointers = catalogue.get_pointers()
    users = count_users(store.client, store.generation)
    live = (
        "nothing published"
        if pointers is None
        else f"generation g{pointers.generation}, model version {pointers.model_version}"
    )
    tried = None if pointers is None else pointers.canary
    if tried is not None:
        live += f", version {tried.version} tried as a {tried.mode} on {tried.share:.1%} of users"
    console.print(f"state: {users:,} users in g{store.generation}; live: {live}")


def _models(settings: Settings, console: Console) -> None:
    for address in settings.triton.addresses:
        with TritonServer(address) as server:
            versions = server.versions()
        table = Table("model", "version", "is", title=f"Triton at {address}")
        table.title_justify = "left"
        for model, found in sorted(versions.items()):
            for version, state, reason in found or [(0, "not loaded", "")]:
                table.add_row(model, str(version or "-"), f"{state} {reason}".strip())
        console.print(table)


def _trainer(settings: Settings, console: Console) -> None:
    served = find_served(settings)
    if served is not None and served.facts is not None:
        age = timedelta(seconds=(now_ms() - served.facts.created_ms) // 1000)
        console.print(f"version {served.version} was trained {age} ago")
    newest = runs_of(settings.models).newest()
    if newest is not None:
        says = f": {newest.says}" if newest.says else ""
        console.print(f"newest run of the trainer: {newest.run} {newest.state}{says}")


def _event_log(settings: Settings, console: Console) -> None:
    _, topics = kafka_of(settings)
    root = settings.lake.path
    names = lake.log_topics(root, topics.events)
    files = [file for name in names for file in lake.list_files(root, name)]
    covered = sum(file.end - file.start + 1 for file in files)
    console.print(f"lake: {len(files)} files, {covered:,} offsets in {settings.lake.path}")


def _freshness(settings: Settings, console: Console) -> None:
    url = f"http://127.0.0.1:{settings.worker.metrics_port}/metrics"
    try:
        with urllib.request.urlopen(url, timeout=_METRICS_TIMEOUT_S) as answer:
            text = answer.read().decode()
    except (urllib.error.URLError, OSError):
        console.print(f"freshness: no worker answers at {url}")
        return
    console.print(f"freshness (append to Redis): {freshness_line(text)}")


def freshness_line(metrics_text: str) -> str:
    """Return the quantiles of a worker's freshness histogram in words."""
    buckets: list[tuple[float, float]] = []
    for family in text_string_to_metric_families(metrics_text):
        if family.name == "moveline_freshness_seconds":
            buckets = [
                (float(s.labels["le"]), s.value)
                for s in family.samples
                if s.name.endswith("_bucket")
            ]
    total = buckets[-1][1] if buckets else 0
    if not total:
        return "no micro-batch yet"
    p50, p99 = (
        next(edge for edge, count in buckets if count >= share * total) for share in (0.5, 0.99)
    )
    return f"p50 <= {p50:g} s, p99 <= {p99:g} s over {total:,.0f} micro-batches"
