"""The near-line app without Faust: which pieces of work there are, and what a hint of one does.

A hint says that there may be something to do. What there is to do is read from Kafka and Redis:
a hint that is lost is made up for by the next, one that comes twice or late finds nothing.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec

from features.clock import now_ms
from features.errors import FeatureError, GenerationError
from features.item_statistics import ItemStatistics
from features.lifelong_store import LifelongStore
from features.nearline import SessionStore, TileStore
from features.redis import CatalogueStore, StateStore, connect
from scoring.errors import ScoringError
from scoring.triton import TritonServer
from streams.chain import checked_chain
from streams.errors import StreamError
from streams.fold import TritonFold
from streams.follower_lists import FollowerCounter, FollowerLists
from streams.kafka import KafkaException, ensure_topics, make_producer, partition_count
from streams.lifelong import Compactor
from streams.log_reader import LogReader
from streams.nearline_metrics import NearlineMetrics
from streams.pointer_follower import PointerFollower
from streams.sessions import SessionSweeper
from streams.tiles import Popularity, TileCounter

if TYPE_CHECKING:
    from collections.abc import Mapping

    from streams.nearline_config import NearlineConfig

log = logging.getLogger("moveline.nearline")

# How often hints are given. Every app gives them; those that come twice find nothing to do.
TICK_S: Final = 1.0
# One piece of work ends after this long and goes on at the next hint: Faust's consumer has to
# poll again well within its interval.
BUDGET_S: Final = 1.0


class Work(StrEnum):
    """What can be done."""

    TILES = "tiles"
    TRENDING = "trending"
    FOLLOWERS = "followers"
    STATISTICS = "statistics"
    SWEEP = "sweep"
    COMPACT = "compact"
    POINTERS = "pointers"


# Ticks between two hints of the same work. A sweep looks at some 10,000 users: every fifth tick
# it takes a fifth of a core at most, and comes round a million users in some minutes. A round of
# compaction is one too.
TICKS: Final[Mapping[Work, int]] = {
    Work.TILES: 1,
    Work.POINTERS: 1,
    Work.FOLLOWERS: 2,
    Work.SWEEP: 5,
    Work.COMPACT: 5,
    Work.TRENDING: 10,
    Work.STATISTICS: 60,
}


class Hint(msgspec.Struct, frozen=True):
    """One record of the near-line topic; `partition` is that of the events topic, for tiles."""

    work: Work
    partition: int = 0


def encode_hint(hint: Hint) -> bytes:
    """Return the hint's JSON."""
    return msgspec.json.encode(hint)


def decode_hint(raw: bytes | None) -> Hint | None:
    """Return the hint, None for what is none: nothing depends on it."""
    try:
        return msgspec.json.decode(raw or b"", type=Hint)
    except msgspec.DecodeError:
        return None


def hints_of_tick(tick: int, partitions: int) -> list[Hint]:
    """Return what is hinted at the n-th tick.

    >>> [hint.work.value for hint in hints_of_tick(1, 2)]
    ['tiles', 'tiles', 'pointers']
    """
    due = [work for work, ticks in TICKS.items() if tick % ticks == 0]
    return [
        Hint(work, partition)
        for work in due
        for partition in range(partitions if work is Work.TILES else 1)
    ]


class Widths(NamedTuple):
    """How many partitions to give hints for, and how many the topic of hints has."""

    tiles: int
    hints: int


def prepare_topics(config: NearlineConfig) -> Widths:
    """Return how wide the topics are; topics of the app that are missing are made.

    Raises:
        StreamError: the events topic does not exist, or Kafka does not answer.
    """
    chain = checked_chain(config.kafka, config.topics)
    own = {config.topics.sessions, config.topics.nearline}
    specs = config.topics.specs(chain.newest.num_partitions)
    ensure_topics(config.kafka, [spec for spec in specs if spec.name in own])
    hints = partition_count(config.kafka, config.topics.nearline)
    return Widths(chain.num_partitions_max, hints)


@dataclass
class Parts:
    """Everything that works on the servers, opened together."""

    reader: LogReader
    counters: list[TileCounter]
    popularity: Popularity
    followers: FollowerLists
    sweeper: SessionSweeper
    compactor: Compactor
    triton: TritonServer
    follower: PointerFollower
    statistics: ItemStatistics

    def close(self) -> None:
        """Give connections and files back."""
        self.reader.close()
        self.triton.close()
        self.statistics.close()

    def count(self, partition: int, *, budget_s: float) -> int:
        """Count a partition of each of the log's topics; return how many records are left."""
        mine = [one for one in self.counters if partition < (one.num_partitions or 0)]
        return sum(one.advance(partition, budget_s=budget_s) for one in mine)

    @property
    def is_over(self) -> bool:
        """Return whether the newest topic was found to have ended, at least in a partition."""
        return bool(self.counters[-1].sealed)


def open_parts(config: NearlineConfig, metrics: NearlineMetrics) -> Parts:
    """Return the parts for a generation that exists.

    Raises:
        GenerationError: no worker has claimed it yet.
        StoreError: Redis does not answer.
        StreamError: Kafka does not, or the events topic has got other partitions.
    """
    client = connect(config.redis_url)
    catalogue = CatalogueStore(client)
    rules = catalogue.recorded_config(config.generation)
    if rules is None:
        raise GenerationError(
            f"generation g{config.generation} does not exist yet: start `moveline worker`."
        )
    chain = checked_chain(config.kafka, config.topics)
    topics = config.topics.at(chain.current)
    reader = LogReader.open(config.kafka)
    # Tiles of all topics are the same ones; only the marks are apart.
    tiles = TileStore(client, config.generation)
    statistics = ItemStatistics(config.redis_url, rules)
    states = StateStore(client, config.generation, rules)
    sessions = SessionStore(client, config.generation)
    counter = FollowerCounter(states, config.half_life_h)
    triton = TritonServer(config.triton)  # connects when it is first asked
    return Parts(
        reader,
        [
            TileCounter(
                reader,
                topics.at(number).events,
                replace(tiles, source=number),
                rules,
                num_partitions=source.num_partitions,
                ends=None if source.ends is None else source.end_offsets,
                metrics=metrics,
                followers=counter,
            )
            for number, source in enumerate(chain.sources)
        ],
        Popularity(
            tiles,
            catalogue,
            chain.num_partitions_max,
            statistics,
            metrics,
            half_life_h=config.half_life_h,
        ),
        FollowerLists(counter, catalogue, chain.num_partitions_max),
        SessionSweeper(
            states,
            sessions,
            reader,
            make_producer(config.kafka),
            topics,
            chain.newest.num_partitions,
            int(config.lateness_s * 1000),
            metrics,
        ),
        Compactor(LifelongStore.of(states), sessions, TritonFold(triton), metrics),
        triton,
        PointerFollower(reader, config.topics.control, catalogue, metrics),
        statistics,
    )


@dataclass
class Nearline:
    """Follows hints, one at a time.

    Attributes:
        started_at: when each piece of work was last begun (monotonic seconds).
        done_at_ms: when each last ended well.
        last_error: the newest failure, for the status page.
    """

    config: NearlineConfig
    widths: Widths
    metrics: NearlineMetrics = field(default_factory=NearlineMetrics)
    parts: Parts | None = None
    started_at: dict[Hint, float] = field(default_factory=dict)
    done_at_ms: dict[Hint, int] = field(default_factory=dict)
    left: dict[int, int] = field(default_factory=dict)
    last_error: str | None = None

    def follow(self, hint: Hint) -> bool:
        """Do what a hint is about; return whether anything was tried.

        A server that is away, or another app that was faster, is written down and made up for by
        the next hint: failing here would only make Faust restart its agent.
        """
        self.metrics.hints.labels(hint.work).inc()
        if not 0 <= hint.partition < self.widths.tiles or self._is_overtaken(hint):
            self.metrics.overtaken.labels(hint.work).inc()
            return False
        self.started_at[hint] = time.monotonic()
        try:
            with self.metrics.seconds.labels(hint.work).time():
                self._do(hint)
        except (FeatureError, StreamError, ScoringError, KafkaException) as error:
            log.warning("%s: %s", hint.work, error)
            self.metrics.failures.labels(hint.work).inc()
            self.last_error = f"{hint.work}: {error}"
        else:
            self.done_at_ms[hint] = now_ms()
        return True

    def _is_overtaken(self, hint: Hint) -> bool:
        """Return whether the same was begun so lately that nothing can have been missed since."""
        before = self.started_at.get(hint)
        return before is not None and time.monotonic() - before < TICKS[hint.work] * TICK_S / 2

    def _do(self, hint: Hint) -> None:
        if self.parts is None:
            self.parts = open_parts(self.config, self.metrics)
        parts = self.parts
        if hint.work is Work.TILES:
            self.left[hint.partition] = parts.count(hint.partition, budget_s=BUDGET_S)
            if parts.is_over:
                # The log goes on in another topic, now or soon; what is open does not know it.
                self.close()
                self.widths = prepare_topics(self.config)
        elif hint.work is Work.SWEEP:
            parts.sweeper.step(budget_s=BUDGET_S)
        elif hint.work is Work.COMPACT:
            parts.compactor.step(budget_s=BUDGET_S)
        elif hint.work is Work.TRENDING:
            parts.popularity.put_trending()
        elif hint.work is Work.FOLLOWERS:
            parts.followers.put()
        elif hint.work is Work.STATISTICS:
            parts.popularity.push_statistics()
        else:
            parts.follower.heal()

    def status(self) -> dict[str, Any]:
        """Return what the status page shows; touches no server."""
        return {
            "app": self.config.app_id,
            "generation": f"g{self.config.generation}",
            "partitions": self.widths.tiles,
            "not_yet_counted": {str(p): left for p, left in sorted(self.left.items())},
            "done_at_ms": {f"{hint.work}[{hint.partition}]": at for hint, at in self._done()},
            "last_error": self.last_error,
        }

    def _done(self) -> list[tuple[Hint, int]]:
        return sorted(
            self.done_at_ms.items(), key=lambda entry: (entry[0].work, entry[0].partition)
        )

    def close(self) -> None:
        """Give connections and files back."""
        if self.parts is not None:
            self.parts.close()
            self.parts = None
