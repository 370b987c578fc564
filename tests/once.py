"""What takes a test process seconds to make, and what all of them can read: made once.

The processes of one test run (pytest-xdist) have folders beside one another.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from filelock import FileLock

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import pytest


def made_once(
    tmp_path_factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]
) -> Path:
    """Return a folder for reading only, made by whoever comes first.

    Args:
        tmp_path_factory: pytest's, of this process.
        name: of what is made, the same in all processes.
        make: fills the folder that it is given; run again where it failed.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / name
    with FileLock(root / f"{name}.lock"):
        if not folder.is_dir():
            part = tmp_path_factory.mktemp(name)
            make(part)
            part.rename(folder)
    return folder
