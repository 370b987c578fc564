"""The faults of `make faults`: each breaks a running installation while events come in.

A case publishes all of its events and returns, in a sentence, what it did; whether the state is
right afterwards is judged in benchmarks/faults.py, the same way for all of them.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import sys
import threading
import time
from collections import Counter, deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.common import CONSOLE, TOPICS, WorkerProcess, zipf_users
from compose.local import redis as local_redis
from features.config import StateConfig
from features.events import Event, encode_event
from features.redis import StateStore, connect, execute
from streams.errors import StreamError
from streams.kafka import committed, end_offsets, make_producer
from streams.worker import group_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from compose.local.stack import LocalStack
    from streams.kafka import KafkaConfig

NUM_USERS: Final = 5_000
NUM_KILLS: Final = 20
# Past these shares of [0, 1) a draw makes an ordinary event.
MALFORMED: Final = 0.01
REPEATED: Final = 0.04
LATE: Final = 0.07
_START_MS: Final = 1_763_700_000_000
_LATE_MS: Final = 3 * 3_600_000
# A takeover needs the session time-out of ten seconds, a restarted JVM likewise; two cores are few.
PATIENCE_S: Final = 180.0
# A little more than a worker's session time-out.
SILENCE_S: Final = 11.0
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


def worker_kills(bench: Bench) -> str:
    """Kill the worker: in its start-up, in the middle of a burst, between two."""
    portion = bench.num_events // (NUM_KILLS + 1)
    num_behind = 0
    for number in range(NUM_KILLS):
        worker = bench.start("worker")
        is_early = number % 4 == 0
        if not is_early:
            bench.reads(worker)
        with bench.publisher.flowing(portion, 0.4):
            time.sleep(bench.source.uniform(0.0, 2.5 if is_early else 0.5))
            bench.kill("worker")
            num_behind += _applied(bench) < sum(end_offsets(bench.kafka, TOPICS.events).values())
    bench.start("worker")
    bench.publisher.send(bench.num_events - portion * NUM_KILLS)
    bench.caught_up()
    return f"{NUM_KILLS} SIGKILLs, {num_behind} of them with records still to be applied"


def rebalances(bench: Bench) -> str:
    """Let two workers come and go, one always there, while events flow."""
    rounds, num_moves = 4, 0
    # Without a static member id a worker's partitions go as soon as it leaves.
    bench.arguments = ["--instance", ""]
    bench.reads(bench.start("worker-a"))
    with bench.publisher.flowing(bench.num_events, rounds * 6.0):
        for number in range(rounds):
            goes, comes = ("worker-a", "worker-b") if number % 2 == 0 else ("worker-b", "worker-a")
            time.sleep(bench.source.uniform(0.5, 1.5))
            bench.reads(bench.start(comes))
            time.sleep(bench.source.uniform(0.5, 2.0))
            bench.leave(goes)
            num_moves += 2
    bench.caught_up()
    return f"{num_moves} rebalances by joining and leaving"


def zombies(bench: Bench) -> str:
    """Stop a worker past its session time-out, let another take over, and wake it.

    The embedded broker never gives a silent member's partitions to another member; there the
    second worker takes the first one's static member id, as a replaced pod does.
    """
    portion = bench.num_events // 3
    bench.arguments = [] if bench.has_apache else ["--instance", "worker"]
    bench.reads(bench.start("worker-a"))
    num_ended = 0
    for sleeper, other in (("worker-a", "worker-b"), ("worker-b", "worker-a")):
        with bench.publisher.flowing(portion, 20.0):
            time.sleep(bench.source.uniform(1.0, 3.0))
            pid = bench.pid(sleeper)
            os.kill(pid, signal.SIGSTOP)
            try:
                _take_over(bench, sleeper, other)
            finally:
                os.kill(pid, signal.SIGCONT)
        if not bench.has_apache:
            num_ended += not _is_alive(bench, sleeper)
            bench.stack.stop(sleeper)
    bench.publisher.send(bench.num_events - 2 * portion)
    bench.caught_up()
    refused = sum(w.metric("moveline_refused_writes_total") for w in bench.workers.values())
    fenced = "" if bench.has_apache else f", {num_ended} ended by fencing"
    return f"2 zombies woken after a takeover{fenced}, {refused:.0f} writes refused"


def _take_over(bench: Bench, sleeper: str, other: str) -> None:
    """Return once another worker has gone past where the stopped one can have been."""
    ends = end_offsets(bench.kafka, TOPICS.events)
    time.sleep(SILENCE_S)
    if not bench.has_apache:
        # Two of one id throw each other out: its supervisor would not start it again.
        del bench.workers[sleeper]
    if other not in bench.workers:
        bench.start(other)
    bench.until(partial(bench.at_least, ends), what=f"{other} takes over")


def stale_redis(bench: Bench) -> str:
    """Restore Redis from an old snapshot, once under load and once when nothing comes in."""
    part = bench.num_events // 4
    bench.start("worker")
    with bench.publisher.flowing(part, 4.0):
        time.sleep(bench.source.uniform(2.0, 3.0))
        snapshot = _snapshot(bench)
    bench.caught_up()
    with bench.publisher.flowing(2 * part, 6.0):
        time.sleep(bench.source.uniform(1.0, 4.0))
        lost = _restore(bench, "redis", snapshot)
    bench.publisher.send(bench.num_events - 3 * part)
    bench.caught_up()
    lost += _restore(bench, "redis-restored", snapshot)
    bench.caught_up()
    return f"restored twice, {lost:,} records behind what it had applied"


def _applied(bench: Bench, generation: int = 1) -> int:
    """Return up to where the log is in Redis, its partitions added up."""
    partitions = list(end_offsets(bench.kafka, TOPICS.events))
    checkpoints = bench.store(generation).read_checkpoints(0, partitions)
    return sum(max(0, *buckets) for buckets in checkpoints.values())


def _snapshot(bench: Bench) -> Path:
    client = bench.store().client
    before = execute(client, "LASTSAVE")
    bench.until(lambda: execute(client, "LASTSAVE") != before or _saves(bench), what="a snapshot")
    folder = _data_dir(bench)
    return Path(shutil.copy(folder / "dump.rdb", folder.parent / "stale.rdb"))


def _saves(bench: Bench) -> bool:
    """Save again and return whether that was done; its time alone has only whole seconds."""
    client = bench.store().client
    execute(client, "BGSAVE")
    bench.until(
        lambda: not execute(client, "INFO", "persistence")["rdb_bgsave_in_progress"], what="BGSAVE"
    )
    return True


def _data_dir(bench: Bench) -> Path:
    reply = execute(bench.store().client, "CONFIG GET", "dir")
    found = reply.get("dir", reply.get(b"dir"))
    return Path(found.decode() if isinstance(found, bytes) else found)


def _restore(bench: Bench, name: str, snapshot: Path) -> int:
    """Kill Redis, start it again on the snapshot; return how far that is behind."""
    folder, applied = _data_dir(bench), _applied(bench)
    bench.kill(name)
    shutil.rmtree(folder / "appendonlydir")
    shutil.copy(snapshot, folder / "dump.rdb")
    port = int(bench.stack.addresses.redis.rpartition(":")[2].partition("/")[0])
    server = local_redis.Redis(
        binary=local_redis.locate(), data_dir=folder, port=port, ready_timeout_s=PATIENCE_S
    )
    plan = server.plan({local_redis.PORT_OPTION: port})
    # With its append-only file on it would begin empty: only that file would be read.
    bench.stack.spawn("redis-restored", [*plan.argv, "--appendonly", "no"])
    bench.until(lambda: _answers(plan.answers), what="Redis answers")
    execute(bench.store().client, "CONFIG SET", "appendonly", "yes")
    return applied - _applied(bench)


def _answers(probe: Callable[[], bool]) -> bool:
    try:
        return probe()
    except OSError:
        return False


def broker_kills(bench: Bench) -> str:
    """Kill the broker under load and start it again on what is on its disk."""
    num_kills, name = 3, "kafka"
    bench.start("worker")
    raw = Path(f"/proc/{bench.pid(name)}/cmdline").read_bytes()
    argv = [part.decode() for part in raw.split(b"\0")[:-1]]
    portion = bench.num_events // num_kills
    for number in range(num_kills):
        is_last = number == num_kills - 1
        count = bench.num_events - portion * number if is_last else portion
        with bench.publisher.flowing(count, 6.0):
            time.sleep(bench.source.uniform(1.0, 4.0))
            bench.kill(name)
            name = "kafka-again"
            bench.stack.spawn(name, argv)
        bench.until(lambda: _broker_answers(bench), what="the broker answers")
    bench.caught_up()
    return f"{num_kills} SIGKILLs of the broker"


def _broker_answers(bench: Bench) -> bool:
    try:
        return bool(end_offsets(bench.kafka, TOPICS.events))
    except StreamError:
        return False


def replay_kills(bench: Bench) -> str:
    """Kill a replay into g2 while a worker keeps g1; the same command goes on each time."""
    num_kills = 6
    bench.start("worker")
    bench.publisher.send(bench.num_events)
    slow = ["--rate", str(max(1, bench.num_events // 8))]
    reached = [0]
    for number in range(num_kills):
        _replay(bench, slow)
        if number % 3:
            bench.until(partial(_has_gone_on, bench, reached[-1]), what="the replay writes")
        # In its start-up, or after it has begun to write.
        time.sleep(bench.source.uniform(0.0, 1.0))
        bench.kill("replay")
        reached.append(_applied(bench, 2))
    _replay(bench, [])
    bench.until(lambda: not _is_alive(bench, "replay"), what="the replay ends")
    bench.caught_up(2)
    bench.caught_up()
    return (
        f"{num_kills} SIGKILLs of a replay, at records {', '.join(f'{n:,}' for n in reached[1:])}"
    )


def _replay(bench: Bench, arguments: Sequence[str]) -> None:
    addresses = bench.stack.addresses
    command = [sys.executable, "-m", "compose.cli", "replay", "--into", "g2", "--from", "earliest"]
    command += ["--kafka", addresses.kafka, "--redis", addresses.redis]
    bench.stack.spawn("replay", [*command, "--lake", str(bench.folder / "lake"), *arguments])


def _has_gone_on(bench: Bench, before: int) -> bool:
    return not _is_alive(bench, "replay") or _applied(bench, 2) > before


def _is_alive(bench: Bench, name: str) -> bool:
    return any(one.alive for one in bench.stack.running() if one.name == name)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A fault, which generations it must leave right, and what it cannot do without."""

    run: Callable[[Bench], str]
    generations: tuple[int, ...] = (1,)
    needs_apache: bool = False


CASES: Final = {
    "worker-kills": Case(run=worker_kills),
    "rebalances": Case(run=rebalances),
    "zombies": Case(run=zombies),
    "stale-redis": Case(run=stale_redis),
    "broker-kills": Case(run=broker_kills, needs_apache=True),
    "replay-kills": Case(run=replay_kills, generations=(1, 2)),
}
