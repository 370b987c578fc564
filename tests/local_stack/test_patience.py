"""Goal: the embedded broker is asked in peace, and it and the door before it are as one process."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient, NewTopic

from tests.servers import local_stack
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator

    from compose.local.stack import LocalStack

pytestmark = pytest.mark.servers
TOPIC = "patience"
# Of one processor. Without the door an idle consumer takes more than a half, the broker another.
IDLE_SHARE_MAX = 0.3
WATCHED_S = 3.0


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    with local_stack({"kafka"}, run_dir=tmp_path_factory.mktemp("patience")) as stack:
        admin = AdminClient({"bootstrap.servers": stack.addresses.kafka})
        admin.create_topics([NewTopic(TOPIC, 2, 1)])[TOPIC].result()
        yield stack


def processes_of(stack: LocalStack) -> list[int]:
    """The broker's session: the door, and the broker behind it."""
    (leader,) = (one.pid for one in stack.running() if one.name == "kafka" and one.alive)
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:  # it has ended
            continue
        if int(fields[3]) == leader and fields[0] not in "ZX":
            found.append(int(stat.parent.name))
    return found


def threads() -> set[Path]:
    """The threads of this process."""
    return set(Path("/proc/self/task").iterdir())


def seconds_of(runners: list[Path]) -> float:
    """Processor seconds that processes or threads have had."""
    ticks = 0
    for runner in runners:
        fields = (runner / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def consumer_of(stack: LocalStack, group: str) -> Consumer:
    consumer = Consumer(
        {
            "bootstrap.servers": stack.addresses.kafka,
            "group.id": group,
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe([TOPIC])
    return consumer


def assign(consumer: Consumer) -> None:
    def is_assigned() -> bool:
        consumer.poll(0.1)
        return bool(consumer.assignment())

    until(is_assigned)


def test_clients_are_told_the_address_of_the_door(broker: LocalStack) -> None:
    admin = AdminClient({"bootstrap.servers": broker.addresses.kafka})
    named = {f"{one.host}:{one.port}" for one in admin.list_topics(timeout=10).brokers.values()}
    described = admin.describe_cluster().result().nodes
    assert named == {f"{one.host}:{one.port}" for one in described} == {broker.addresses.kafka}
    assert len(processes_of(broker)) > 1


def test_an_idle_consumer_costs_next_to_nothing(broker: LocalStack) -> None:
    others = threads()  # earlier tests may have left busy ones
    consumer = consumer_of(broker, "idle")
    assign(consumer)
    mine = [*threads() - others, Path(f"/proc/self/task/{threading.get_native_id()}")]
    runners = [*mine, *(Path(f"/proc/{pid}") for pid in processes_of(broker))]
    before, since_s = seconds_of(runners), time.monotonic()
    while (watched_s := time.monotonic() - since_s) < WATCHED_S:
        assert consumer.poll(0.5) is None
    assert seconds_of(runners) - before < IDLE_SHARE_MAX * watched_s
    consumer.close()


def test_what_is_sent_comes_whole_and_in_order(broker: LocalStack) -> None:
    """Small and large answers: single records first, then more than a fetch holds."""
    consumer = consumer_of(broker, "whole")
    producer = Producer({"bootstrap.servers": broker.addresses.kafka, "linger.ms": 0})
    sent = [b"%d" % number for number in range(20)] + [
        b"%d-" % number + 1_000 * b"x" for number in range(4_000)
    ]
    for number, value in enumerate(sent):
        producer.produce(TOPIC, value, partition=0)
        if number < 20:
            producer.flush()
    producer.flush()
    came: list[bytes | None] = []

    def all_came() -> bool:
        came.extend(one.value() for one in consumer.consume(1_000, 0.5))
        return len(came) >= len(sent)

    until(all_came)
    assert came == sent
    consumer.close()


def test_a_killed_door_takes_the_broker_with_it(tmp_path: Path) -> None:
    with local_stack({"kafka"}, run_dir=tmp_path) as stack:
        pids = processes_of(stack)
        os.kill(next(one.pid for one in stack.running()), signal.SIGKILL)
        until(lambda: not any(_runs(pid) for pid in pids))


def _runs(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"
