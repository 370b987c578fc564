"""A worker in a thread, as `moveline worker` runs it, and what may be asked of it meanwhile."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from features.redis import CatalogueStore
from streams.chunk_cap import WAITING_CHUNKS_DEFAULT
from streams.kafka import committed, end_offsets
from streams.worker import Worker, WorkerConfig, group_of
from tests.waiting import TIMEOUT_S, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics

# The embedded broker takes no member back that it has given up, and a test machine may stand still
# for the ten seconds after which it does. No worker here dies without leaving.
SESSION_TIMEOUT_MS: Final = 120_000


@dataclass
class Running:
    """One worker and its thread; what it raised is raised again where it is asked for."""

    worker: Worker
    stop: threading.Event = field(default_factory=threading.Event)
    errors: list[BaseException] = field(default_factory=list)
    thread: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        """Prepare the thread."""
        self.thread = threading.Thread(target=self._run, name=f"worker-{id(self)}")

    def _run(self) -> None:
        try:
            self.worker.run(self.stop)
        except BaseException as error:  # noqa: BLE001 - raised again by the test's own thread
            self.errors.append(error)

    def end(self) -> None:
        """Stop the worker as a signal would, and raise what it ended with."""
        self.stop.set()
        self.thread.join(TIMEOUT_S)
        assert not self.thread.is_alive(), "the worker did not stop"
        if self.errors:
            raise self.errors[0]

    def counted(self, name: str, **labels: str) -> float:
        """Return a metric's value, 0 before it was counted."""
        sample = f"moveline_{name}"
        return self.worker.metrics.registry.get_sample_value(sample, labels) or 0.0

    def wait(self, name: str, at_least: float, **labels: str) -> None:
        """Return once a metric has grown to a value."""
        until(
            lambda: self.errors or self.counted(name, **labels) >= at_least,
            what=f"{name} {labels} >= {at_least}",
        )
        if self.errors:
            raise self.errors[0]


@contextmanager
def running(
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    *,
    instance: str | None = None,
    batch_max: int = 1_000,
    lake: Path | None = None,
    waiting_chunks_max: int = WAITING_CHUNKS_DEFAULT,
) -> Iterator[Running]:
    """A worker that consumes inside the block and has left its group after it."""
    worker = Worker(
        kafka,
        topics,
        store,
        CatalogueStore(store.client),
        WorkerConfig(
            instance=instance,
            batch_max=batch_max,
            session_timeout_ms=SESSION_TIMEOUT_MS,
            lake=lake,
            waiting_chunks_max=waiting_chunks_max,
        ),
    )
    one = Running(worker)
    one.thread.start()
    try:
        yield one
    finally:
        one.stop.set()
        one.thread.join(TIMEOUT_S)
    one.end()


def caught_up(kafka: KafkaConfig, topics: Topics, generation: int) -> bool:
    """Return whether the generation's group has committed everything the topic holds."""
    # One question may take as long as the whole wait: a broker that stands still is no answer.
    group = group_of(topics, generation)
    done = committed(kafka, group, topics.events, timeout_s=TIMEOUT_S)
    ends = end_offsets(kafka, topics.events, timeout_s=TIMEOUT_S)
    return all(done.get(partition, 0) >= end for partition, end in ends.items())


def wait_caught_up(kafka: KafkaConfig, topics: Topics, one: Running) -> None:
    """Return once the worker has done and committed everything."""
    generation = one.worker.store.generation
    until(lambda: one.errors or caught_up(kafka, topics, generation), what="caught up")
    if one.errors:
        raise one.errors[0]
