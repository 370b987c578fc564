"""Waiting in tests: for a condition, up to a deadline, never for a span of time."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable

# What a healthy machine under the load of a whole test run stays far below.
TIMEOUT_S: Final = 60.0
_POLL_S: Final = 0.01


def until(condition: Callable[[], object], timeout_s: float = TIMEOUT_S, *, what: str = "") -> None:
    """Return once the condition holds; fail, naming it, if it does not in time."""
    deadline = time.monotonic() + timeout_s
    nothing = threading.Event()
    while not condition():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what or condition}"
        nothing.wait(_POLL_S)
