"""What the machine must be for the servers of the wheels to run on it."""

from __future__ import annotations

import platform
import sys
import sysconfig
from pathlib import Path

from compose.errors import UnsupportedPlatformError

TRITON_GLIBC = (2, 35)  # the wheel is tagged manylinux_2_35
_EXTERNAL = "Use servers of your own instead, by address (docs/bring_your_own.md)."


def require_linux() -> None:
    """Return only on Linux: the supervision reads /proc and signals through pidfds.

    Raises:
        UnsupportedPlatformError: anything else.
    """
    if sys.platform != "linux":
        raise UnsupportedPlatformError(
            f"it needs Linux, this is {sys.platform}", next_step=_EXTERNAL
        )


def require_triton_host() -> None:
    """Return only where the wheel's tritonserver can run.

    Raises:
        UnsupportedPlatformError: another processor, another C library, or too old a one.
    """
    require_linux()
    machine = platform.machine()
    if machine not in {"x86_64", "AMD64"}:
        raise UnsupportedPlatformError(
            f"tritonserver's wheel is for x86-64, this is {machine}", next_step=_EXTERNAL
        )
    library, version = platform.libc_ver()
    if library != "glibc" or _numbers(version) < TRITON_GLIBC:
        wanted = ".".join(map(str, TRITON_GLIBC))
        found = f"{library} {version}".strip() or "another C library"
        raise UnsupportedPlatformError(
            f"tritonserver needs glibc {wanted} or newer, this is {found}", next_step=_EXTERNAL
        )


def python_version() -> str:
    """Return this interpreter's "major.minor", by which Triton names its model processes."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def libpython_folder() -> Path:
    """Return the folder of the shared libpython of this interpreter's version.

    Triton's model processes embed Python, and load it from there.

    Raises:
        UnsupportedPlatformError: this Python was built without one.
    """
    name = f"libpython{python_version()}.so.1.0"
    multiarch = sysconfig.get_config_var("MULTIARCH") or "x86_64-linux-gnu"
    candidates = [
        sysconfig.get_config_var("LIBDIR") or "",
        f"{sys.base_prefix}/lib",
        f"/usr/lib/{multiarch}",
        "/usr/lib64",
    ]
    for folder in candidates:
        if folder and Path(folder, name).exists():
            return Path(folder)
    raise UnsupportedPlatformError(
        f"Triton's model processes need {name}, and this Python ({sys.base_prefix}) has none",
        next_step=f"Install one (Debian: apt-get install libpython{python_version()}; "
        "pyenv: PYTHON_CONFIGURE_OPTS=--enable-shared pyenv install), then: make setup",
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdecimal())
