"""Real servers for tests: plain context managers, from which a conftest makes its fixtures.

    @pytest.fixture(scope="session")
    def stack(tmp_path_factory):
        with local_stack({"redis", "kafka"}, run_dir=tmp_path_factory.mktemp("stack")) as stack:
            yield stack

They are tied to the test process: whatever ends it, no server outlives it.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import redis

from compose.local.foreground import running_stack
from compose.local.ports import LOOPBACK, free_ports
from compose.local.redis import locate
from compose.local.stack import SERVICES, LocalStack, StackOptions
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

NUM_SLOTS: Final = 16_384
SENTINEL_MASTER: Final = "moveline"


@contextmanager
def local_stack(
    services: Iterable[str] = SERVICES,
    *,
    run_dir: Path,
    model_repository: Path | None = None,
    kafka_home: Path | None = None,
    triton_environment: Mapping[str, str] | None = None,
) -> Iterator[LocalStack]:
    """Some of the servers, on free ports, with empty data folders under `run_dir`.

    Args:
        services: any of "redis", "kafka" and "triton".
        run_dir: a folder of the test's own.
        model_repository: for Triton; an empty one is made where none is given.
        kafka_home: starts that Apache Kafka instead of the embedded broker.
        triton_environment: "{redis}" and "{kafka}" in its values become the addresses.
    """
    repository = model_repository or run_dir / "model_repo"
    repository.mkdir(parents=True, exist_ok=True)
    options = StackOptions(
        run_dir=run_dir,
        model_repository=repository,
        services=frozenset(services),
        kafka_home=kafka_home,
        triton_environment=dict(triton_environment or {}),
        persist=False,
    )
    with running_stack(options) as stack:
        yield stack


@contextmanager
def redis_cluster(run_dir: Path, *, num_nodes: int = 3) -> Iterator[RedisCluster]:
    """A Redis Cluster of primaries that share the slots evenly; no replicas."""
    with running_stack(_spare(run_dir)) as stack:
        ports = free_ports(2 * num_nodes)  # as late as can be: others look for free ones, too
        nodes = [
            _redis(
                stack,
                run_dir,
                f"node-{i}",
                {"cluster-enabled": "yes", "cluster-port": str(ports[num_nodes + i])},
                port=ports[i],
            )
            for i in range(num_nodes)
        ]
        bounds = [NUM_SLOTS * i // num_nodes for i in range(num_nodes + 1)]
        for i, node in enumerate(nodes):
            node.execute_command("CLUSTER ADDSLOTSRANGE", bounds[i], bounds[i + 1] - 1)
            node.execute_command("CLUSTER SET-CONFIG-EPOCH", i + 1)
            node.execute_command("CLUSTER MEET", LOOPBACK, ports[0], ports[num_nodes])
        cluster = RedisCluster(nodes, ports[:num_nodes])
        until(cluster.is_ready, what="a cluster that all of its nodes agree on")
        yield cluster
        for node in nodes:
            node.close()


@dataclass(frozen=True)
class RedisCluster:
    """Nodes by their own connections, for what only an operator does."""

    nodes: list[redis.Redis]
    ports: list[int]

    @property
    def url(self) -> str:
        """What the code under test gets: two of the nodes."""
        return f"redis+cluster://{LOOPBACK}:{self.ports[0]},{LOOPBACK}:{self.ports[1]}"

    def is_ready(self) -> bool:
        """Return whether every node serves and knows every slot's owner."""
        return all(
            node.execute_command("CLUSTER INFO").get("cluster_state") == "ok"
            and int(node.execute_command("CLUSTER INFO")["cluster_known_nodes"]) == len(self.nodes)
            for node in self.nodes
        )

    def node_id(self, index: int) -> str:
        """Return a node's name within the cluster."""
        raw: bytes = self.nodes[index].execute_command("CLUSTER MYID")
        return raw.decode()

    def owner_of(self, slot: int) -> int:
        """Return which node serves the slot, as the first one sees it."""
        for first, last, (_, port, *_), *_ in self._slots():
            if first <= slot <= last:
                return self.ports.index(port)
        raise AssertionError(f"nobody serves slot {slot}")

    def _slots(self) -> list[list[Any]]:
        # The library's own parser of this reply wants another shape.
        connection = self.nodes[0].connection_pool.get_connection()
        try:
            connection.send_command("CLUSTER", "SLOTS")
            reply: list[list[Any]] = connection.read_response()
            return reply
        finally:
            self.nodes[0].connection_pool.release(connection)

    def begin_move(self, slot: int, *, to: int) -> int:
        """Announce that a slot moves, which is when nodes begin to ask for patience."""
        source = self.owner_of(slot)
        setslot = "CLUSTER SETSLOT"
        self.nodes[to].execute_command(setslot, slot, "IMPORTING", self.node_id(source))
        self.nodes[source].execute_command(setslot, slot, "MIGRATING", self.node_id(to))
        return source

    def move_keys(self, slot: int, *, source: int, to: int, at_most: int | None = None) -> int:
        """Take a slot's keys to their new node; return how many."""
        moved = 0
        while at_most is None or moved < at_most:
            names = self.nodes[source].execute_command("CLUSTER GETKEYSINSLOT", slot, 1)
            if not names:
                break
            self.nodes[source].migrate(LOOPBACK, self.ports[to], names, 0, 5_000)
            moved += len(names)
        return moved

    def end_move(self, slot: int, *, to: int) -> None:
        """Make the new node the owner, for everybody."""
        for index in (to, *(i for i in range(len(self.nodes)) if i != to)):
            self.nodes[index].execute_command("CLUSTER SETSLOT", slot, "NODE", self.node_id(to))

    def move(self, slot: int, *, to: int) -> None:
        """Take a slot to another node, key by key, as an operator's tool does."""
        source = self.begin_move(slot, to=to)
        self.move_keys(slot, source=source, to=to)
        self.end_move(slot, to=to)


@contextmanager
def redis_sentinel(run_dir: Path) -> Iterator[RedisSentinel]:
    """A primary, a replica and one sentinel that may decide alone."""
    with running_stack(_spare(run_dir)) as stack:
        sentinel_port, *ports = free_ports(3)
        first = _redis(stack, run_dir, "redis-0", {}, port=ports[0])
        second = _redis(
            stack, run_dir, "redis-1", {"replicaof": f"{LOOPBACK} {ports[0]}"}, port=ports[1]
        )
        until(lambda: _is_linked(second), what="a replica that follows")
        settings = run_dir / "sentinel.conf"  # it writes into its file what it finds out
        settings.write_text(
            f"port {sentinel_port}\nbind {LOOPBACK}\ndir {run_dir}\n"
            f"sentinel monitor {SENTINEL_MASTER} {LOOPBACK} {ports[0]} 1\n"
            f"sentinel down-after-milliseconds {SENTINEL_MASTER} 30000\n"
            f"sentinel failover-timeout {SENTINEL_MASTER} 5000\n",
            encoding="utf-8",
        )
        stack.spawn("sentinel", [str(locate()), str(settings), "--sentinel"])
        with redis.Redis(port=sentinel_port, decode_responses=True) as sentinel:
            until(lambda: _answers(sentinel), what="the sentinel")
            until(
                lambda: sentinel.sentinel_slaves(SENTINEL_MASTER), what="a sentinel with a replica"
            )
            yield RedisSentinel(stack, [first, second], sentinel_port, sentinel)
        first.close()
        second.close()


@dataclass(frozen=True)
class RedisSentinel:
    """Two servers, the first of which is the primary until it is killed."""

    stack: LocalStack
    servers: list[redis.Redis]
    port: int
    sentinel: redis.Redis

    @property
    def url(self) -> str:
        """What the code under test gets."""
        return f"redis+sentinel://{LOOPBACK}:{self.port}/{SENTINEL_MASTER}/0"

    def kill_primary(self) -> None:
        """End the first server; the sentinel will make the other one the primary."""
        self.stack.stop("redis-0")
        # Only now: a primary on a machine that stands still is not to be given up before.
        self.sentinel.sentinel_set(SENTINEL_MASTER, "down-after-milliseconds", 500)


def _spare(run_dir: Path) -> StackOptions:
    """Return options of a stack, which has to start one server itself: it stays unused."""
    run_dir.mkdir(parents=True, exist_ok=True)
    repository = run_dir / "model_repo"
    repository.mkdir(exist_ok=True)
    return StackOptions(
        run_dir=run_dir, model_repository=repository, services=frozenset({"redis"}), persist=False
    )


def _redis(
    stack: LocalStack, run_dir: Path, name: str, settings: Mapping[str, str], *, port: int
) -> redis.Redis:
    """Start a server with empty data; return a connection to it once it answers."""
    folder = run_dir / name
    folder.mkdir(parents=True)
    everything = {
        "port": str(port),
        "bind": LOOPBACK,
        "dir": str(folder),
        "save": "",
        "maxmemory-policy": "noeviction",
        **settings,
    }
    options = [part for key, value in everything.items() for part in (f"--{key}", value)]
    stack.spawn(name, [str(locate()), *options])
    client = redis.Redis(port=port)
    until(lambda: _answers(client), what=name)
    return client


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:
        return False


def _is_linked(replica: redis.Redis) -> bool:
    return bool(replica.info("replication").get("master_link_status") == "up")
