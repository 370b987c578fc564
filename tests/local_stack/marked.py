"""Which processes descend from a test's command, whatever became of their parents."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]
# Servers are stopped one after the other, and each may take its thirty seconds.
DEADLINE_S = 180.0


class Marked:
    """A command whose environment carries a mark; every descendant inherits it."""

    def __init__(self, run_dir: Path, *arguments: str) -> None:
        """The command runs."""
        self._run_dir = run_dir
        self._mark = f"MOVELINE_TEST_MARK={uuid.uuid4().hex}"
        name, _, value = self._mark.partition("=")
        command = [sys.executable, str(Path(__file__).with_name("child.py"))]
        self.child = subprocess.Popen(
            [*command, "--run-dir", str(run_dir), *arguments],
            env=os.environ | {name: value, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """The command has ended; for tests that fail before they end it."""
        self.child.terminate()
        self.end()

    def line_with(self, text: str) -> str:
        """Return the next line of its output that holds the text."""
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if text in line:
                return line.strip()
        message = f"the command ended without a line that holds {text!r}: {self.end()}"
        raise AssertionError(message)

    def end(self) -> tuple[int, str]:
        """Return the exit code and what went to stderr."""
        _, errors = self.child.communicate(timeout=DEADLINE_S)
        return self.child.returncode, errors

    def survivors(self) -> list[str]:
        """Return the command lines of all that still run with the mark, zombies not counted."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            try:
                # A zombie has neither. valkey-server writes its title over its environment, so its
                # output tells whose it is.
                environment = (entry / "environ").read_bytes().split(b"\0")
                output = (entry / "fd" / "1").readlink()
                if self._mark.encode() in environment or self._run_dir in output.parents:
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue
        return found


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Return once the condition holds; fail after three minutes."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"after {DEADLINE_S:g} s still not so: {what}"
        time.sleep(0.02)
