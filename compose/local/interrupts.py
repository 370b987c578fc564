"""Signals that become one exception, so that whoever started servers gets to stop them."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_EXIT_CODE_BASE = 128  # a shell reports 128 + n for a command ended by signal n


class Interrupts:
    """The first signal raises and later ones do not: a clean-up is never cut short."""

    def __init__(self, *, held: bool = False) -> None:
        """Nothing has arrived; `held` signals wait from the first moment."""
        self._holding = held
        self._raised = False
        self._remembered: int | None = None

    def hold(self) -> None:
        """From here on signals wait until the guard ends."""
        self._holding = True

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Raise for the first signal, remember it while held."""
        if self._raised:
            return
        if self._holding:
            self._remembered = number
            return
        self._raised = True
        _raise_for(number)

    def release(self) -> None:
        """Raise for a signal that arrived while signals were held."""
        if self._remembered is not None and not self._raised:
            self._raised = True
            _raise_for(self._remembered)


@contextmanager
def interrupts(*, held: bool = False) -> Iterator[Interrupts]:
    """SIGINT, SIGTERM and SIGHUP raise here, once; the former handlers are back afterwards.

    SIGINT raises KeyboardInterrupt, the others SystemExit with the code a shell would report.
    Python delivers signals to the main thread only, so that in another thread this guard does
    nothing.
    """
    guard = Interrupts(held=held)
    if threading.current_thread() is not threading.main_thread():
        yield guard
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    try:
        for number in _SIGNALS:
            # nohup's promise is kept. An ignored SIGINT is not: scripts' background jobs have it,
            # and still stop by it.
            if number != signal.SIGHUP or before[number] != signal.SIG_IGN:
                signal.signal(number, guard.receive)
        yield guard
    finally:
        guard.hold()
        for number, handler in before.items():
            if handler is not None:  # None: installed by C code, which Python cannot put back
                signal.signal(number, handler)
    guard.release()


def _raise_for(number: int) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(_EXIT_CODE_BASE + number)
