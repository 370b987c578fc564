"""The installation that `make faults` breaks: traffic, one producer, workers that are restarted."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from benchmarks.common import CONSOLE, TOPICS, WorkerProcess, zipf_users
from features.config import StateConfig
from features.events import Event, encode_event
from features.redis import StateStore, connect
from streams.kafka import committed, end_offsets, make_producer
from streams.worker import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from compose.local.stack import LocalStack
    from streams.kafka import KafkaConfig

NUM_USERS: Final = 5_000
# Past these shares of [0, 1) a draw makes an ordinary event.
MALFORMED: Final = 0.01
REPEATED: Final = 0.04
LATE: Final = 0.07
_START_MS: Final = 1_763_700_000_000
_LATE_MS: Final = 3 * 3_600_000
# A takeover needs the session time-out of ten seconds, a restarted JVM likewise; two cores are few.
PATIENCE_S: Final = 180.0
_POLL_S: Final = 0.05


class CaseFailedError(Exception):
    """A case did not get where it wanted to: nothing can be said about the state."""


class Traffic:
    """Seeded records of an installation that is used: repeats, late events, malformed records."""

    def __init__(self, num_records: int, seed: int) -> None:
        self.source = random.Random(seed)  # noqa: S311 - traffic, not cryptography
        self.users = iter(zipf_users(num_records, NUM_USERS, exponent=1.1, seed=seed))
        self.recent: deque[tuple[bytes, bytes]] = deque(maxlen=2_000)
        self.malformed: Counter[tuple[bytes, bytes]] = Counter()
        self.number = 0

    def one(self) -> tuple[bytes, bytes]:
        """Return the next key and value."""
        self.number += 1
        user, kind = next(self.users), self.source.random()
        if kind < MALFORMED:
            record = self._malformed(user)
            self.malformed[record] += 1
            return record
        if kind < REPEATED and self.recent:
            return self.source.choice(self.recent)
        late_ms = self.source.randrange(_LATE_MS) if kind < LATE else 0
        record = b"%d" % user, encode_event(self._event(user, late_ms))
        self.recent.append(record)
        return record

    def _event(self, user: int, late_ms: int) -> Event:
        return Event(
            event_id=f"event-{self.number}",
            user_id=user,
            item_id=self.number * 7_919 % 50_000,
            action=self.source.choice(["impression", "click", "click", "view", "purchase"]),
            event_time_ms=_START_MS + self.number * 100 - late_ms,
            domain=f"domain-{self.number % 30}",
            dwell_ms=self.number % 5_000,
        )

    def _malformed(self, user: int) -> tuple[bytes, bytes]:
        """Return one that is no JSON, lacks a field, or is of another user than its key says."""
        key = b"%d" % user
        return self.source.choice(
            [
                (key, b"{broken %d" % self.number),
                (key, b'{"event_id":"event-%d","user_id":%d}' % (self.number, user)),
                (b"%d" % (user + 1), encode_event(self._event(user, 0))),
            ]
        )


@dataclass
class Publisher:
    """One producer for a whole case; what it sent is acknowledged when `send` returns."""

    kafka: KafkaConfig
    traffic: Traffic
    num_sent: int = 0
    failed: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Open the one producer: a second one could overtake it."""
        self.producer = make_producer(self.kafka, linger_ms=5)

    def send(self, count: int, seconds: float = 0.0) -> None:
        """Publish so many records, spread over so many seconds."""
        started_s = time.perf_counter()
        for number in range(count):
            self._produce(*self.traffic.one())
            if number % 50 == 0:
                self.producer.poll(0)
                ahead_s = number / count * seconds - (time.perf_counter() - started_s)
                time.sleep(max(0.0, ahead_s))
        if self.producer.flush(PATIENCE_S) or self.failed:
            raise CaseFailedError(f"records not acknowledged: {self.failed[:1]}")
        self.num_sent += count

    def _produce(self, key: bytes, value: bytes) -> None:
        while True:
            try:
                self.producer.produce(TOPICS.events, value, key, on_delivery=self._heard)
            except BufferError:
                self.producer.poll(0.1)
            else:
                return

    def _heard(self, error: object, _: object) -> None:
        if error is not None:
            self.failed.append(str(error))

    @contextmanager
    def flowing(self, count: int, seconds: float) -> Iterator[None]:
        """Publish beside the block; all of it is acknowledged after the block."""
        raised: list[BaseException] = []

        def run() -> None:
            try:
                self.send(count, seconds)
            except BaseException as error:  # noqa: BLE001 - raised again by the case's thread
                raised.append(error)

        thread = threading.Thread(target=run, name="publisher")
        thread.start()
        try:
            yield
        finally:
            thread.join()
        if raised:
            raise raised[0]


@dataclass
class Bench:
    """One installation to break, and everything a case needs for it."""

    stack: LocalStack
    kafka: KafkaConfig
    publisher: Publisher
    num_events: int
    source: random.Random
    has_apache: bool
    arguments: list[str] = field(default_factory=list)  # of every worker from now on
    workers: dict[str, WorkerProcess] = field(default_factory=dict)
    num_restarts: int = 0

    @property
    def folder(self) -> Path:
        """The folder of the installation, with nothing of the checkout's own in it."""
        return self.stack.running()[0].log.parent.parent

    def store(self, generation: int = 1) -> StateStore:
        """Return a generation over a connection of its own: a killed Redis spoils the others."""
        return StateStore(connect(self.stack.addresses.redis), generation, StateConfig())

    def pid(self, name: str) -> int:
        """Return the process id of a living process of the stack."""
        for one in self.stack.running():
            if one.name == name and one.alive:
                return one.pid
        raise CaseFailedError(f"{name} does not run: see its log in {self.folder / 'logs'}")

    def start(self, name: str) -> WorkerProcess:
        """Start a worker."""
        arguments = ["--lake", str(self.folder / "lake"), *self.arguments]
        self.workers[name] = WorkerProcess(self.stack, name=name, arguments=arguments)
        return self.workers[name]

    def leave(self, name: str) -> None:
        """Stop a worker as an operator would."""
        del self.workers[name]
        self.stack.stop(name)

    def kill(self, name: str) -> None:
        """End a process of the stack with SIGKILL."""
        os.kill(self.pid(name), signal.SIGKILL)
        self.stack.stop(name)

    def until(self, is_so: Callable[[], bool], *, what: str) -> None:
        """Return once it is so; meanwhile a worker that ended is started again, and counted."""
        deadline = time.monotonic() + PATIENCE_S
        while not is_so():
            if time.monotonic() > deadline:
                raise CaseFailedError(f"not within {PATIENCE_S:g} s: {what}")
            self._supervise()
            time.sleep(_POLL_S)

    def _supervise(self) -> None:
        alive = {one.name for one in self.stack.running() if one.alive}
        for name in [name for name in self.workers if name not in alive]:
            log = self.workers[name].running.log.read_text(encoding="utf-8", errors="replace")
            CONSOLE.print(f"{name} ended, starting it again: {log[-400:]}", markup=False)
            self.num_restarts += 1
            self.start(name)

    def reads(self, worker: WorkerProcess) -> None:
        """Return once a worker has found where to read a partition from."""
        log = worker.running.log
        self.until(lambda: "reading" in log.read_text("utf-8", "replace"), what="worker reads")

    def caught_up(self, generation: int = 1) -> None:
        """Return once every bucket's checkpoint is at the end of the log."""
        ends = end_offsets(self.kafka, TOPICS.events)
        store = self.store(generation)

        def is_so() -> bool:
            at = store.read_checkpoints(0, list(ends))
            return all(min(at[partition]) >= end for partition, end in ends.items())

        self.until(is_so, what=f"g{generation} at the end of the log")

    def at_least(self, ends: dict[int, int]) -> bool:
        """Return whether the workers have committed so much."""
        done = committed(self.kafka, group_of(TOPICS, 1), TOPICS.events)
        return all(done.get(partition, 0) >= end for partition, end in ends.items())
