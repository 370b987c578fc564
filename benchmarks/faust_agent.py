"""The worker's job as a Faust agent: what a Python team would write with the framework.

Two forms of it: a plain agent, which takes an event at a time, as the framework's own examples do,
and one that takes up to 1,000 (`--batch-max`), which is as far as we know how to tune it.

Tail of 512, rolling session, duplicate window of 256 and position for each user, kept in Redis for
recommenders to read. What was chosen in the framework's favour, each as its documents advise for
throughput:

- Redis, not a Table: recommenders read Redis anyway, and a Table would send a user's whole tail to
  its changelog topic for every single event;
- one pipelined transaction for what was taken, so Redis is asked once for it; states stay in this
  process' memory and are read from Redis only for users not seen yet;
- raw values decoded by msgspec, as the worker does: a `faust.Record` of JSON is several times
  slower;
- uvloop, Faust's Cython streams, hiredis; no web server, no tables, a longer commit interval than
  by default; at-least-once, where a position per user leaves out what comes again. The buffer is
  the framework's own 4,096: a deeper one read most of so few events before the measured stretch
  began (11,000 events/s instead of 8,300).

Less than the worker does: no dead letters, no rules of a generation, no chunks, no compare-and-set,
no checkpoints. A process of its own; prints one line of JSON when it has seen all events, and goes
on until it is stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from bisect import bisect_right
from collections import deque
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import faust
import mode.loop
import msgspec
from redis.asyncio import Redis

from features.config import StateConfig
from features.events import Event, decode_event

if TYPE_CHECKING:
    from collections.abc import Sequence

    from faust.types import EventT, StreamT
    from redis.asyncio.client import Pipeline

TAIL: Final = 512
BATCH_WAIT_S: Final = 0.05
_CONFIG: Final = StateConfig()
# (event time, ordinal, event id, item, domain, dwell, action), as JSON in the user's list.
Entry = tuple[int, int, str, int, str | None, int | None, str]
_AS_ENTRY: Final = msgspec.json.Decoder(Entry)
_TIME_AND_ORDINAL: Final = itemgetter(0, 1)
_encode: Final = msgspec.json.Encoder().encode


class Summary(msgspec.Struct):
    """What is known of a user besides the tail; one JSON value in Redis."""

    partition: int = -1
    offset: int = -1
    next_ordinal: int = 0
    num_late: int = 0
    session_id: int = 0
    start_ms: int = 0
    last_ms: int = 0
    num_events: int = 0
    dwell_ms: int = 0
    action_counts: dict[str, int] = msgspec.field(default_factory=dict)


_AS_SUMMARY: Final = msgspec.json.Decoder(Summary)


@dataclass(slots=True)
class User:
    """One user's state in memory."""

    summary: Summary = field(default_factory=Summary)
    tail: deque[Entry] = field(default_factory=lambda: deque(maxlen=TAIL))
    window: deque[str] = field(default_factory=lambda: deque(maxlen=_CONFIG.dedup_window))
    fresh: list[Entry] = field(default_factory=list)  # appended since the last write
    is_reordered: bool = False  # the list in Redis has to be written anew

    def apply(self, event: Event, partition: int, offset: int) -> None:
        """Take one event, unless it was taken before or repeats a recent one."""
        summary = self.summary
        if offset <= summary.offset or event.event_id in self.window:
            return
        summary.partition, summary.offset = partition, offset
        self._insert(event)
        self.window.append(event.event_id)
        self._move_session(event)
        summary.next_ordinal += 1

    def _insert(self, event: Event) -> None:
        entry: Entry = (
            event.event_time_ms,
            self.summary.next_ordinal,
            event.event_id,
            event.item_id,
            event.domain,
            event.dwell_ms,
            event.action,
        )
        if not self.tail or entry[0] >= self.tail[-1][0]:
            self.tail.append(entry)
            self.fresh.append(entry)
            return
        ordered = list(self.tail)
        ordered.insert(bisect_right(ordered, entry[:2], key=_TIME_AND_ORDINAL), entry)
        self.tail.clear()
        self.tail.extend(ordered)
        self.is_reordered = True

    def _move_session(self, event: Event) -> None:
        summary, time_ms = self.summary, event.event_time_ms
        gap_ms, max_ms = _CONFIG.session_gap_ms, _CONFIG.session_max_ms
        if not summary.num_events or time_ms > summary.last_ms + gap_ms:
            self._open_session(time_ms)
        elif time_ms > summary.last_ms:
            if time_ms - summary.start_ms > max_ms:
                self._open_session(time_ms)
            summary.last_ms = time_ms
        elif time_ms < summary.start_ms:
            if time_ms < summary.start_ms - gap_ms or summary.last_ms - time_ms > max_ms:
                summary.num_late += 1
                return
            summary.start_ms = time_ms
        summary.num_events += 1
        summary.dwell_ms += event.dwell_ms or 0
        counts = summary.action_counts
        counts[event.action] = counts.get(event.action, 0) + 1

    def _open_session(self, time_ms: int) -> None:
        summary = self.summary
        summary.session_id = summary.next_ordinal
        summary.start_ms = summary.last_ms = time_ms
        summary.num_events = summary.dwell_ms = 0
        summary.action_counts = {}

    def queue_write(self, user_id: int, pipeline: Pipeline) -> None:
        """Queue what brings Redis up to this state."""
        if self.is_reordered:
            pipeline.delete(tail_key(user_id))
        entries = self.tail if self.is_reordered else self.fresh
        if entries:
            pipeline.rpush(tail_key(user_id), *map(_encode, entries))
            if self.summary.next_ordinal > TAIL:
                pipeline.ltrim(tail_key(user_id), -TAIL, -1)
        pipeline.set(summary_key(user_id), _encode(self.summary))
        self.fresh, self.is_reordered = [], False


def tail_key(user_id: int) -> str:
    """Return the key of a user's list."""
    return f"faust:{user_id}:tail"


def summary_key(user_id: int) -> str:
    """Return the key of the rest of a user's state."""
    return f"faust:{user_id}"


def user_from(summary: bytes | None, entries: Sequence[bytes]) -> User:
    """Return the state that Redis holds."""
    if summary is None:
        return User()
    user = User(_AS_SUMMARY.decode(summary))
    user.tail.extend(map(_AS_ENTRY.decode, entries))
    in_order = sorted(user.tail, key=lambda entry: entry[1])
    user.window.extend(entry[2] for entry in in_order)
    return user


@dataclass
class Job:
    """The states of the users seen, and how far the measurement is."""

    redis: Redis
    num_events: int
    warm_up: int
    users: dict[int, User] = field(default_factory=dict)
    num_seen: int = 0
    num_before: int = 0
    started_s: float = 0.0

    async def take(self, batch: Sequence[EventT[bytes]]) -> None:
        """Return once a batch is in Redis."""
        decoded = [(decode_event(event.value), event.message) for event in batch]
        await self._load({event.user_id for event, _ in decoded} - self.users.keys())
        for event, message in decoded:
            self.users[event.user_id].apply(event, message.partition, message.offset)
        pipeline = self.redis.pipeline(transaction=True)
        for user_id in {event.user_id for event, _ in decoded}:
            self.users[user_id].queue_write(user_id, pipeline)
        await pipeline.execute()
        self._measure(len(batch))

    async def _load(self, user_ids: set[int]) -> None:
        if not user_ids:
            return
        pipeline = self.redis.pipeline(transaction=False)
        for user_id in user_ids:
            pipeline.get(summary_key(user_id))
            pipeline.lrange(tail_key(user_id), 0, -1)
        replies: list[Any] = await pipeline.execute()
        for user_id, summary, entries in zip(user_ids, replies[::2], replies[1::2], strict=True):
            self.users[user_id] = user_from(summary, entries)

    def _measure(self, count: int) -> None:
        self.num_seen += count
        now_s = time.perf_counter()
        if not self.started_s and self.num_seen >= self.warm_up:
            self.started_s, self.num_before = now_s, self.num_seen
        elif self.num_seen >= self.num_events:
            rate = (self.num_seen - self.num_before) / (now_s - self.started_s)
            line = {"num_events": self.num_seen, "events_per_s": rate}
            sys.stdout.write(json.dumps(line) + "\n")
            sys.stdout.flush()


def make_app(kafka: str, topic: str, job: Job, *, batch_max: int) -> faust.App:
    """Return the app with its one agent, which takes up to `batch_max` events at a time."""
    app = faust.App(
        topic,
        broker=[f"kafka://{address}" for address in kafka.split(",")],
        store="memory://",
        datadir=Path(tempfile.gettempdir()) / topic,
        web_enabled=False,
        processing_guarantee="at_least_once",
        consumer_auto_offset_reset="earliest",
        consumer_max_fetch_size=4 * 1024 * 1024,
        stream_buffer_maxsize=4_096,
        stream_wait_empty=False,
        broker_commit_every=100_000,
        broker_commit_interval=5.0,
        topic_allow_declare=False,
        topic_disable_leader=True,
        worker_redirect_stdouts=False,
    )
    events = app.topic(topic, value_type=bytes, value_serializer="raw", key_serializer="raw")

    async def keep_states(stream: StreamT[bytes]) -> None:
        async for event in stream.events():
            await job.take([event])

    async def keep_states_batched(stream: StreamT[bytes]) -> None:
        async for batch in stream.take_events(batch_max, within=BATCH_WAIT_S):
            await job.take(batch)

    agent = keep_states if batch_max == 1 else keep_states_batched
    app.agent(events, name="moveline.bench")(agent)
    return app


def main() -> None:
    """Run the agent until it is stopped."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kafka", required=True)
    parser.add_argument("--redis", required=True)
    parser.add_argument("--topic", required=True)
    parser.add_argument("--events", type=int, required=True)
    parser.add_argument("--warm-up", type=int, required=True)
    parser.add_argument("--batch-max", type=int, default=1)
    given = parser.parse_args()
    mode.loop.use("uvloop")
    job = Job(Redis.from_url(given.redis), given.events, given.warm_up)
    app = make_app(given.kafka, given.topic, job, batch_max=given.batch_max)
    faust.Worker(app, loglevel="WARNING").execute_from_commandline()


if __name__ == "__main__":
    main()
