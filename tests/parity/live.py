"""The parity law on live servers: reads taken while events flow, judged by the lake afterwards.

A producer sends real events, late and repeated ones among them, a worker applies them, and all the
while users are read: by the code `recommend` runs, which yields the records of the feature log, and
through Feast. Each read says which ordinal it saw and which clock it was given. Then the sink
writes the lake, and `features_at` says what should have been read, value by value.
"""

from __future__ import annotations

import heapq
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np

from features.as_of import Timeline, read_user_logs
from features.redis import CatalogueStore, Pointers
from features.schema import views
from features.skew import UserHistory
from scoring.feature_log import served_of
from scoring.live import Live, read_snapshot
from scoring.recommend import Ask, Retrieved, answer
from streams.lake import LakeSink
from streams.producer import EventProducer
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

    from feast import FeatureStore

    from features.config import StateConfig
    from features.events import Event
    from features.feature_log import Served
    from features.redis import StateStore
    from features.schema import View
    from features.state import Accepted
    from features.view import StreamBatch, UserView
    from streams.kafka import KafkaConfig

USER_VIEWS: Final = ("user_session", "user_recent", "user_mid")
DAY_MS: Final = 86_400_000
# Users asked for at once, as recommenders do.
_USERS_MAX: Final = 16
# One read in so many goes through Feast as well.
_FEAST_EVERY: Final = 10
# A read through Feast does not say its ordinal: it counts if the state stood still around it.
_FEAST_TRIES: Final = 20
# How far producer and reader may run ahead of each other, as a share of the whole.
_AHEAD: Final = 0.02
_SENT_AT_ONCE: Final = 50
_FLOW_TIMEOUT_S: Final = 120.0


def disordered(
    events: Iterable[Event], *, seed: int, late_share: float = 0.05, repeat_share: float = 0.05
) -> Iterator[Event]:
    """Yield the events, some after up to 3,000 later ones, some a second time."""
    source = random.Random(seed)
    held: list[tuple[int, int, Event]] = []
    place = 0
    for place, event in enumerate(events):
        while held and held[0][0] <= place:
            yield heapq.heappop(held)[2]
        if source.random() < late_share:
            heapq.heappush(held, (place + source.randrange(1, 3_000), place, event))
            continue
        yield event
        if source.random() < repeat_share:
            heapq.heappush(held, (place + source.randrange(1, 200), place, event))
    while held:
        yield heapq.heappop(held)[2]


class FeastRead(NamedTuple):
    """What Feast answered for a user, and at which ordinal and clock."""

    user_id: int
    ordinal: int
    clock_ms: int
    values: dict[str, Any]


@dataclass
class Reads:
    """What was read, by either way."""

    served: list[Served] = field(default_factory=list)
    feast: list[FeastRead] = field(default_factory=list)

    @property
    def num_pairs(self) -> int:
        """(user, ordinal, clock) triples and what was read for them."""
        return len(self.served) + len(self.feast)


@dataclass
class Verdict:
    """What the lake says of the reads."""

    num_pairs: int = 0
    num_values: int = 0
    num_mismatches: int = 0
    num_feast_pairs: int = 0
    num_pairs_after_late: int = 0
    first: str = ""

    def differ(self, what: str, number: int = 1) -> None:
        """Count values that differ; the first is kept in words."""
        self.num_mismatches += number
        self.first = self.first or what


def no_items(_: int, streams: StreamBatch, *__: object, **___: object) -> Retrieved:
    """Stand in for the model: what it is given is looked at, not what it says."""
    size = len(streams.ordinal_B)
    return Retrieved([[]] * size, [[]] * size, [[0.0, 0.0, 0.0]] * size)


@dataclass
class Reader:
    """Reads users while a producer sends, each about as far as the other."""

    store: StateStore
    feast: FeatureStore | None
    seed: int
    events: Sequence[Event]
    num_sent: int = 0
    errors: list[BaseException] = field(default_factory=list)

    def run(self, kafka: KafkaConfig, topic: str, *, num_pairs: int) -> Reads:
        """Send all events, take `num_pairs` reads meanwhile."""
        self._changed = threading.Condition()
        self._share_read = 0.0
        thread = threading.Thread(target=self._produce, args=(kafka, topic), name="producer")
        thread.start()
        try:
            return self._read(num_pairs)
        finally:
            with self._changed:
                self._share_read = 1.0
                self._changed.notify_all()
            thread.join(_FLOW_TIMEOUT_S)
            if self.errors:
                raise self.errors[0]
            assert not thread.is_alive(), "the producer did not end"

    def _produce(self, kafka: KafkaConfig, topic: str) -> None:
        try:
            with EventProducer(kafka, topic) as producer:
                for start in range(0, len(self.events), _SENT_AT_ONCE):
                    with self._changed:
                        self._changed.wait_for(self._may_send, _FLOW_TIMEOUT_S)
                    part = self.events[start : start + _SENT_AT_ONCE]
                    for event in part:
                        producer.send(event)
                    with self._changed:
                        self.num_sent += len(part)
                        self._changed.notify_all()
        except BaseException as error:  # noqa: BLE001 - raised again by the caller's thread
            self.errors.append(error)

    def _may_send(self) -> bool:
        return self.num_sent <= (self._share_read + _AHEAD) * len(self.events)

    def _may_read(self) -> bool:
        share_sent = self.num_sent / len(self.events)
        return bool(self.num_sent) and self._share_read <= share_sent + _AHEAD

    def _read(self, num_pairs: int) -> Reads:
        source, reads = random.Random(self.seed), Reads()
        catalogue = CatalogueStore(self.store.client)
        catalogue.put_pointers(Pointers(1, self.store.generation))
        live = Live(self.store.client)
        live.snapshot = read_snapshot(catalogue, live.snapshot)
        with progress_bar("read", total=num_pairs, unit="reads", shown=True) as advance:
            while reads.num_pairs < num_pairs and not self.errors:
                with self._changed:
                    self._changed.wait_for(self._may_read, _FLOW_TIMEOUT_S)
                before = reads.num_pairs
                users, clock_ms = self._choose(source)
                self._serve(users[: num_pairs - before], clock_ms, live, reads)
                if self.feast is not None and len(reads.feast) * _FEAST_EVERY <= before:
                    self._ask_feast(users[0], clock_ms, reads)
                advance(min(num_pairs, reads.num_pairs) - before)
                with self._changed:
                    self._share_read = reads.num_pairs / num_pairs
                    self._changed.notify_all()
        del reads.served[max(0, num_pairs - len(reads.feast)) :]
        return reads

    def _choose(self, source: random.Random) -> tuple[list[int], int]:
        """Return users, half of them busy right now, and a clock around the events' own time."""
        sent = max(1, self.num_sent)
        places = [
            source.randrange(max(0, sent - 2_000), sent)
            if source.random() < 0.5
            else source.randrange(sent)
            for _ in range(source.randint(1, _USERS_MAX))
        ]
        front_ms = self.events[places[0]].event_time_ms
        ahead_ms = source.choice([0, 1, self.store.config.session_gap_ms, 2 * DAY_MS, -DAY_MS])
        users = list(dict.fromkeys(self.events[place].user_id for place in places))
        return users, front_ms + ahead_ms + source.randrange(DAY_MS // 24)

    def _serve(self, users: list[int], clock_ms: int, live: Live, reads: Reads) -> None:
        asks = [Ask(user, 1) for user in users]
        for ask, one in zip(asks, answer(asks, live, no_items, clock_ms), strict=True):
            if one.seen is not None:
                reads.served.append(served_of(ask, one, clock_ms))

    def _ask_feast(self, user: int, clock_ms: int, reads: Reads) -> None:
        assert self.feast is not None
        online_store: Any = self.feast._get_provider().online_store
        online_store.clock = lambda: clock_ms
        references = [
            f"{view.name}:{feature.name}"
            for view in _user_views(self.store.config)
            for feature in view.features
        ]
        for _ in range(_FEAST_TRIES):
            (before,) = self.store.read_states([user], newest=1)
            answered = self.feast.get_online_features(references, [{"user_id": user}]).to_dict()
            (after,) = self.store.read_states([user], newest=1)
            if before is not None and after is not None and before.position == after.position:
                newest_ms = int(before.records["event_time_ms"][-1])
                values = {name: column[0] for name, column in answered.items()}
                seen_ms = max(clock_ms, newest_ms + 1)
                reads.feast.append(FeastRead(user, before.next_ordinal, seen_ms, values))
                return


def _user_views(config: StateConfig) -> list[View]:
    return [view for view in views(config) if view.name in USER_VIEWS]


def judge(reads: Reads, root: Path, topic: str, config: StateConfig) -> Verdict:
    """Return how the reads differ from the lake, which must hold all they saw."""
    verdict = Verdict(num_pairs=reads.num_pairs, num_feast_pairs=len(reads.feast))
    users = {one.user_id for one in (*reads.served, *reads.feast)}
    logs = read_user_logs(root, [topic], users, config)
    histories = {user: UserHistory(logs.get(user, []), config) for user in users}
    for served in sorted(reads.served, key=lambda one: (one.user_id, one.ordinal)):
        skew = histories[served.user_id].compare(served)
        verdict.num_values += skew.num_values
        for one in skew.differences:
            wrong = one.num_mismatched + one.num_missing + one.num_extra
            if wrong:
                verdict.differ(f"user {served.user_id} at ordinal {served.ordinal}: {one}", wrong)
        if skew.is_reordered:
            verdict.differ(f"user {served.user_id} at ordinal {served.ordinal}: order")
        verdict.num_pairs_after_late += _has_late(logs[served.user_id], served.ordinal)
    for read in reads.feast:
        view = Timeline(logs[read.user_id], config).at(read.ordinal, read.clock_ms)
        _judge_feast(read, expected_of(view, read.clock_ms, config), verdict)
        verdict.num_pairs_after_late += _has_late(logs[read.user_id], read.ordinal)
    return verdict


def _has_late(events: Sequence[Accepted], ordinal: int) -> bool:
    """Return whether an event known was older than one before it."""
    times = [event.event_time_ms for event in events[:ordinal]]
    return times != sorted(times)


def expected_of(view: UserView, clock_ms: int, config: StateConfig) -> dict[str, Any]:
    """Return what Feast should answer, by feature."""
    assert view.newest_event_time_ms is not None
    session = view.user_session
    found: dict[str, Any] = {}
    for one in _user_views(config):
        is_old = bool(one.ttl_s) and clock_ms - view.newest_event_time_ms > one.ttl_s * 1_000
        for feature in one.features:
            prefix, _, name = feature.name.partition("_")
            if is_old:
                found[feature.name] = None
            elif prefix == "session":
                value = getattr(session, name if hasattr(session, name) else feature.name)
                found[feature.name] = list(value) if isinstance(value, tuple) else value
            else:
                column = (view.recent if prefix == "recent" else view.mid)[name]
                signed = column.view(np.int64) if column.dtype == np.uint64 else column
                found[feature.name] = signed.tolist()
    return found


def _judge_feast(read: FeastRead, expected: Mapping[str, Any], verdict: Verdict) -> None:
    for name, right in expected.items():
        given = read.values[name]
        verdict.num_values += max(1, len(right)) if isinstance(right, list) else 1
        # As text, NaN equals itself; an int and a float still differ.
        if str(given) != str(right):
            place = f"user {read.user_id} at ordinal {read.ordinal} through Feast"
            verdict.differ(f"{place}: {name} is {given}, the lake gives {right}")


def write_lake(kafka: KafkaConfig, topic: str, root: Path) -> None:
    """The lake holds everything the topic does."""
    LakeSink(kafka, topic, root).run(until_end=True, progress=True)
