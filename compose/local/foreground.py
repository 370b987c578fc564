"""A local stack that ends with a block of code, whatever ends the block."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from compose.local.interrupts import interrupts
from compose.local.stack import LocalStack

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from compose.local.options import StackOptions


@contextmanager
def running_stack(
    options: StackOptions,
    *,
    tied: bool = True,
    keep: Callable[[], bool] | None = None,
    report: Callable[[str], None] | None = None,
) -> Iterator[LocalStack]:
    """A stack that is up inside the block and gone after it, however the block ends.

    Inside, SIGINT raises KeyboardInterrupt and SIGTERM and SIGHUP raise SystemExit, once; a second
    signal does not cut the stopping short.

    Args:
        options: what to start.
        tied: whether the kernel ends the servers with this process, should it be killed.
        keep: asked after a block that raised nothing; True leaves the stack up, which needs
            tied=False.
        report: called with one line for each step.

    Raises:
        ComposeError: see LocalStack.up.
    """
    assert keep is None or not tied, "a tied stack ends with its process, it cannot be kept"
    stack = LocalStack(options.run_dir, tied=tied)
    done = False
    with interrupts() as guard:
        try:
            try:
                stack.up(options, report=report)
                yield stack
                done = True
            finally:
                guard.hold()
        finally:
            if stack.is_started_here and not (done and keep is not None and keep()):
                stack.down()
