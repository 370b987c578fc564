"""Answers again, by the version that is tried, once the answers have gone; never at their cost."""

from __future__ import annotations

import logging
import queue
import threading
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from scoring.asks import Ask

log = logging.getLogger("moveline.recommend")

# Requests that wait to be answered again; the next one is dropped and counted.
QUEUE_MAX: Final = 64
# How soon the thread hears that it is to end.
_POLL_S: Final = 0.2


class _Job(NamedTuple):
    asks: Sequence[Ask]
    now_ms: int


class Run(Protocol):
    """Answers these asks by the shadow's version and logs them."""

    def __call__(self, asks: Sequence[Ask], now_ms: int) -> None:
        """Do it; what it raises is logged."""
        ...


class Shadow:
    """A bounded queue and the thread that empties it."""

    def __init__(self, run: Run, on_dropped: Callable[[], None]) -> None:
        self._run, self._on_dropped = run, on_dropped
        self._jobs: queue.Queue[_Job] = queue.Queue(QUEUE_MAX)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="moveline-shadow", daemon=True)

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """End; what still waits is dropped."""
        self._stop.set()
        self._thread.join()

    def offer(self, asks: Sequence[Ask], now_ms: int) -> None:
        """Take a request without waiting, or count it as dropped."""
        try:
            self._jobs.put_nowait(_Job(asks, now_ms))
        except queue.Full:
            self._on_dropped()

    def _serve(self) -> None:
        while not self._stop.is_set():
            try:
                job = self._jobs.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            try:
                self._run(job.asks, job.now_ms)
            except Exception:
                log.exception("a shadow's answer failed")
