"""Goal: the two programs inside the images tell the truth.

`connected` is asked about real sockets of a real child process; `requirements` about this
project's own file.
"""

import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from compose.images import connected, requirements


def test_connection_is_seen_while_it_is_open_and_not_after() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        assert not connected.connected(port)
        with socket.create_connection(("127.0.0.1", port)) as client:
            accepted, _ = server.accept()
            assert connected.connected(port)
            # The server's end closes first; the client's socket then is no longer established.
            accepted.close()
            assert client.recv(1) == b""
        assert not connected.connected(port)


def test_connection_over_ipv6_is_seen() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as server:
        port: int = server.getsockname()[1]
        with socket.create_connection(("::1", port)):
            assert connected.connected(port)


def test_a_listening_socket_is_no_connection() -> None:
    table = [
        "  sl  local_address rem_address   st",
        "   0: 0100007F:4A94 00000000:0000 0A 00000000:00000000",
        "   1: 0100007F:9C40 0100007F:4A94 08 00000000:00000000",
    ]
    assert connected.established_ports(table) == set()


@pytest.mark.parametrize("arguments", [[], ["kafka"], ["19092", "9092"], ["70000"], ["-1"]])
def test_probe_refuses_what_is_no_port(
    arguments: list[str],
    child_environment: dict[str, str],
) -> None:
    probe = subprocess.run(
        [sys.executable, "-m", "compose.images.connected", *arguments],
        env=child_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert probe.returncode == 2
    assert "try: python -m compose.images.connected" in probe.stderr


def test_probe_says_no_by_its_exit_status(child_environment: dict[str, str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        command = [sys.executable, "-m", "compose.images.connected", port]
        alone = subprocess.run(command, env=child_environment, capture_output=True, check=False)
        with socket.create_connection(server.getsockname()):
            joined = subprocess.run(
                command,
                env=child_environment,
                capture_output=True,
                check=False,
            )
    assert (alone.returncode, joined.returncode) == (1, 0)


def test_all_requirements_are_those_of_the_project(repository: Path) -> None:
    pyproject = repository / "pyproject.toml"
    with pyproject.open("rb") as file:
        expected = tomllib.load(file)["project"]["dependencies"]
    assert requirements.pinned_requirements(pyproject, []) == expected


def test_named_requirements_keep_the_pin(repository: Path) -> None:
    chosen = requirements.pinned_requirements(repository / "pyproject.toml", ["Torch", "redis"])
    assert [requirements.distribution_name(it) for it in chosen] == ["redis", "torch"]
    assert all("==" in it for it in chosen)


def test_a_name_that_the_project_does_not_pin_is_refused(repository: Path) -> None:
    with pytest.raises(ValueError, match="leftpad not among the dependencies"):
        requirements.pinned_requirements(repository / "pyproject.toml", ["torch", "leftpad"])


@pytest.mark.parametrize(
    ("requirement", "name"),
    [
        ("numpy>=2.2,<3", "numpy"),
        ("feast[redis]==0.67.0", "feast"),
        ("Ruamel.Yaml ~= 0.18", "ruamel-yaml"),
        ("tomli; python_version < '3.11'", "tomli"),
    ],
)
def test_name_ends_where_the_version_begins(requirement: str, name: str) -> None:
    assert requirements.distribution_name(requirement) == name


def test_script_prints_requirements_with_the_standard_library_alone(repository: Path) -> None:
    script = repository / "compose" / "images" / "requirements.py"
    # -I -S: no site-packages and no project on the path, as in an image being built.
    command = [sys.executable, "-I", "-S", str(script), str(repository / "pyproject.toml")]
    printed = subprocess.run([*command, "torch"], capture_output=True, text=True, check=True)
    assert printed.stdout.startswith("torch==")
    refused = subprocess.run(
        [*command, "leftpad"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    assert "drop the name from the Dockerfile" in refused.stderr
