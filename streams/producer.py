"""For event producers: events are checked here, sent in order, and none is lost without a word.

`EventProducer` is for threads, `streams.async_producer` for asyncio. Both can return where an event
stands: what a recommendation request takes as `min_position`.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple, Self, TypedDict

from features.clock import now_ms
from features.errors import InvalidEventError, Reason
from features.events import (
    CONTENT_TYPE_HEADER,
    MSGPACK_TYPE,
    Event,
    decode_event,
    encode_event,
    judge_ranges,
    parse_id,
)
from features.keys import log_partition
from streams.errors import DeliveryError, ProducerClosedError, QueueFullError, UndeliveredError
from streams.kafka import KafkaException, make_producer
from streams.properties import DELIVERY_TIMEOUT_MS, LINGER_MS, QUEUE_MESSAGES_MAX
from streams.topics import source_of

if TYPE_CHECKING:
    from types import TracebackType

    from streams.kafka import KafkaConfig, KafkaError, Message, Producer

# How long `send` waits for room in a full queue. Shorter than a request's patience would be
# useless, longer would hide a dead broker.
QUEUE_WAIT_S: Final = 10.0
# What closing waits for the last acknowledgements.
CLOSE_TIMEOUT_S: Final = 30.0
# After a purge every report is already decided; this only bounds their hand-over.
_PURGE_TIMEOUT_S: Final = 10.0
# `send` serves delivery reports every so many events; a quiet producer serves them on each.
_POLL_EVERY: Final = 16
_POLL_S: Final = 0.05


class Delivery(NamedTuple):
    """An acknowledged event: where it stands and when that was.

    Attributes:
        partition: with `offset`, its place in the log.
        offset: see `partition`.
        append_time_ms: the broker's clock when it was appended, UTC epoch ms.
        acked_s: `time.perf_counter()` when the acknowledgement was seen.
        source: which topic of the event log took it.
    """

    partition: int
    offset: int
    append_time_ms: int
    acked_s: float
    source: int = 0

    @property
    def position(self) -> tuple[int, int]:
        """Return what a recommendation request takes as `min_position`."""
        return log_partition(self.source, self.partition), self.offset


class Counters(NamedTuple):
    """Events of one producer so far; sent = delivered + failed + still waiting."""

    num_sent: int
    num_delivered: int
    num_failed: int


class Sending(TypedDict, total=False):
    """Options of `EventProducer` that whoever sends through one passes on, explained there."""

    msgpack: bool
    linger_ms: int
    delivery_timeout_ms: int


Outcome = Delivery | DeliveryError
Headers = list[tuple[str, str | bytes | None]]
OnDelivery = Callable[[Event, Outcome], None]


def new_event(  # noqa: PLR0913 - one keyword per field of the event
    *,
    user_id: str | int,
    item_id: str | int,
    action: str,
    event_time_ms: int | None = None,
    event_id: str | None = None,
    domain: str | None = None,
    dwell_ms: int | None = None,
    value: float | None = None,
    request_id: str | None = None,
    position: int | None = None,
) -> Event:
    """Return the event that just happened: time and a random event_id are filled in.

    Args:
        user_id: an int, a decimal string, or any other string (hashed: features.events.stable_id).
        item_id: likewise.
        action: what was done; which ones exist is a setting of the installation.
        event_time_ms: UTC epoch ms; now if left out.
        event_id: what makes a second send harmless. Keep it if you retry by yourself.
        domain: the scene or surface, free text.
        dwell_ms: how long it was looked at.
        value: a rating, a price, a quantity.
        request_id: the recommendation request that led here.
        position: where in that answer the item stood, from 0.
    """
    return Event(
        event_id=uuid.uuid4().hex if event_id is None else event_id,
        user_id=parse_id(user_id),
        item_id=parse_id(item_id),
        action=action,
        event_time_ms=now_ms() if event_time_ms is None else event_time_ms,
        domain=domain,
        dwell_ms=dwell_ms,
        value=value,
        request_id=request_id,
        position=position,
    )


def encode_checked(event: Event, key: bytes, *, msgpack: bool) -> bytes:
    """Return the event's bytes after the same judgement every reader will pass on them.

    Raises:
        InvalidEventError: a wrong type, a range, or too large.
    """
    try:
        value = encode_event(event, msgpack=msgpack)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidEventError(Reason.WRONG_TYPE, f"cannot be encoded: {error}") from error
    # Decoded from the bytes: an Event's own constructor checks no type.
    judge_ranges(decode_event(value, msgpack=msgpack), key)
    return value


class EventProducer:
    """Sends events without blocking; may be shared between threads. Connects at the first send.

    An event sent is either delivered or handed back by `flush`; leaving the `with` block with an
    undelivered event raises. A repeated send of the same event_id changes nothing downstream.
    """

    def __init__(
        self,
        config: KafkaConfig,
        topic: str,
        *,
        msgpack: bool = False,
        queue_events_max: int = QUEUE_MESSAGES_MAX,
        queue_wait_s: float = QUEUE_WAIT_S,
        linger_ms: int = LINGER_MS,
        delivery_timeout_ms: int = DELIVERY_TIMEOUT_MS,
    ) -> None:
        """Say where to send; nothing is opened yet.

        Args:
            config: the cluster.
            topic: usually `Topics().events`.
            msgpack: MessagePack with a content-type header instead of JSON.
            queue_events_max: events that may wait for the broker, and undelivered ones that may
                wait for `flush`; at either limit `send` raises.
            queue_wait_s: how long `send` waits for room before that.
            linger_ms: how long an event waits for others to share its request.
            delivery_timeout_ms: after this long without an acknowledgement an event has failed.
        """
        self._config = config
        self._topic = topic
        self._msgpack = msgpack
        self._headers: Headers | None = [(CONTENT_TYPE_HEADER, MSGPACK_TYPE)] if msgpack else None
        self._queue_events_max = queue_events_max
        self._queue_wait_s = queue_wait_s
        self._linger_ms = linger_ms
        self._delivery_timeout_ms = delivery_timeout_ms
        self._lock = threading.Lock()
        self._client: Producer | None = None
        self._closed = False
        self._num_sent = 0
        self._num_delivered = 0
        self._num_failed = 0
        self._undelivered: list[Event] = []
        self._first_failure: DeliveryError | None = None

    def send(self, event: Event, *, on_delivery: OnDelivery | None = None) -> None:
        """Hand the event over; it travels in the background.

        Args:
            event: see `new_event`.
            on_delivery: called with the event and a `Delivery` or the `DeliveryError`, from
                whichever thread is in a method of this producer then. An event with a callback
                is reported there and by `flush`.

        Raises:
            InvalidEventError: readers would refuse it; nothing was sent.
            QueueFullError: the queue stayed full; nothing was sent.
            DeliveryError: too many earlier events are undelivered, take them with `flush`.
            ProducerClosedError: after `close`.
        """
        self._hand_over(event, partial(self._reported, event, on_delivery))

    def send_and_wait(self, event: Event, timeout_s: float = 10.0) -> Delivery:
        """Send the event and return where it stands; errors as for `send`.

        Raises:
            DeliveryError: the broker refused it, or stayed silent for `timeout_s`. The event may
                arrive all the same; sending it again with the same event_id is harmless.
        """
        outcome: list[Outcome] = []
        self._hand_over(event, partial(self._awaited, outcome))
        client = self._connected()
        deadline = time.monotonic() + timeout_s
        while not outcome:
            left_s = deadline - time.monotonic()
            # Looked for first: a process that stood still has the report in its queue.
            client.poll(max(0.0, min(left_s, _POLL_S)))
            if not outcome and left_s <= 0:
                raise DeliveryError(
                    f"event {event.event_id!r} was not acknowledged by {self._config.bootstrap} "
                    f"within {timeout_s:g} s. It may still arrive; send it again as it is.",
                    retriable=True,
                )
        if isinstance(outcome[0], DeliveryError):
            raise outcome[0]
        return outcome[0]

    def poll(self, timeout_s: float = 0.0) -> None:
        """Serve delivery reports, waiting at most `timeout_s` for the first."""
        self._connected().poll(timeout_s)

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> list[Event]:
        """Return the events that were not delivered, after waiting for those on their way.

        Nothing waits in the queue afterwards: what the broker did not acknowledge in time is
        taken back and is in the list. It may have arrived all the same; sending it again is
        harmless. Not listed: what `send_and_wait` has raised for.
        """
        client = self._client
        if client is not None and client.flush(timeout_s):
            client.purge()
            client.flush(_PURGE_TIMEOUT_S)
        return self.take_undelivered()

    def take_undelivered(self) -> list[Event]:
        """Return the events whose delivery has failed by now; waits for nothing."""
        with self._lock:
            undelivered, self._undelivered = self._undelivered, []
        return undelivered

    def close(self, timeout_s: float = CLOSE_TIMEOUT_S) -> list[Event]:
        """Flush, and refuse every later send; returns what `flush` returns."""
        self._closed = True
        undelivered = self.flush(timeout_s)
        self._client = None
        return undelivered

    @property
    def counters(self) -> Counters:
        """Events so far."""
        return Counters(self._num_sent, self._num_delivered, self._num_failed)

    @property
    def first_failure(self) -> DeliveryError | None:
        """The first delivery that failed, for a message to people."""
        return self._first_failure

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        undelivered = self.close()
        if undelivered and kind is None:
            raise UndeliveredError(
                f"{len(undelivered)} events were not delivered, the first is "
                f"{undelivered[0].event_id!r} ({self._first_failure}). They are in this error's "
                "`events`; send them again.",
                events=tuple(undelivered),
            ) from self._first_failure

    def _connected(self) -> Producer:
        client = self._client
        if client is not None:
            return client
        with self._lock:
            if self._closed:
                raise ProducerClosedError("this producer is closed: make a new one.")
            if self._client is None:
                self._client = make_producer(
                    self._config,
                    queue_messages_max=self._queue_events_max,
                    linger_ms=self._linger_ms,
                    delivery_timeout_ms=self._delivery_timeout_ms,
                )
            return self._client

    def _hand_over(
        self, event: Event, report: Callable[[KafkaError | None, Message], None]
    ) -> None:
        if self._closed:
            raise ProducerClosedError("this producer is closed: make a new one.")
        if len(self._undelivered) >= self._queue_events_max:
            raise DeliveryError(
                f"{len(self._undelivered)} events were not delivered, at most "
                f"{self._queue_events_max} are kept ({self._first_failure}). Take them with "
                "flush() and send them again.",
                retriable=True,
            )
        key = str(event.user_id).encode()
        value = encode_checked(event, key, msgpack=self._msgpack)
        client = self._connected()
        deadline: float | None = None
        while True:
            try:
                client.produce(self._topic, value, key, on_delivery=report, headers=self._headers)
                break
            except BufferError as error:
                deadline = self._room(client, deadline, error)
            except KafkaException as error:
                raise self._failure(error.args[0]) from error
        with self._lock:
            self._num_sent += 1
            num_sent = self._num_sent
        if num_sent % _POLL_EVERY == 0 or len(client) < _POLL_EVERY:
            client.poll(0)

    def _room(self, client: Producer, deadline: float | None, error: BufferError) -> float:
        """Return the deadline for room in the queue, after waiting for a report."""
        if deadline is None:
            deadline = time.monotonic() + self._queue_wait_s
        elif time.monotonic() > deadline:
            raise QueueFullError(
                num_queued=self._num_waiting(),
                limit=self._queue_events_max,
                waited_s=self._queue_wait_s,
            ) from error
        client.poll(min(_POLL_S, self._queue_wait_s))
        return deadline

    def _num_waiting(self) -> int:
        # len(client) would also count errors of the connection that wait to be reported.
        with self._lock:
            return self._num_sent - self._num_delivered - self._num_failed

    def _reported(
        self,
        event: Event,
        on_delivery: OnDelivery | None,
        error: KafkaError | None,
        message: Message,
    ) -> None:
        if error is None:
            with self._lock:
                self._num_delivered += 1
            if on_delivery is not None:
                on_delivery(event, _delivery(message))
            return
        failure = self._failure(error)
        with self._lock:
            self._num_failed += 1
            self._undelivered.append(event)
            self._first_failure = self._first_failure or failure
        if on_delivery is not None:
            on_delivery(event, failure)

    def _awaited(self, outcome: list[Outcome], error: KafkaError | None, message: Message) -> None:
        with self._lock:
            self._num_delivered += error is None
            self._num_failed += error is not None
        outcome.append(_delivery(message) if error is None else self._failure(error))

    def _failure(self, error: KafkaError) -> DeliveryError:
        return DeliveryError(
            f"not delivered to {self._topic!r} at {self._config.bootstrap}: {error.name()}, "
            f"{error.str()}",
            retriable=not error.fatal(),
        )


def _delivery(message: Message) -> Delivery:
    partition, offset = message.partition(), message.offset()
    assert partition is not None, "an acknowledged record has a partition"
    assert offset is not None, "an acknowledged record has an offset"
    source = source_of(message.topic() or "")
    return Delivery(partition, offset, message.timestamp()[1], time.perf_counter(), source)
