"""The faults of `make faults`: each breaks a running installation while events come in.

A case publishes all of its events and returns, in a sentence, what it did; whether the state is
right afterwards is judged in benchmarks/faults.py, the same way for all of them.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.common import TOPICS
from benchmarks.fault_bench import PATIENCE_S
from compose.local import redis as local_redis
from features.redis import execute
from streams.errors import StreamError
from streams.kafka import end_offsets

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from benchmarks.fault_bench import Bench

NUM_KILLS: Final = 20
# A little more than a worker's session time-out.
SILENCE_S: Final = 11.0


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
