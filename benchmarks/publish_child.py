"""Publishes a package and says on stdout when a step is done; waits there where it was told to.

  python -m benchmarks.publish_child PACKAGE [--wait-at STEP] [--file-bytes-max N]

Whoever started it kills it there, breaks something, or lets it go on with a line on stdin: so a
kill comes exactly after the step that it is meant for.
"""

from __future__ import annotations

import argparse
import resource
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from compose.publishing import publish_package
from compose.settings import load_settings

if TYPE_CHECKING:
    from trainer.publish import Step


def main() -> None:
    """Publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("package", type=Path)
    parser.add_argument("--wait-at", type=int, default=0)
    parser.add_argument("--file-bytes-max", type=int)
    given = parser.parse_args()
    if given.file_bytes_max is not None:
        # The system refuses larger files as it refuses all of them on a full disk.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (given.file_bytes_max,) * 2)

    def announce(step: Step) -> None:
        sys.stdout.write(f"{int(step)}\n")
        sys.stdout.flush()
        if step == given.wait_at:
            sys.stdin.readline()

    live = publish_package(load_settings(), given.package, on_step=announce)
    sys.stdout.write(f"live {live.version}\n")


if __name__ == "__main__":
    main()
