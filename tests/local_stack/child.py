"""A command of its own that holds a local stack: the signal tests start it and hit it.

Its report lines go to stdout. With --signal-at TEXT it sends itself --signal at the first report
line that holds TEXT, which puts a signal into a known moment of the start.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from pathlib import Path

from compose.errors import ComposeError
from compose.local.foreground import running_stack
from compose.local.stack import LocalStack, StackOptions


def main() -> int:
    """Hold the stack until a signal comes; refusals are one line on stderr and exit code 1."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--services", required=True)
    parser.add_argument("--signal", default="SIGTERM")
    parser.add_argument("--signal-at")
    parser.add_argument("--detached", action="store_true")
    arguments = parser.parse_args()
    # A suite that runs under nohup hands down that this signal is ignored, which is kept to.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

    def report(line: str) -> None:
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()
        if arguments.signal_at and arguments.signal_at in line:
            os.kill(os.getpid(), signal.Signals[arguments.signal])

    repository = arguments.run_dir / "model_repo"
    repository.mkdir(parents=True, exist_ok=True)
    options = StackOptions(
        run_dir=arguments.run_dir,
        model_repository=repository,
        services=frozenset(arguments.services.split(",")),
    )
    try:
        if arguments.detached:
            report(f"up {LocalStack().up(options, report=report).redis}")
            return 0
        with running_stack(options, report=report) as stack:
            stack.spawn("worker", [sys.executable, "-c", "import signal; signal.pause()"])
            report(f"up {stack.addresses.redis}")
            while True:
                # Not for good: a signal that comes right before a wait is only seen after it.
                time.sleep(0.2)
    except ComposeError as error:
        sys.stderr.write(f"{error}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
