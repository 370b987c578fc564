"""tritonserver from the nvidia-pytriton wheel, with Python models that see this environment.

Nothing of the wheel's own Python is used: it pins NumPy below 2, and is unpacked beside the
environment for that.
"""

from __future__ import annotations

import http.client
import shutil
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import compose
from compose.errors import InvalidStackOptionsError, UnsupportedPlatformError, WheelMissingError
from compose.local.host import libpython_folder, python_version, require_triton_host
from compose.local.ports import LOOPBACK
from compose.local.server import PROBE_TIMEOUT_S, Plan, inherited_environment

if TYPE_CHECKING:
    from collections.abc import Mapping

WHEEL = "nvidia-pytriton==0.7.0"
INSTALL_COMMAND = "python -m compose.local.install"
GRPC_OPTION = "--triton-grpc-port"
HTTP_OPTION = "--triton-http-port"
METRICS_OPTION = "--triton-metrics-port"
SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - where the kernel mounts POSIX shared memory
_EXIT_TIMEOUT_S = 5  # for requests in flight; every call of ours has a shorter deadline
_STOP_TIMEOUT_S = 30.0  # each Python model process is asked to end, and given some seconds
_HTTP_OK = 200


def default_home() -> Path:
    """Return where `compose.local.install` unpacks the wheel: beside the virtual environment."""
    in_environment = sys.prefix != sys.base_prefix
    return (Path(sys.prefix).parent if in_environment else Path.cwd()) / ".local-stack" / "triton"


def locate(home: Path) -> Path:
    """Return the folder of the wheel's server, after every requirement has been checked.

    Raises:
        UnsupportedPlatformError: this machine or this Python cannot run it.
        WheelMissingError: the wheel is not unpacked there.
    """
    require_triton_host()
    libpython_folder()
    server = home / "pytriton" / "tritonserver"
    if not (server / "bin" / "tritonserver").is_file():
        command = INSTALL_COMMAND if home == default_home() else f"{INSTALL_COMMAND} --home {home}"
        raise WheelMissingError(WHEEL, looked_in=f"nothing at {home}", next_command=command)
    if not _stub(server).is_file():
        raise UnsupportedPlatformError(
            f"{WHEEL} has no model process for Python {python_version()}",
            next_step="Make the environment with Python 3.11, then: make setup",
        )
    return server


def require_repository(repository: Path) -> None:
    """Return only if the model repository is a folder.

    Raises:
        InvalidStackOptionsError: it is not.
    """
    if not repository.is_dir():
        raise InvalidStackOptionsError(
            f"The model repository {repository} is not a folder",
            next_step="Create it, or pass another with --model-repository",
        )


def remove_shared_memory(prefix: str) -> None:
    """No region of the stack with this prefix is left; call it once its Triton is dead."""
    for region in SHARED_MEMORY.glob(f"{prefix}*"):
        region.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class Triton:
    """One tritonserver that starts with no model; models are loaded over its repository API."""

    home: Path
    work_dir: Path
    repository: Path
    extra_environment: Mapping[str, str]
    shm_prefix: str
    ports: Mapping[str, int | None]
    ready_timeout_s: float

    @property
    def name(self) -> str:
        """One word, also the name of its log."""
        return "triton"

    @property
    def wanted_ports(self) -> Mapping[str, int | None]:
        """Option -> the port asked for, or None for a free one."""
        return self.ports

    def plan(self, ports: Mapping[str, int]) -> Plan:
        """Lay out the back ends and the models' environment, and return what to run."""
        server = locate(self.home)
        backends = _link_backends(server, self.work_dir / "backends")
        models_bin = _link_environment(self.work_dir / "python")
        grpc, http, metrics = ports[GRPC_OPTION], ports[HTTP_OPTION], ports[METRICS_OPTION]
        options = {
            "model-repository": str(self.repository),
            "backend-directory": str(backends),
            "backend-config": f"python,shm-region-prefix-name={self.shm_prefix}",
            "model-control-mode": "explicit",
            "exit-timeout-secs": str(_EXIT_TIMEOUT_S),
            "grpc-address": LOOPBACK,
            "grpc-port": str(grpc),
            "http-address": LOOPBACK,
            "http-port": str(http),
            "metrics-address": LOOPBACK,
            "metrics-port": str(metrics),
            "allow-gpu-metrics": "false",  # they need DCGM, which the wheel does not bring
        }
        return Plan(
            argv=(
                str(server / "bin" / "tritonserver"),
                *(f"--{key}={value}" for key, value in options.items()),
                # Each load would start a process more, with torch in it, to be told what
                # config.pbtxt says already.
                "--disable-auto-complete-config",
            ),
            environment=self._environment(models_bin),
            ports=(grpc, http, metrics),
            answers=lambda: _answers(http),
            ready_timeout_s=self.ready_timeout_s,
            stop_timeout_s=_STOP_TIMEOUT_S,
        )

    def _environment(self, models_bin: Path) -> dict[str, str]:
        environment = inherited_environment()
        libraries = [str(self.home / "nvidia_pytriton.libs"), str(libpython_folder())]
        programs = [str(models_bin), str(Path(sys.executable).parent)]
        environment["LD_LIBRARY_PATH"] = _prepend(libraries, environment.get("LD_LIBRARY_PATH"))
        environment["PATH"] = _prepend(programs, environment.get("PATH"))
        return environment | dict(self.extra_environment)


def _prepend(folders: list[str], path: str | None) -> str:
    return ":".join([*folders, path] if path else folders)


def _stub(server: Path) -> Path:
    return server / "python_backend_stubs" / python_version() / "triton_python_backend_stub"


def _link_backends(server: Path, folder: Path) -> Path:
    """Return a back-end directory whose Python back end runs this interpreter's version.

    The wheel keeps its model processes apart, one per version of Python; links leave it as pip made
    it.
    """
    python = folder / "python"
    shutil.rmtree(folder, ignore_errors=True)
    python.mkdir(parents=True)
    for part in (server / "backends" / "python").iterdir():
        if part.name != "__pycache__":
            (python / part.name).symlink_to(part)
    stub = python / "triton_python_backend_stub"
    stub.unlink(missing_ok=True)
    stub.symlink_to(_stub(server))
    return folder


def _link_environment(folder: Path) -> Path:
    """Return the bin folder of an environment with all of this one's packages and our own.

    The model processes run an isolated Python: it ignores PYTHONPATH and PYTHONHOME, and finds its
    packages only through the first `python3` on PATH. Ours need not be installed (a checkout is
    enough), so they get an environment made for them.
    """
    shutil.rmtree(folder, ignore_errors=True)
    packages = folder / "lib" / f"python{python_version()}" / "site-packages"
    packages.mkdir(parents=True)
    (folder / "bin").mkdir()
    (folder / "bin" / "python3").symlink_to(sys.executable)
    real_bin = Path(sys.executable).resolve().parent
    (folder / "pyvenv.cfg").write_text(f"home = {real_bin}\ninclude-system-site-packages = false\n")
    ours = Path(compose.__file__).resolve().parent.parent
    theirs = dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib"))
    # addsitedir, not bare lines: the .pth files found there count too.
    lines = [f"import site; site.addsitedir({path!r})" for path in theirs]
    (packages / "moveline.pth").write_text("\n".join([str(ours), *lines]) + "\n")
    return folder / "bin"


def _answers(http_port: int) -> bool:
    """Whether the server says that it is ready, by the protocol's own question."""
    connection = http.client.HTTPConnection(LOOPBACK, http_port, timeout=PROBE_TIMEOUT_S)
    try:
        connection.request("GET", "/v2/health/ready")
        return connection.getresponse().status == _HTTP_OK
    except http.client.HTTPException:  # cut off in the middle of its start
        return False
    finally:
        connection.close()
