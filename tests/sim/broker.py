"""A Kafka in memory: partitions with holes, a cooperative group, dead letters.

A double, because a broker cannot be made to rebalance, expire a member or delete records between
two given instructions of a worker. It offers what `streams.worker` and `streams.dead_letters` use
of the library.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Protocol

from streams.kafka import KafkaError, KafkaException, TopicPartition

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

    from streams.worker import Place

NO_OFFSET: Final = -1001


@dataclass(frozen=True, slots=True)
class SimMessage:
    """A record, with the library's way of asking it."""

    place: Place
    at: int
    append_time_ms: int
    raw_key: bytes | None
    raw_value: bytes | None

    def topic(self) -> str:
        return self.place[0]

    def partition(self) -> int:
        return self.place[1]

    def offset(self) -> int:
        return self.at

    def timestamp(self) -> tuple[int, int]:
        return 2, self.append_time_ms

    def key(self) -> bytes | None:
        return self.raw_key

    def value(self) -> bytes | None:
        return self.raw_value

    def headers(self) -> None:
        return None

    def error(self) -> None:
        return None


@dataclass
class SimLog:
    """One partition: append-only, with offsets that hold nothing, and an oldest offset."""

    messages: list[SimMessage] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    low: int = 0
    high: int = 0

    def append(self, message: SimMessage) -> None:
        """Add a record at the end, which is its offset or before it."""
        self.messages.append(message)
        self.offsets.append(message.at)
        self.high = message.at + 1

    def read(self, offset: int, count: int) -> list[SimMessage]:
        """Return the next records from `offset` on."""
        at = bisect_left(self.offsets, offset)
        return self.messages[at : at + count]


class DeadLetter:
    """A record of the dead-letter topic."""

    __slots__ = ("at", "key", "reason", "value")

    def __init__(
        self, value: bytes | None, key: bytes | None, headers: list[tuple[str, bytes]]
    ) -> None:
        told = dict(headers)
        self.at = int(told["moveline-partition"]), int(told["moveline-offset"])
        self.value, self.key, self.reason = value, key, told["moveline-reason"].decode()


class Hooks(Protocol):
    """What a client tells the world it lives in."""

    rng: random.Random

    def at(self, point: str) -> None:
        """Something may happen here."""
        ...

    def fails(self) -> bool:
        """Return whether the broker refuses this request."""
        ...

    def num_fetched(self, count: int) -> int:
        """Return how many records at most a partition's fetch brings, `count` or fewer."""
        ...


@dataclass
class SimBroker:
    """Topics, the offsets of one group, and the group's coordinator."""

    rng: random.Random
    logs: dict[Place, SimLog]
    committed: dict[Place, int] = field(default_factory=dict)
    dead_letters: list[DeadLetter] = field(default_factory=list)
    members: list[SimConsumer] = field(default_factory=list)
    owners: dict[Place, SimConsumer | None] = field(default_factory=dict)
    targets: dict[Place, SimConsumer] = field(default_factory=dict)
    on_commit: Callable[[Place], None] = lambda _: None

    def join(self, member: SimConsumer) -> None:
        """Take a member; partitions move at once or when their owners have let go."""
        self.members.append(member)
        self.rebalance()

    def leave(self, member: SimConsumer) -> None:
        """A member is gone, of its own will or because it was silent for too long."""
        self.members.remove(member)
        for place, owner in self.owners.items():
            if owner is member:
                self.owners[place] = None
        self.rebalance()

    def rebalance(self) -> None:
        """Give every partition a member; some stay, some move."""
        self.targets = {}
        for place in self.logs:
            if self.members:
                owner = self.owners.get(place)
                stays = owner in self.members and self.rng.random() < 0.4
                self.targets[place] = owner if stays and owner else self.rng.choice(self.members)
        self.settle()

    def settle(self) -> None:
        """Give away what nobody holds, ask for what somebody else shall have."""
        for place, target in self.targets.items():
            owner = self.owners.get(place)
            if owner is not None and place in owner.to_assign and owner is not target:
                owner.to_assign.discard(place)
                owner = None
            if owner is None:
                self.owners[place] = target
                target.to_assign.add(place)
            elif owner is not target:
                owner.to_revoke.add(place)
            else:
                owner.to_revoke.discard(place)

    def release(self, member: SimConsumer, places: Iterable[Place]) -> None:
        """The member has let go."""
        for place in places:
            assert self.owners[place] is member
            self.owners[place] = None
        self.settle()


class SimConsumer:
    """A group member as `streams.worker` sees the library's Consumer."""

    def __init__(self, broker: SimBroker, hooks: Hooks) -> None:
        self.broker = broker
        self.hooks = hooks
        self.positions: dict[Place, int] = {}
        self.paused: set[Place] = set()
        self.to_assign: set[Place] = set()
        self.to_revoke: set[Place] = set()
        self.on_assign: Any = None
        self.on_revoke: Any = None
        self.on_lost: Any = None
        self.on_commit: Any = None
        self.in_flight: list[list[TopicPartition]] = []

    def subscribe(self, _: Sequence[str], **callbacks: Any) -> None:  # noqa: ANN401 - callables
        self.on_assign = callbacks["on_assign"]
        self.on_revoke = callbacks["on_revoke"]
        self.on_lost = callbacks["on_lost"]
        # The library takes this one when it is configured.
        self.on_commit = callbacks["on_commit"]
        self.broker.join(self)

    @property
    def is_member(self) -> bool:
        return self in self.broker.members

    def poll(self, _: float) -> SimMessage | None:
        return next(iter(self.consume(1, 0.0)), None)

    def consume(self, count: int, _: float) -> list[SimMessage]:
        self.hooks.at("poll")
        if self.hooks.rng.random() < 0.2:
            # Records fetched before the callbacks ran: the library hands them out all the same.
            messages = self._fetch(count)
            self.serve()
            return messages
        self.serve()
        return self._fetch(count)

    def _fetch(self, count: int) -> list[SimMessage]:
        messages: list[SimMessage] = []
        for place in [place for place in self.positions if place not in self.paused]:
            log = self.broker.logs[place]
            # auto.offset.reset=earliest: what is gone is passed over, silently.
            self.positions[place] = max(self.positions[place], log.low)
            found = log.read(self.positions[place], self.hooks.num_fetched(count))
            if found:
                self.positions[place] = found[-1].at + 1
                messages += found
        return messages

    def serve(self) -> None:
        """Run the callbacks that are due, as the library does while it is polled."""
        self._land()
        if not self.is_member:
            self.to_assign.clear()
            self.to_revoke.clear()
            if self.positions:
                self.on_lost(self, [TopicPartition(*place) for place in sorted(self.positions)])
            self.broker.join(self)
        if self.to_revoke:
            places = sorted(self.to_revoke)
            self.on_revoke(self, [TopicPartition(*place) for place in places])
            if self.is_member:
                self.to_revoke -= set(places)
                self.broker.release(self, places)
        if self.to_assign and self.is_member:
            places = sorted(self.to_assign)
            self.to_assign.clear()
            self.on_assign(self, [TopicPartition(*place) for place in places])

    def incremental_assign(self, partitions: list[TopicPartition]) -> None:
        for at in partitions:
            place = at.topic, at.partition
            low = self.broker.logs[place].low
            self.positions[place] = self.broker.committed.get(place, low)
            self.paused.discard(place)

    def incremental_unassign(self, partitions: list[TopicPartition]) -> None:
        for at in partitions:
            self.positions.pop((at.topic, at.partition))

    def assignment(self) -> list[TopicPartition]:
        return [TopicPartition(*place) for place in self.positions]

    def pause(self, partitions: list[TopicPartition]) -> None:
        self.paused |= {(at.topic, at.partition) for at in partitions}

    def resume(self, partitions: list[TopicPartition]) -> None:
        self.paused -= {(at.topic, at.partition) for at in partitions}

    def seek(self, at: TopicPartition) -> None:
        if (at.topic, at.partition) not in self.positions:
            raise KafkaException(KafkaError(KafkaError._STATE))
        self.positions[at.topic, at.partition] = at.offset

    def committed(self, partitions: list[TopicPartition], **_: float) -> list[TopicPartition]:
        self._request("ask for committed offsets")
        return [
            TopicPartition(
                at.topic,
                at.partition,
                self.broker.committed.get((at.topic, at.partition), NO_OFFSET),
            )
            for at in partitions
        ]

    def get_watermark_offsets(
        self, at: TopicPartition, *, timeout: float = 0.0, cached: bool = False
    ) -> tuple[int, int]:
        del timeout
        if not cached:
            self._request("ask for watermarks")
        log = self.broker.logs[at.topic, at.partition]
        return log.low, log.high

    def commit(self, *, offsets: list[TopicPartition], asynchronous: bool) -> None:
        """Commit now, after what is on its way; or send it on its way, to be lost in a crash."""
        if asynchronous:
            self.in_flight.append(offsets)
            return
        self._land()
        self._commit(offsets)

    def _land(self) -> None:
        """Let the broker judge the commits on their way, and tell how each ended."""
        while self.in_flight:
            offsets = self.in_flight.pop(0)
            try:
                self._commit(offsets)
            except KafkaException as error:
                self.on_commit(error.args[0], offsets)
            else:
                self.on_commit(None, offsets)

    def _commit(self, offsets: list[TopicPartition]) -> None:
        self._request(f"commit {[(at.topic, at.partition, at.offset) for at in offsets]}")
        if not self.is_member:
            raise KafkaException(KafkaError(KafkaError.UNKNOWN_MEMBER_ID))
        if (self.to_revoke or self.to_assign) and self.hooks.rng.random() < 0.3:
            raise KafkaException(KafkaError(KafkaError.REBALANCE_IN_PROGRESS))
        for at in offsets:
            self.broker.committed[at.topic, at.partition] = at.offset
            self.broker.on_commit((at.topic, at.partition))
        self.hooks.at("committed")

    def _request(self, doing: str) -> None:
        self.hooks.at(doing)
        if self.hooks.fails():
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))

    def close(self) -> None:
        """Give the partitions back, as the library does on closing."""
        if self.is_member:
            if self.positions:
                places = [TopicPartition(*place) for place in sorted(self.positions)]
                self.on_revoke(self, places)
            if self.is_member:
                self.broker.leave(self)
        elif self.positions:
            self.on_lost(self, [TopicPartition(*place) for place in sorted(self.positions)])


class SimProducer:
    """What `DeadLetterProducer` uses of the library: nothing is sent before `flush`."""

    def __init__(self, broker: SimBroker, hooks: Hooks) -> None:
        self.broker = broker
        self.hooks = hooks
        self.queue: list[tuple[DeadLetter, Callable[[object, object], object]]] = []

    def produce(
        self,
        _: str,
        *,
        value: bytes | None,
        key: bytes | None,
        headers: list[tuple[str, bytes]],
        on_delivery: Callable[[object, object], object],
    ) -> None:
        self.queue.append((DeadLetter(value, key, headers), on_delivery))

    def flush(self, _: float) -> int:
        while self.queue:
            self.hooks.at("send a dead letter")
            letter, on_delivery = self.queue.pop(0)
            if self.hooks.fails():
                on_delivery(KafkaError(KafkaError._MSG_TIMED_OUT), None)
            else:
                self.broker.dead_letters.append(letter)
                self.hooks.at("dead letter acknowledged")
                on_delivery(None, None)
        return 0

    def poll(self, _: float) -> int:
        return 0
