"""The only place that reads the wall clock; everything else is handed a time."""

import time


def now_ms() -> int:
    """Return the wall clock as UTC epoch milliseconds."""
    return time.time_ns() // 1_000_000
