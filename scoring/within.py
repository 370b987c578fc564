"""Calls that are waited for no longer than there is time."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

T = TypeVar("T")


class LateError(Exception):
    """The call did not end in time; it goes on by itself, and its result is dropped."""


def within(
    pool: ThreadPoolExecutor, left_ms: float, call: Callable[[], T], *, unhurried_ms: float
) -> T:
    """Return what the call returns.

    Args:
        pool: whose thread makes the call, so that this one can turn away.
        left_ms: how long to wait.
        call: what to do.
        unhurried_ms: with more left, it is called right here, which saves a tenth of a
            millisecond: it gives up by itself in that time.

    Raises:
        LateError: not within `left_ms`, or no thread of the pool was free for so long.
    """
    if left_ms > unhurried_ms:
        return call()
    future = pool.submit(call)
    try:
        return future.result(left_ms / 1000)
    except TimeoutError as error:
        if future.done() and future.exception() is error:
            raise  # the call's own
        future.cancel()
        raise LateError(f"no answer within {left_ms:.0f} ms") from error
