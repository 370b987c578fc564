"""Run by path, with no package: turns into a server once its pid is on record.

    python -I -S launch.py STARTER_PID DEATH_SIGNAL ARGV...

The starter holds the other end of descriptor 3. One byte means "you are recorded, go on"; end of
file means that the starter died or gave up, and then no server was ever started. Between the two
nothing can run unrecorded.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1
GO_FD = 3
NOT_STARTED = 126  # shells use it for a command that was found and not run
NOT_FOUND = 127  # and this for one that was not found


def main() -> int:
    """Wait for the word, then become the command; the number is returned where that failed."""
    starter_pid, death_signal, argv = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if death_signal:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, death_signal)  # exec keeps it
        # A starter that died before that line sends nothing, and its word may lie in the pipe.
        if os.getppid() != starter_pid:
            return NOT_STARTED
    if not os.read(GO_FD, 1):
        return NOT_STARTED
    # Whatever a C library of the starter left open: a server must not hold its sockets and locks.
    os.closerange(GO_FD, os.sysconf("SC_OPEN_MAX"))
    # Python ignores SIGPIPE, and an ignored signal stays ignored across exec.
    for number in (signal.SIGPIPE, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606 - no shell is wanted
    except OSError as error:
        sys.stderr.write(f"cannot run {argv[0]}: {error.strerror}\n")
        return NOT_FOUND


if __name__ == "__main__":
    sys.exit(main())
