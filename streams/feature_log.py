"""The feature log's topic: written without ever waiting, read back from any time on."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final, Protocol

from streams.kafka import KafkaException, make_producer, offsets_for_time
from streams.log_reader import LogReader

if TYPE_CHECKING:
    from collections.abc import Iterator

    from streams.kafka import KafkaConfig, KafkaError, Message, Producer

# A record is about 48 bytes an event of the streams, 25 kB with the default sizes. While Kafka is
# away as many wait; more are dropped and counted: an answer never waits for its own log.
QUEUE_RECORDS_MAX: Final = 1_000
QUEUE_KBYTES_MAX: Final = 32_768
# A record that could not be delivered for so long is dropped and counted.
DELIVERY_TIMEOUT_MS: Final = 30_000
# Nobody waits for these records: fill the batches.
_LINGER_MS: Final = 100
# What a server that stops gives the last records.
CLOSE_TIMEOUT_S: Final = 2.0
# How soon the thread that serves delivery reports hears that it is to end.
_POLL_S: Final = 0.2
# Records read from the topic at a time: about 25 MB.
_READ_RECORDS: Final = 1_000


class Counter(Protocol):
    """Something that counts."""

    def __call__(self, number: int) -> None:
        """Count so many more."""


class FeatureLogProducer:
    """Sends records and never waits; what becomes of each is counted.

    The counters are told from one thread only, a few times a second: two threads that count on one
    of Triton's metrics at once end the server by a segmentation fault.
    """

    def __init__(
        self, kafka: KafkaConfig, topic: str, *, on_delivered: Counter, on_dropped: Counter
    ) -> None:
        """Prepare to send; no connection is made yet.

        Args:
            kafka: the cluster.
            topic: usually `Topics().feature_log`.
            on_delivered: told how many more records the broker has acknowledged.
            on_dropped: likewise, that are lost: no room, no broker, too large.

        Raises:
            KafkaConfigError: a property in `kafka` is unknown.
        """
        self._topic = topic
        self._on_delivered = on_delivered
        self._on_dropped = on_dropped
        self._untold = threading.Lock()
        self._delivered = self._dropped = self._waiting = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self._serve, name="moveline-feature-log", daemon=True
        )
        self._producer: Producer = make_producer(
            kafka,
            linger_ms=_LINGER_MS,
            queue_messages_max=QUEUE_RECORDS_MAX,
            queue_kbytes_max=QUEUE_KBYTES_MAX,
            delivery_timeout_ms=DELIVERY_TIMEOUT_MS,
        )

    def start(self) -> None:
        """Serve delivery reports from a thread: until then they hold their place in the queue."""
        self._thread.start()

    def send(self, key: bytes, value: bytes) -> None:
        """Take a record, or count it as dropped."""
        try:
            self._producer.produce(self._topic, value, key, on_delivery=self._report)
        except (BufferError, KafkaException):
            self._count(dropped=1)
        else:
            self._count(waiting=1)

    def close(self) -> None:
        """Give the last records a moment; the rest is dropped."""
        self._stop.set()
        self._thread.join()
        self._producer.flush(CLOSE_TIMEOUT_S)
        # What flush() returns would also count errors of the connection that wait to be reported.
        self._count(dropped=self._waiting)
        self._tell()

    def _serve(self) -> None:
        while not self._stop.is_set():
            self._producer.poll(_POLL_S)
            self._tell()

    def _report(self, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self._count(delivered=1, waiting=-1)
        else:
            self._count(dropped=1, waiting=-1)

    def _count(self, *, delivered: int = 0, dropped: int = 0, waiting: int = 0) -> None:
        with self._untold:
            self._delivered += delivered
            self._dropped += dropped
            self._waiting += waiting

    def _tell(self) -> None:
        with self._untold:
            delivered, self._delivered = self._delivered, 0
            dropped, self._dropped = self._dropped, 0
        if delivered:
            self._on_delivered(delivered)
        if dropped:
            self._on_dropped(dropped)


def read_feature_log(
    kafka: KafkaConfig,
    topic: str,
    *,
    since_ms: int,
    records_max: int,
    user_id: int | None = None,
) -> Iterator[bytes | None]:
    """Yield the values of the newest records appended since a time. Joins no group.

    Args:
        kafka: the cluster.
        topic: usually `Topics().feature_log`.
        since_ms: epoch ms.
        records_max: how many at most, the partitions' shares alike; all of one user's if given.
        user_id: only this user's.

    Raises:
        TopicMissingError: nothing was ever logged here.
        StreamError: the broker does not hand them out.
    """
    starts = offsets_for_time(kafka, topic, since_ms)
    share = max(1, records_max // max(1, len(starts)))
    wanted = None if user_id is None else b"%d" % user_id
    reader = LogReader.open(kafka)
    try:
        for partition, start in sorted(starts.items()):
            low, high = reader.bounds(topic, partition)
            first = max(low, start if wanted else max(start, high - share))
            stretches = reader.read(topic, partition, first, high, records_max=_READ_RECORDS)
            for messages, _ in stretches:
                mine = (one for one in messages if wanted is None or one.key() == wanted)
                yield from (message.value() for message in mine)
    finally:
        reader.close()
