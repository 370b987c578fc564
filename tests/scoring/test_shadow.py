"""The shadow's queue and what is counted: bounded, from any thread, told by one. No servers."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import pytest

from scoring.counts import SHADOW_DROPPED, STEPS, Counts, Metric, Teller
from scoring.recommend import Ask
from scoring.shadow import QUEUE_MAX, Shadow
from scoring.within import LATE_MAX, Calls, LateError
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ASKS = [Ask(1, 2)]


def test_a_busy_shadow_drops_and_counts() -> None:
    ran: list[int] = []
    dropped: list[int] = []
    begun, release = threading.Event(), threading.Event()

    def run(asks: Sequence[Ask], now_ms: int) -> None:
        assert asks == ASKS
        begun.set()
        release.wait(10)
        ran.append(now_ms)

    shadow = Shadow(run, lambda: dropped.append(1))
    shadow.start()
    shadow.offer(ASKS, 0)
    assert begun.wait(10)
    for number in range(1, QUEUE_MAX + 4):
        shadow.offer(ASKS, number)
    assert len(dropped) == 3
    release.set()
    until(lambda: len(ran) == QUEUE_MAX + 1, 10)
    shadow.stop()
    assert ran == list(range(QUEUE_MAX + 1))


def test_a_shadow_outlives_an_answer_that_fails() -> None:
    ran: list[int] = []

    def run(asks: Sequence[Ask], now_ms: int) -> None:
        ran.append(now_ms)
        if now_ms == 0:
            raise RuntimeError(f"{asks} cannot be answered")

    shadow = Shadow(run, lambda: None)
    shadow.start()
    shadow.offer(ASKS, 0)
    shadow.offer(ASKS, 1)
    until(lambda: ran == [0, 1], 10)
    shadow.stop()


def test_many_threads_count_and_one_tells() -> None:
    counts, told, tellers = Counts(), dict[tuple[str, str], float](), set[int]()

    def tell(metric: Metric, label: str, number: float) -> None:
        tellers.add(threading.get_ident())
        told[metric.name, label] = told.get((metric.name, label), 0) + number

    teller = Teller(counts, tell)
    teller.start()

    def count() -> None:
        for _ in range(1_000):
            counts.add(STEPS, "full")
        counts.add(SHADOW_DROPPED, number=2)

    threads = [threading.Thread(target=count) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    until(lambda: told.get((STEPS.name, "full")) == 4_000, 10)
    until(lambda: told.get((SHADOW_DROPPED.name, "")) == 8, 10)
    assert len(tellers) == 1
    counts.add(STEPS, "deadline")
    teller.stop()
    assert told[STEPS.name, "deadline"] == 1


@pytest.fixture
def calls() -> Iterator[Calls]:
    """Threads of the test's own."""
    one = Calls("test")
    yield one
    one.close()


def test_a_call_is_waited_for_no_longer_than_there_is_time(calls: Calls) -> None:
    release = threading.Event()
    assert calls.within(5_000, threading.get_ident, unhurried_ms=100) == threading.get_ident()
    assert calls.within(4_000, threading.get_ident, unhurried_ms=5_000) != threading.get_ident()
    with pytest.raises(LateError, match="within 20 ms"):
        calls.within(20, lambda: release.wait(10), unhurried_ms=100)
    assert calls.within(4_000, lambda: 7, unhurried_ms=5_000) == 7
    release.set()


def test_what_stands_still_is_not_asked_again_until_it_goes_on(calls: Calls) -> None:
    release = threading.Event()
    for _ in range(LATE_MAX):
        with pytest.raises(LateError, match="within 5 ms"):
            calls.within(5, lambda: release.wait(10), unhurried_ms=100)
    with pytest.raises(LateError, match=f"{LATE_MAX} calls before it have not ended"):
        calls.within(90, lambda: 7, unhurried_ms=100)
    release.set()

    def goes_on() -> bool:
        try:
            return calls.within(90, lambda: True, unhurried_ms=100)
        except LateError:
            return False

    until(goes_on, 10)


def test_what_the_call_raises_is_raised(calls: Calls) -> None:
    def fails() -> int:
        raise TimeoutError("its own")

    with pytest.raises(TimeoutError, match="its own"):
        calls.within(1_000, fails, unhurried_ms=5_000)
