"""Goal: a stack is up or down: repeated `up` and `down` change nothing, every address answers.

Method: the real servers, asked in their own protocols by the clients that the project uses.
"""

from __future__ import annotations

import http.client
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import redis
from confluent_kafka import Message, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from compose.errors import (
    ProcessNameTakenError,
    StackAlreadyUpError,
    StackNotUpError,
    UnknownProcessError,
)
from compose.local.foreground import running_stack
from compose.local.stack import LocalStack, StackOptions
from compose.local.state import read_state
from compose.local.triton import SHARED_MEMORY
from tests.local_stack.marked import wait_until
from tests.servers import local_stack

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.servers

_CONFIG = """
name: "probe"
backend: "python"
max_batch_size: 0
input [ { name: "x" data_type: TYPE_INT64 dims: [ -1 ] } ]
output [ { name: "y" data_type: TYPE_INT64 dims: [ -1 ] } ]
"""
# It loads only if the model process finds this environment's packages and ours, and the extra
# environment.
_MODEL = """
import os
import numpy
import compose.local.stack

assert os.environ["MOVELINE_REDIS__URL"].startswith("redis://127.0.0.1:")


class TritonPythonModel:
    def execute(self, requests):
        return []
"""


@pytest.fixture
def options(tmp_path: Path) -> Iterator[StackOptions]:
    """Redis and the broker, detached; down again after the test."""
    options = StackOptions(run_dir=tmp_path, services=frozenset({"redis", "kafka"}))
    yield options
    LocalStack(tmp_path).down()


def test_every_server_answers(tmp_path: Path) -> None:
    environment = {"MOVELINE_REDIS__URL": "{redis}"}
    model = tmp_path / "models" / "probe"
    (model / "1").mkdir(parents=True)
    (model / "config.pbtxt").write_text(_CONFIG)
    (model / "1" / "model.py").write_text(_MODEL)
    with local_stack(
        run_dir=tmp_path, model_repository=tmp_path / "models", triton_environment=environment
    ) as stack:
        with redis.Redis.from_url(stack.addresses.redis) as client:
            assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "noeviction"}
        assert _produced(stack.addresses.kafka, "real") == 0
        assert _post(stack.addresses.triton_http, "/v2/repository/models/probe/load") == 200
        # By its own prefix: other test processes start and stop Tritons meanwhile.
        state = read_state(tmp_path)
        assert state is not None
        regions = set(SHARED_MEMORY.glob(f"{state.shm_prefix}*"))
        assert regions
        triton = next(process for process in stack.running() if process.name == "triton")
        # Killed like this it removes nothing itself; its model processes lose their parent.
        os.kill(triton.pid, signal.SIGKILL)
        wait_until(lambda: not _alive(stack, "triton"), "triton is dead")
    assert not [region for region in regions if region.exists()]


def test_apache_kafka_is_started_from_its_jars_and_keeps_its_topics(tmp_path: Path) -> None:
    home = os.environ.get("KAFKA_HOME")
    if not home:
        pytest.skip("KAFKA_HOME is not set: the launcher for Apache Kafka is not tested")
    options = StackOptions(run_dir=tmp_path, services=frozenset({"kafka"}), kafka_home=Path(home))
    with running_stack(options) as stack:
        assert _produced(stack.addresses.kafka, "real") == 0
        admin = AdminClient({"bootstrap.servers": stack.addresses.kafka})
        assert admin.list_topics("never-created", timeout=10).topics["never-created"].error
    # Other ports, the same data.
    with running_stack(options) as stack:
        admin = AdminClient({"bootstrap.servers": stack.addresses.kafka})
        assert "real" in admin.list_topics(timeout=10).topics


def test_up_twice_is_the_same_stack_and_down_twice_is_down(options: StackOptions) -> None:
    first = LocalStack().up(options)
    pids = [process.pid for process in LocalStack.attach(options.run_dir).running()]

    assert LocalStack().up(options) == first
    assert [process.pid for process in LocalStack.attach(options.run_dir).running()] == pids

    LocalStack.attach(options.run_dir).down()
    LocalStack(options.run_dir).down()
    assert LocalStack(options.run_dir).running() == []
    with pytest.raises(StackNotUpError, match="moveline up"):
        LocalStack.attach(options.run_dir)


def test_another_stack_in_the_same_folder_is_refused(options: StackOptions) -> None:
    addresses = LocalStack().up(options)
    used = int(addresses.redis.removesuffix("/0").rpartition(":")[2])
    with pytest.raises(StackAlreadyUpError, match="its redis is at"):
        LocalStack().up(replace(options, redis_port=used + 1))
    with pytest.raises(StackAlreadyUpError, match="services"):
        LocalStack().up(replace(options, services=frozenset({"redis"})))
    with (
        pytest.raises(StackAlreadyUpError, match="stop it at its end"),
        running_stack(options),
    ):
        pytest.fail("the block of a refused stack must not run")
    # The refusals left it as it was.
    assert LocalStack().up(replace(options, redis_port=used)) == addresses


def test_a_foreground_stack_is_nobody_elses(options: StackOptions) -> None:
    with running_stack(options) as stack:
        with pytest.raises(StackAlreadyUpError, match="belongs to the command with pid"):
            LocalStack().up(options)
        assert all(process.alive for process in stack.running())


def test_a_stack_with_a_dead_server_is_started_anew_with_its_data(options: StackOptions) -> None:
    first = LocalStack().up(options)
    with redis.Redis.from_url(first.redis) as client:
        client.set("kept", "yes")
    stack = LocalStack.attach(options.run_dir)
    broker = next(process for process in stack.running() if process.name == "kafka")
    os.kill(broker.pid, signal.SIGKILL)
    wait_until(lambda: not _alive(stack, "kafka"), "the broker is dead")

    second = LocalStack().up(options)

    assert all(process.alive for process in stack.running())
    with redis.Redis.from_url(second.redis) as client:
        assert client.get("kept") == b"yes"
    stack.down()
    with redis.Redis.from_url(LocalStack().up(replace(options, persist=False)).redis) as client:
        assert client.get("kept") is None


def test_a_block_that_asks_for_it_leaves_the_stack_up(options: StackOptions) -> None:
    with running_stack(options, tied=False, keep=lambda: True) as stack:
        addresses = stack.addresses
    assert all(process.alive for process in LocalStack.attach(options.run_dir).running())
    assert LocalStack().up(options) == addresses

    LocalStack(options.run_dir).down()
    with (
        pytest.raises(ZeroDivisionError),
        running_stack(options, tied=False, keep=lambda: True),
    ):
        _ = 1 // 0
    assert LocalStack(options.run_dir).running() == []


def test_spawned_processes_are_stopped_before_the_servers(options: StackOptions) -> None:
    # The worker writes what it finds when it is told to end: Redis must still be there.
    script = """
import os, signal, socket, sys, time
def stop(*_):
    socket.create_connection(("127.0.0.1", int(os.environ["PORT"])), 5).close()
    print("redis was still there", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, stop)
print("ready", flush=True)
while True:
    time.sleep(0.2)  # a signal right before a wait is only seen after it
"""
    addresses = LocalStack().up(options)
    port = addresses.redis.removesuffix("/0").rpartition(":")[2]
    stack = LocalStack.attach(options.run_dir)
    worker = stack.spawn("worker", [sys.executable, "-c", script], env={"PORT": port})
    wait_until(lambda: "ready" in worker.log.read_text(), "the worker waits")
    with pytest.raises(ProcessNameTakenError, match=str(worker.pid)):
        stack.spawn("worker", ["true"])

    stack.down()

    assert worker.log.read_text().splitlines() == ["ready", "redis was still there"]


def test_one_process_is_stopped_by_name(options: StackOptions) -> None:
    LocalStack().up(options)
    stack = LocalStack.attach(options.run_dir)
    stack.spawn("worker", [sys.executable, "-c", "import signal; signal.pause()"])
    stack.stop("worker")
    assert [process.name for process in stack.running()] == ["redis", "kafka"]
    with pytest.raises(UnknownProcessError, match="redis, kafka"):
        stack.stop("worker")
    assert stack.spawn("worker", [sys.executable, "-c", "import signal; signal.pause()"]).alive


def test_a_command_that_is_not_there_is_named_in_the_log(options: StackOptions) -> None:
    LocalStack().up(options)
    stack = LocalStack.attach(options.run_dir)
    ghost = stack.spawn("ghost", ["no-such-program"])
    wait_until(lambda: not _alive(stack, "ghost"), "the launcher has ended")
    assert ghost.log.read_text() == "cannot run no-such-program: No such file or directory\n"


def _alive(stack: LocalStack, name: str) -> bool:
    return any(process.alive for process in stack.running() if process.name == name)


def _produced(bootstrap: str, topic: str) -> int:
    """Create a topic, send one record, return its offset."""
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for created in admin.create_topics([NewTopic(topic, 4, 1)]).values():
        created.result(timeout=60)
    delivered: list[Message] = []
    producer = Producer({"bootstrap.servers": bootstrap})
    producer.produce(topic, b"x", on_delivery=lambda _error, sent: delivered.append(sent))
    assert producer.flush(60) == 0
    offset = delivered[0].offset()
    assert offset is not None
    return offset


def _post(address: str, path: str) -> int:
    connection = http.client.HTTPConnection(address, timeout=60)
    try:
        connection.request("POST", path)
        return connection.getresponse().status
    finally:
        connection.close()
