"""`EventProducer` for asyncio: `await send(event)` returns where the event stands."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, Final, Self, Unpack

from streams.errors import DeliveryError, ProducerClosedError, QueueFullError
from streams.producer import CLOSE_TIMEOUT_S, QUEUE_WAIT_S, Counters, Delivery, EventProducer

if TYPE_CHECKING:
    from types import TracebackType

    from features.events import Event
    from streams.kafka import KafkaConfig
    from streams.producer import OnDelivery, Outcome, Sending

# Sends that may wait for their acknowledgement at once; the next one waits its turn in `send`.
IN_FLIGHT_MAX: Final = 10_000
# How long the reporting thread sleeps in the library; a report wakes it at once.
_POLL_S: Final = 0.1
# Between two looks at a queue that is full by bytes.
_ROOM_S: Final = 0.01


class AsyncEventProducer:
    """Sends events from one event loop; acknowledgements arrive through a thread of its own.

    Use it as `async with`. Leaving the block waits for what is on its way.
    """

    def __init__(
        self,
        config: KafkaConfig,
        topic: str,
        *,
        in_flight_max: int = IN_FLIGHT_MAX,
        queue_wait_s: float = QUEUE_WAIT_S,
        **sending: Unpack[Sending],
    ) -> None:
        """Say where to send; nothing is opened yet.

        Args:
            config: the cluster.
            topic: usually `Topics().events`.
            in_flight_max: sends that may be unacknowledged at once; the next one waits.
            queue_wait_s: how long a send waits for room in a queue full by bytes.
            sending: `msgpack`, `linger_ms`, `delivery_timeout_ms`, as for `EventProducer`.
        """
        self._producer = EventProducer(
            config,
            topic,
            queue_events_max=2 * in_flight_max,
            queue_wait_s=0.0,
            **sending,
        )
        self._queue_wait_s = queue_wait_s
        self._room = asyncio.Semaphore(in_flight_max)
        self._reports: deque[tuple[asyncio.Future[Delivery], Outcome]] = deque()
        self._wake_lock = threading.Lock()
        self._woken = False
        self._stopping = threading.Event()
        self._poller: threading.Thread | None = None

    async def send(self, event: Event) -> Delivery:
        """Return where the event stands, once the broker has acknowledged it.

        A cancelled send may have been sent.

        Raises:
            InvalidEventError: readers would refuse it; nothing was sent.
            QueueFullError: the queue stayed full; nothing was sent.
            DeliveryError: the broker did not acknowledge it; the same event can be sent again.
            ProducerClosedError: after `close`.
        """
        if self._stopping.is_set():
            raise ProducerClosedError("this producer is closed: make a new one.")
        async with self._room:
            loop = asyncio.get_running_loop()
            future: asyncio.Future[Delivery] = loop.create_future()

            def report(_: Event, outcome: Outcome) -> None:
                self._reports.append((future, outcome))
                with self._wake_lock:
                    if self._woken:
                        return
                    self._woken = True
                loop.call_soon_threadsafe(self._settle)

            await self._hand_over(event, report)
            self._start()
            return await future

    async def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait for what is on its way; sends without an acknowledgement by then raise."""
        self._stopping.set()
        if self._poller is not None:
            await asyncio.to_thread(self._poller.join)
        # Each failure has been raised by the `send` it belongs to.
        await asyncio.to_thread(self._producer.close, timeout_s)
        # The reports of the flush were posted to this loop before; now they have been handled.
        await asyncio.sleep(0)

    @property
    def counters(self) -> Counters:
        """Events so far."""
        return self._producer.counters

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _hand_over(self, event: Event, report: OnDelivery) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._queue_wait_s
        while True:
            try:
                self._producer.send(event, on_delivery=report)
            except QueueFullError:
                if loop.time() > deadline:
                    raise
                await asyncio.sleep(_ROOM_S)
            else:
                return

    def _start(self) -> None:
        if self._poller is None:
            # A daemon: a program that forgets to close must still be able to end.
            self._poller = threading.Thread(
                target=self._poll_until_stopped, name="moveline-delivery", daemon=True
            )
            self._poller.start()

    def _poll_until_stopped(self) -> None:
        while not self._stopping.is_set():
            self._producer.poll(_POLL_S)

    def _settle(self) -> None:
        """Complete the sends whose reports have arrived; runs in the event loop."""
        with self._wake_lock:
            self._woken = False
        while self._reports:
            future, outcome = self._reports.popleft()
            if isinstance(outcome, DeliveryError):
                # Its `send` raises, so that nobody will ask for it again.
                self._producer.take_undelivered()
                if not future.done():
                    future.set_exception(outcome)
            elif not future.done():
                future.set_result(outcome)
