"""What the benchmarks share: a stack of their own, a workload, a worker process to watch."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from compose.local.foreground import running_stack
from compose.local.ports import free_ports
from compose.local.stack import StackOptions
from features.events import Event, encode_event
from streams.kafka import KafkaConfig, ensure_topics, make_producer
from streams.progress import progress_bar
from streams.topics import Topics

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from compose.local.stack import LocalStack

CONSOLE: Final = Console(stderr=True)
TOPICS: Final = Topics()
# A folder of Apache Kafka's jars beside the checkout is used when nothing else is named.
KAFKA_BESIDE: Final = Path("../shared/kafka")
_START_MS: Final = 1_763_700_000_000


def is_recording(document: str | None) -> bool:
    """Return whether the command line has --record; --help prints the module's document."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--record", action="store_true", help="keep the result under benchmarks/results"
    )
    return bool(parser.parse_args().record)


def kafka_home() -> Path | None:
    """Return a real Apache Kafka to measure on, or say loudly that there is none."""
    named = os.environ.get("KAFKA_HOME")
    home = Path(named) if named else KAFKA_BESIDE
    if (home / "libs").is_dir():
        return home
    CONSOLE.print(
        "[bold red]No KAFKA_HOME: measuring on the embedded broker, not on Apache Kafka.[/bold red]"
    )
    return None


@contextmanager
def kafka_and_redis() -> Iterator[tuple[LocalStack, KafkaConfig]]:
    """Yield a stack with empty data and the topics created; gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="moveline-bench-") as folder:
        options = StackOptions(
            run_dir=Path(folder),
            services=frozenset({"redis", "kafka"}),
            kafka_home=kafka_home(),
            persist=False,
        )
        with running_stack(options, report=CONSOLE.print) as stack:
            kafka = KafkaConfig(stack.addresses.kafka)
            ensure_topics(kafka, TOPICS.specs(partitions=4, replication=1))
            yield stack, kafka


def zipf_users(num_events: int, num_users: int, *, exponent: float, seed: int) -> list[int]:
    """Return the user of each event; user 1 is the busiest."""
    weights = 1 / np.arange(1, num_users + 1) ** exponent
    rng = np.random.default_rng(seed)
    drawn = rng.choice(num_users, num_events, p=weights / weights.sum()) + 1
    return [int(user) for user in drawn]


def numbered_event(number: int, user: int) -> Event:
    """Return a user's event; all fields a click carries, and other ones for another number."""
    return Event(
        event_id=f"event-{number:010d}",
        user_id=user,
        item_id=number * 7_919 % 50_000,
        action="click",
        event_time_ms=_START_MS + number,
        domain=f"domain-{number % 30}",
        dwell_ms=number % 5_000,
    )


def publish(
    kafka: KafkaConfig, users: Sequence[int], *, first: int = 0, topic: str = TOPICS.events
) -> None:
    """Publish one event per entry as JSON, numbered from `first`."""
    producer = make_producer(kafka)
    with progress_bar("publish", total=len(users), shown=True) as advance:
        for number, user in enumerate(users, start=first):
            value = encode_event(numbered_event(number, user))
            while True:
                try:
                    producer.produce(topic, value, b"%d" % user)
                    break
                except BufferError:
                    producer.poll(0.1)
            if number % 10_000 == 0:
                producer.poll(0)
                advance(10_000)
    assert producer.flush(120) == 0


class WorkerProcess:
    """A `moveline worker` and its metrics."""

    def __init__(
        self, stack: LocalStack, *, name: str = "worker", arguments: Sequence[str] = ()
    ) -> None:
        self.name = name
        self.stack = stack
        self.port = free_ports(1)[0]
        addresses = stack.addresses
        command = [sys.executable, "-m", "compose.cli", "worker", "--instance", name]
        command += ["--kafka", addresses.kafka, "--redis", addresses.redis]
        command += ["--metrics-port", str(self.port), *arguments]
        self.running = stack.spawn(name, command)

    def metric(self, sample: str) -> float:
        """Return the sum of one sample over its labels; 0 while the worker does not answer."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as page:
                text = page.read().decode()
        except OSError:
            return 0.0
        families = text_string_to_metric_families(text)
        return sum(s.value for family in families for s in family.samples if s.name == sample)

    def rate_until(self, num_events: int, *, timeout_s: float = 600.0) -> float:
        """Return events/s between the first micro-batch seen and `num_events` applied."""
        first = self.wait_until(1, timeout_s=timeout_s)
        first_at = time.perf_counter()
        assert first < num_events, f"{first:,.0f} events came at once: nothing to measure"
        self.wait_until(num_events, timeout_s=timeout_s)
        return (num_events - first) / (time.perf_counter() - first_at)

    def wait_until(self, num_events: int, *, timeout_s: float = 600.0) -> float:
        """Return the number applied once it is at least `num_events`."""
        deadline = time.perf_counter() + timeout_s
        while (applied := self.metric("moveline_events_total")) < num_events:
            if time.perf_counter() > deadline:
                log = self.running.log.read_text(encoding="utf-8")[-2_000:]
                raise TimeoutError(f"{applied:,.0f} of {num_events:,} events applied: {log}")
            time.sleep(0.01)
        return applied

    def cpu_s(self) -> float:
        """Return the CPU seconds the worker has used."""
        fields = Path(f"/proc/{self.running.pid}/stat").read_text(encoding="utf-8").split()
        return (int(fields[13]) + int(fields[14])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        """Return the worker's resident memory."""
        status = Path(f"/proc/{self.running.pid}/status").read_text(encoding="utf-8")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) / 1024
