"""Calls that are waited for no longer than there is time."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

# Calls of one kind that a deadline may overtake, at a time; one more waits for a thread.
CALLS_MAX: Final = 64
# So many calls that were given up and have not ended: whatever they wait for stands still, and the
# next call is given up at once until one of them ends.
LATE_MAX: Final = 8
T = TypeVar("T")


class LateError(Exception):
    """The call did not end in time; it goes on by itself, and its result is dropped."""


class Calls:
    """Makes calls of one kind in threads of its own, so that who waits can turn away."""

    def __init__(self, name: str) -> None:
        self._pool = ThreadPoolExecutor(CALLS_MAX, thread_name_prefix=f"moveline-{name}")
        self._lock = threading.Lock()
        self._num_late = 0

    def close(self) -> None:
        """End the threads, once their calls have ended."""
        self._pool.shutdown()

    def within(self, left_ms: float, call: Callable[[], T], *, unhurried_ms: float) -> T:
        """Return what the call returns.

        Args:
            left_ms: how long to wait.
            call: what to do.
            unhurried_ms: with more left, it is called right here, which saves a tenth of a
                millisecond: it gives up by itself in that time.

        Raises:
            LateError: not within `left_ms`, or too many calls before it have not ended.
        """
        if left_ms > unhurried_ms:
            return call()
        if self._num_late >= LATE_MAX:
            raise LateError(f"{self._num_late} calls before it have not ended yet")
        future = self._pool.submit(call)
        try:
            return future.result(left_ms / 1000)
        except TimeoutError as error:
            if future.done() and future.exception() is error:
                raise  # the call's own
            self._give_up(future)
            raise LateError(f"no answer within {left_ms:.0f} ms") from error

    def _give_up(self, future: Future[T]) -> None:
        with self._lock:
            self._num_late += 1
        future.add_done_callback(self._ended)
        future.cancel()

    def _ended(self, _: Future[T]) -> None:
        with self._lock:
            self._num_late -= 1
