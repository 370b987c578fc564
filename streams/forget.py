"""Forgets a user: a record in the log first, then everything that was built from earlier ones.

1 the forget is in the events topic, in the user's own partition;
2 every generation's worker has applied it: the state starts anew, position and ordinals stay;
3 the near-line app's notes of the user's sessions are removed;
4 the lake has the forget, and no file that counts holds an earlier event of the user.

A crash after step 1: the states are forgotten all the same, and running the command again does the
rest (and forgets what came in between). Nothing brings the user back: a redelivery, a stale Redis
and a replay all come to the forget.
"""

from __future__ import annotations

import datetime as dt
import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from features import lake
from features.clock import now_ms
from features.config import FORGET_ACTION
from features.events import Event, encode_event
from features.forget import (
    Kept,
    drop_traces,
    generation_of,
    kept_of,
    keys_of,
    last_snapshot_ms,
)
from features.generations import Generations
from features.lake_forget import count_earlier, forget_user
from features.lake_revisions import KEPT_MS, Place, find_user, remove_old_revisions
from streams.chain import known_chain
from streams.errors import DeliveryError, ForgetError
from streams.kafka import make_producer, topic_settings, watermarks
from streams.topics import RETENTION_MS

if TYPE_CHECKING:
    from pathlib import Path

    from features.config import StateConfig
    from streams.generations import Installation

# How long the broker may take to acknowledge the forget.
DELIVERY_TIMEOUT_S: Final = 30.0
# How long workers and the lake's sink, which are seconds behind, may take to come to the forget.
CATCH_UP_TIMEOUT_S: Final = 120.0
_POLL_S: Final = 0.2


@dataclass(frozen=True)
class Remains:
    """What still names the user, and until when."""

    where: str
    what: str
    until: str


@dataclass
class Forgotten:
    """What was done, and what was found when it was searched for afterwards.

    Attributes:
        offset: of the forget in the user's partition of the events topic.
        kept: what each generation holds now: a row without events, or with later ones.
        num_rewritten: lake revisions made.
        is_clean: whether nothing earlier was found where it could still be read by the system.
    """

    user_id: int
    partition: int
    offset: int
    kept: list[Kept] = field(default_factory=list)
    num_traces: int = 0
    num_rewritten: int = 0
    remains: list[Remains] = field(default_factory=list)
    is_clean: bool = True


@dataclass(frozen=True, kw_only=True)
class Forgetting:
    """Where a user is to be forgotten.

    Attributes:
        here: topics and generations.
        lake: folder of the event log; None if there is none.
        at_once: remove the files that a rewrite replaced, whoever may be reading them.
        timeout_s: for workers and sink to come to the forget.
    """

    here: Installation
    lake: Path | None
    at_once: bool = False
    timeout_s: float = CATCH_UP_TIMEOUT_S

    def forget(self, user_id: int) -> Forgotten:
        """Return once nothing of the user's earlier events is read by any part.

        Raises:
            ForgetError: a generation that holds the user has no worker, or somebody does not come
                to the forget in time. Running it again goes on.
            StreamError, FeatureError: Kafka, Redis or the lake refused.
        """
        self._refuse_several_topics()
        followed = self._followed(user_id)
        done = Forgotten(user_id, *self._send(user_id))
        self._await_states(done, followed)
        for generation in Generations(self.here.client).recorded():
            done.num_traces += drop_traces(self.here.client, generation, user_id)
        self._rewrite_lake(done)
        self._list_remains(done)
        return done

    def _refuse_several_topics(self) -> None:
        chain = known_chain(self.here.kafka, self.here.topics)
        if chain.retired or chain.newest.sealing is not None:
            raise ForgetError(
                f"the event log has gone on in {self.here.topics.at(chain.current).events}, or is "
                "about to, and a user cannot be forgotten over several topics yet. Nothing was "
                "changed."
            )

    def _followed(self, user_id: int) -> list[int]:
        """Return the generations that will come to the forget; raise if another has the user."""
        found = self.here.list()
        for info in found:
            kept = kept_of(self.here.client, info.number, info.config, user_id)
            if kept is not None and not info.is_followed:
                raise ForgetError(
                    f"g{info.number} holds {kept.num_events} events of user {user_id} and no "
                    f"worker follows it: `moveline drop g{info.number}`, or start its worker, "
                    "then run the command again. Nothing was changed."
                )
        return [info.number for info in found if info.is_followed]

    def _send(self, user_id: int) -> tuple[int, int]:
        """Append the forget; return its partition and offset."""
        event = Event(
            event_id=f"forget-{uuid.uuid4()}",
            user_id=user_id,
            item_id=0,
            action=FORGET_ACTION,
            event_time_ms=0,
        )
        placed: list[tuple[int, int]] = []
        failed: list[object] = []
        producer = make_producer(self.here.kafka)
        producer.produce(
            self.here.topics.events,
            encode_event(event),
            b"%d" % user_id,
            on_delivery=lambda error, message: (
                failed.append(error)
                if error
                else placed.append((message.partition() or 0, message.offset() or 0))
            ),
        )
        producer.flush(DELIVERY_TIMEOUT_S)
        if not placed:
            raise DeliveryError(
                f"the forget of user {user_id} was not acknowledged within "
                f"{DELIVERY_TIMEOUT_S:g} s ({failed or 'no answer'}): run the command again."
            )
        return placed[0]

    def _await_states(self, done: Forgotten, generations: list[int]) -> None:
        """Wait until the user's row in each of these stands at the forget or after it."""
        deadline = time.monotonic() + self.timeout_s
        recorded = Generations(self.here.client).recorded()
        while True:
            done.kept = self._kept(recorded, done.user_id)
            reached = {kept.generation for kept in done.kept if kept.offset >= done.offset}
            behind = [number for number in generations if number not in reached]
            if not behind:
                return
            if time.monotonic() > deadline:
                raise ForgetError(
                    f"g{behind[0]} has not come to offset {done.offset} of "
                    f"{self.here.topics.events}[{done.partition}] within {self.timeout_s:g} s: "
                    "see `moveline status`, then run the command again."
                )
            time.sleep(_POLL_S)

    def _kept(self, recorded: dict[int, StateConfig], user_id: int) -> list[Kept]:
        found = (
            kept_of(self.here.client, generation, config, user_id)
            for generation, config in recorded.items()
        )
        return [kept for kept in found if kept is not None]

    def _rewrite_lake(self, done: Forgotten) -> None:
        if self.lake is None:
            return
        topic = self.here.topics.events
        deadline = time.monotonic() + self.timeout_s
        while (lake.next_offset(self.lake, topic, done.partition) or 0) <= done.offset:
            if time.monotonic() > deadline:
                raise ForgetError(
                    f"the lake under {self.lake} has not come to offset {done.offset} of "
                    f"{topic}[{done.partition}] within {self.timeout_s:g} s: start "
                    "`moveline lake`, then run the command again."
                )
            time.sleep(_POLL_S)
        place = Place(self.lake, topic, done.partition)
        made = forget_user(
            place, done.user_id, at=done.offset, config=self._live_rules(), now_ms=now_ms()
        )
        done.num_rewritten += made is not None
        if self.at_once:
            remove_old_revisions(place, before_ms=now_ms())

    def _live_rules(self) -> StateConfig:
        recorded = Generations(self.here.client).recorded()
        live = self.here.live()
        if live not in recorded:
            live = min(recorded, default=None)
        if live is None:
            raise ForgetError("no generation is recorded in Redis: start a worker first.")
        return recorded[live]

    def _list_remains(self, done: Forgotten) -> None:
        """Search again, and say what is left where, and until when."""
        self._find_in_redis(done)
        self._find_in_lake(done)
        self._find_in_topics(done)

    def _find_in_redis(self, done: Forgotten) -> None:
        generations = {kept.generation for kept in done.kept}
        for kept in done.kept:
            what = f"position, ordinal {kept.next_ordinal} and {kept.num_events} later events"
            done.remains.append(
                Remains(f"Redis g{kept.generation}", what, "the generation is dropped")
            )
            done.is_clean &= kept.offset > done.offset or not kept.num_events
        strange = [
            key
            for key in keys_of(self.here.client, done.user_id)
            if generation_of(key) not in generations
        ]
        done.remains += [Remains(f"Redis {key}", "unknown here", "deleted") for key in strange]
        done.is_clean &= not strange
        saved_ms = last_snapshot_ms(self.here.client)
        if saved_ms:
            what = f"the snapshot of {dt.datetime.fromtimestamp(saved_ms / 1000, dt.UTC):%F %T} UTC"
            done.remains.append(Remains("Redis' disk", what, "the next: redis-cli bgsave"))

    def _find_in_lake(self, done: Forgotten) -> None:
        if self.lake is None:
            return
        topic = self.here.topics.events
        place = Place(self.lake, topic, done.partition)
        num_earlier = count_earlier(place, done.user_id, at=done.offset)
        done.is_clean &= not num_earlier
        until = f"`moveline compact`, {KEPT_MS // 3_600_000} h from now; at once: --at-once"
        for found in find_user(self.lake, topic, done.user_id):
            if not found.is_current:
                what = f"{found.num_events} events in a file that no new reader takes"
                done.remains.append(Remains(f"lake {found.file.path}", what, until))

    def _find_in_topics(self, done: Forgotten) -> None:
        topics = self.here.topics
        names = (topics.events, topics.sessions, topics.dead_letters, topics.feature_log)
        settings = topic_settings(self.here.kafka, names)
        for name in names:
            retention_ms = int(settings[name].get(RETENTION_MS, "-1"))
            until = (
                "for ever (retention.ms is -1): shorten it with kafka-configs.sh"
                if retention_ms < 0
                else f"{retention_ms // 3_600_000} h after it was sent"
            )
            what = "closed sessions" if name == topics.sessions else "records"
            if name == topics.events:
                low, _ = watermarks(self.here.kafka, name)[done.partition]
                what = f"records in partition {done.partition}, offsets {low} to {done.offset - 1}"
            done.remains.append(Remains(f"topic {name}", f"{what} keyed {done.user_id}", until))
