"""The `moveline` command as a process of its own, in an empty folder and a clean environment."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Protocol

import pytest

from tests.small import REPOSITORY, UNCOMPILED

if TYPE_CHECKING:
    from pathlib import Path


class Moveline(Protocol):
    """Runs one command to its end."""

    def __call__(
        self, *arguments: str, stdin: str = "", **settings: str
    ) -> subprocess.CompletedProcess[str]:
        """Return what it printed; `settings` become MOVELINE_* variables."""
        ...


@pytest.fixture
def moveline(tmp_path: Path) -> Moveline:
    """Run `python -m compose.cli` in the test's folder."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOVELINE_")}

    def run(*arguments: str, stdin: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
        variables = {f"MOVELINE_{name}": value for name, value in settings.items()}
        return subprocess.run(
            [sys.executable, "-m", "compose.cli", *arguments],
            env={
                **clean,
                **UNCOMPILED,
                "PYTHONPATH": str(REPOSITORY),
                "COLUMNS": "200",
                **variables,
            },
            cwd=tmp_path,
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    return run


def assert_one_sentence(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Assert that a command refused in one line for a person, with exit code 1."""
    lines = [line for line in done.stderr.splitlines() if line.startswith("moveline: ")]
    assert done.returncode == 1, done
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    for word in words:
        assert word in lines[0]
