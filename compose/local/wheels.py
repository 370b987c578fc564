"""Executables that wheels carry, found without importing the wheel's own code."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

from compose.errors import WheelMissingError

LOCAL_EXTRA = 'python -m pip install "moveline[local]"'


def package_folder(package: str, *, wheel: str, next_command: str = LOCAL_EXTRA) -> Path:
    """Return the folder of an installed package.

    Raises:
        WheelMissingError: it is not installed.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise WheelMissingError(wheel, looked_in=f"no module {package}", next_command=next_command)
    return Path(spec.submodule_search_locations[0])


def executable(path: Path, *, wheel: str, next_command: str = LOCAL_EXTRA) -> Path:
    """Return the path of a file that can be executed; some installers drop that permission.

    Raises:
        WheelMissingError: the file is not there, e.g. the wheel was built for another platform.
    """
    if not path.is_file():
        raise WheelMissingError(wheel, looked_in=f"no file {path}", next_command=next_command)
    if not os.access(path, os.X_OK):
        path.chmod(0o755)
    return path
