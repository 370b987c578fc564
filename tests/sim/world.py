"""One seed's world: what may happen, when, and what must be true after every effect."""

from __future__ import annotations

import random
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import pyarrow.parquet as pq

from features.catalogue import Item, encode_item
from features.chunks import FIRST_FIELD
from features.events import domain_hash
from features.lake import file_name, partition_folder
from streams.chunk_cap import ChunkCap, LakeEnds
from streams.dead_letters import DeadLetterProducer
from streams.effects import Effects
from streams.errors import DeadLetterError, WorkerStuckError
from streams.kafka import KafkaConfig, KafkaException
from streams.lake_file import LakeRow, to_table
from streams.metrics import WorkerMetrics
from streams.processor import Processor
from streams.topics import Topics
from streams.worker import Worker, WorkerConfig, _Run
from tests.sim.broker import SimBroker, SimConsumer, SimLog, SimMessage, SimProducer
from tests.sim.store import NUM_BUCKETS, SimRedis, SimStore
from tests.sim.traffic import CONFIG, Traffic

if TYPE_CHECKING:
    from collections.abc import Callable

    from features.redis import BucketWrite
    from tests.sim.traffic import UserLog

TOPICS: Final = Topics("sim")
ITEMS: Final = TOPICS.items, 0
# Everything comes to rest within so many turns of every worker once nothing fails any more.
ROUNDS_MAX: Final = 300
ROUNDS_TOLD: Final = 10
# Events are dated around here; any moment will do.
_START_MS: Final = 1_700_000_000_000
# A paused worker may be paused within another's pause, not deeper: traces stay readable.
_DEPTH_MAX: Final = 2
_METRICS: Final = WorkerMetrics()


class BrokenLawError(AssertionError):
    """Something that must be true was not."""


class Crash(BaseException):
    """The worker's process is gone."""


@dataclass(frozen=True)
class Faults:
    """How likely each thing is in one seed; many seeds leave most of them out."""

    crash: float
    pause: float
    lost_reply: float
    broker_fails: float
    restore: float
    redis_mode: float
    expire: float
    rebalance: float
    retention: float


def draw_faults(rng: random.Random) -> Faults:
    """Return a seed's own mixture."""

    def some(share: float, most: float) -> float:
        return rng.uniform(most / 5, most) if rng.random() < share else 0.0

    return Faults(
        crash=some(0.5, 0.03),
        pause=some(0.6, 0.05),
        lost_reply=some(0.4, 0.1),
        broker_fails=some(0.2, 0.02),
        restore=some(0.5, 0.08),
        redis_mode=some(0.3, 0.1),
        expire=some(0.5, 0.08),
        rebalance=some(0.6, 0.1),
        retention=some(0.3, 0.1),
    )


def draw_chunks_max(seed: int, faults: Faults) -> int | None:
    """Return the cap on waiting chunks, where there is one.

    A source of its own: seeds without a cap stay what they were.
    """
    rng = random.Random(f"cap-{seed}")
    return rng.randint(1, 2) if faults.retention and rng.random() < 0.7 else None


@dataclass
class SimWorker:
    """One process of the hot worker; `run` is None while it is down."""

    world: World
    name: str
    rng: random.Random
    run: _Run | None = None
    consumer: SimConsumer = field(init=False)
    store: SimStore = field(init=False)
    is_busy: bool = False

    def start(self) -> None:
        """Start the process; the one before it under this name has left the group."""
        world = self.world
        self.store = store = world.make_store(self)
        self.consumer = SimConsumer(world.broker, self)
        worker = Worker(
            kafka=KafkaConfig("none"),
            topics=TOPICS,
            store=cast("Any", self.store),
            catalogue=cast("Any", self.store),
            config=WorkerConfig(
                batch_max=self.rng.choice([2, 5, 20]), lake=world.lake, instance=self.name
            ),
            metrics=_METRICS,
            clock=world.now_s,
        )
        letters = DeadLetterProducer(cast("Any", SimProducer(world.broker, self)), TOPICS)
        cap = None
        if world.chunks_max is not None:
            ends = LakeEnds(world.lake, TOPICS.events)
            cap = ChunkCap(store, ends, _METRICS, world.chunks_max, clock=world.now_s)
        processor = Processor(store, CONFIG, chunk_cap=cap)
        effects = Effects(processor, store, letters, _METRICS, clock=world.now_ms)
        self.run = _Run(worker, effects)
        self.consumer.subscribe(
            [TOPICS.events, TOPICS.items],
            on_assign=self.run.on_assign,
            on_revoke=self.run.on_revoke,
            on_lost=self.run.on_lost,
            on_commit=self.run.on_commit,
        )

    def turn(self) -> None:
        """Let the worker do one turn, or die in it."""
        run = self.run
        assert run is not None
        self.guarded(lambda: run.turn(cast("Any", self.consumer)))

    def finish(self) -> None:
        """Stop the worker as a signal does."""
        run = self.run
        assert run is not None

        def leave() -> None:
            run.finish(cast("Any", self.consumer))
            self.consumer.close()
            self.run = None

        self.guarded(leave)

    def guarded(self, act: Callable[[], None]) -> None:
        """Run some of the worker's code; what ends its process ends it here."""
        self.is_busy = True
        try:
            act()
        except Crash:
            self.world.say(f"{self.name} CRASHES")
            self.run = None
        except (KafkaException, DeadLetterError, WorkerStuckError) as error:
            self.world.say(f"{self.name} exits: {error}")
            self.run = None
            self._close()
        finally:
            self.is_busy = False

    def _close(self) -> None:
        try:
            self.consumer.close()
        except Crash:
            self.world.say(f"{self.name} CRASHES while closing")

    def at(self, point: str) -> None:
        """Something may happen to this worker here."""
        self.world.at(self, point)

    def lose_reply(self) -> bool:
        world = self.world
        lost = not world.is_calm and self.rng.random() < world.faults.lost_reply
        if lost:
            world.say(f"{self.name} does not get the reply")
        return lost

    def fails(self) -> bool:
        return not self.world.is_calm and self.rng.random() < self.world.faults.broker_fails

    def num_fetched(self, count: int) -> int:
        return count if self.world.is_calm else self.rng.randint(0, count)

    def is_refused(self) -> bool:
        return self.rng.random() < 0.7

    def written(self, write: BucketWrite) -> None:
        self.world.check_write(self, write)

    def dropped(self, user: int) -> None:
        self.world.check_dropped(self, user)


class World:
    """Everything there is: the log, Redis, the lake, the workers, the time."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = rng = random.Random(seed)
        self.faults = draw_faults(rng)
        self.lake = folder
        num_partitions = rng.randint(1, 3)
        self.traffic = Traffic(
            rng,
            num_partitions,
            num_users=rng.randint(2, 12),
            garbage_share=rng.choice([0.0, 0.05, 0.2]),
            late_share=rng.choice([0.0, 0.1, 0.4]),
            repeat_share=rng.choice([0.0, 0.1, 0.3]),
        )
        self.events = [(TOPICS.events, partition) for partition in range(num_partitions)]
        self.broker = SimBroker(rng, {place: SimLog() for place in [*self.events, ITEMS]})
        self.broker.on_commit = self.check_commit
        self.redis = SimRedis()
        self.workers = [SimWorker(self, f"w{i}", rng) for i in range(rng.randint(1, 3))]
        self.chunks_max = draw_chunks_max(seed, self.faults)
        self.lake_ends = dict.fromkeys(range(num_partitions), 0)
        self.lost_letters: set[tuple[int, int]] = set()
        self.time_s = 0.0
        self.depth = 0
        self.num_rounds = 0
        self.is_calm = False
        self.trace: list[str] = []

    def make_store(self, worker: SimWorker) -> SimStore:
        """Return a new connection to Redis."""
        return SimStore(self.redis, CONFIG, worker)

    def now_s(self) -> float:
        """Return the virtual time."""
        return self.time_s

    def now_ms(self) -> int:
        """Return the virtual time as producers and the broker date things."""
        return _START_MS + int(self.time_s * 1_000)

    def say(self, what: str) -> None:
        """Add a line to the trace; waiting for ever is told once."""
        if self.num_rounds > ROUNDS_TOLD:
            return
        self.trace.append(f"{self.time_s:8.2f} {'    ' * self.depth}{what}")

    # What happens.

    def live(self, num_actions: int) -> None:
        """Let that many things happen, with everything that happens in between."""
        for _ in range(num_actions):
            self.act()

    def act(self) -> None:
        """One thing happens."""
        rng, faults = self.rng, self.faults
        self.time_s += rng.choice([0.01, 0.1, 0.6, 2.0])
        kind = rng.random()
        for share, action in (
            (faults.restore, self.restore),
            (faults.redis_mode, self.switch_redis),
            (faults.expire, self.expire),
            (faults.rebalance, self.rebalance),
            (faults.retention, self.retain),
            (0.02, self.finish_one),
            (0.03, self.produce_item),
            (0.25, self.produce),
        ):
            if kind < share:
                action()
                return
            kind -= share
        self.run_one()

    def at(self, worker: SimWorker, point: str) -> None:
        """The worker is about to do `point`, or has just done it."""
        self.say(f"{worker.name} {point}")
        if self.is_calm:
            return
        rng = self.rng
        kind = rng.random()
        if kind < self.faults.crash:
            raise Crash
        if kind < self.faults.crash + self.faults.pause and self.depth < _DEPTH_MAX:
            self.say(f"{worker.name} is paused")
            self.depth += 1
            self.live(rng.randint(1, 8))
            self.depth -= 1
            self.say(f"{worker.name} wakes up")

    def idle_workers(self) -> list[SimWorker]:
        """Return the workers that are not in the middle of something."""
        return [worker for worker in self.workers if not worker.is_busy]

    def run_one(self) -> None:
        """A worker has its turn; one that is down starts."""
        idle = self.idle_workers()
        if not idle:
            return
        worker = self.rng.choice(idle)
        if worker.run is None:
            self.start(worker)
        else:
            worker.turn()

    def start(self, worker: SimWorker) -> None:
        """Start a worker; a dead one of its name is thrown out first."""
        if hasattr(worker, "consumer") and worker.consumer.is_member:
            self.broker.leave(worker.consumer)
        self.say(f"{worker.name} starts")
        worker.start()

    def finish_one(self) -> None:
        """A worker is stopped by its operator."""
        running = [worker for worker in self.idle_workers() if worker.run is not None]
        if running:
            worker = self.rng.choice(running)
            self.say(f"{worker.name} is asked to stop")
            worker.finish()

    def produce(self) -> None:
        """Some records are appended, sometimes after offsets that hold none."""
        for _ in range(self.rng.randint(1, 8)):
            log, sent = self.traffic.make(self.now_ms())
            place = TOPICS.events, log.partition
            partition = self.broker.logs[place]
            offset = partition.high + (self.rng.random() < 0.05)
            message = SimMessage(place, offset, self.now_ms(), sent.key, sent.value)
            partition.append(message)
            self.traffic.place(log, sent, offset, self.now_ms())
        self.say(f"produced; ends {[self.broker.logs[place].high for place in self.events]}")

    def produce_item(self) -> None:
        """A catalogue entry is appended."""
        log = self.broker.logs[ITEMS]
        item = Item(item_id=self.rng.randint(1, 3), name=f"name {log.high}")
        log.append(
            SimMessage(ITEMS, log.high, self.now_ms(), b"%d" % item.item_id, encode_item(item))
        )
        self.say(f"produced {item}")

    def restore(self) -> None:
        """Redis comes back as it was at some earlier moment, often a recent one."""
        newest = len(self.redis.journal)
        oldest = 0 if self.rng.random() < 0.2 else max(0, newest - 30)
        to = self.rng.randint(oldest, newest)
        self.redis.restore(to)
        while self.is_catalogue_torn():
            self.redis.restore(len(self.redis.journal) - 1)
        is_noticed = self.rng.random() < 0.4
        for worker in self.workers:
            if worker.run is not None:
                worker.store.is_broken = is_noticed
        self.say(f"REDIS goes back from command {newest} to {to}, connections broken: {is_noticed}")

    def is_catalogue_torn(self) -> bool:
        """Return whether the catalogue lacks entries that its position says it has.

        Entries and position are several commands (streams/items.py), so for an instant that a
        stale writer mends by itself this can be so. A snapshot of that very instant is left out:
        what restoring one would need is one command for both.
        """
        read = self.redis.data.get(("items-read", 0), 0)
        newest: dict[bytes | None, list[bytes | None]] = {}
        for message in self.broker.logs[ITEMS].messages:
            values = newest.setdefault(message.raw_key, [])
            if isinstance(read, int) and message.at < read:
                values.clear()
            values.append(message.raw_value)
            if isinstance(read, int) and message.at >= read and len(values) == 1:
                values.append(None)
        return any(
            self.redis.data.get(("item", int(key or b""))) not in values
            for key, values in newest.items()
        )

    def switch_redis(self) -> None:
        """Redis goes away, is full, or is well again."""
        self.redis.is_away = self.rng.random() < 0.3
        self.redis.is_full = self.rng.random() < 0.3
        self.say(f"REDIS away={self.redis.is_away} full={self.redis.is_full}")

    def expire(self) -> None:
        """The group gives up on a member: dead, paused in the middle of something, or just slow."""
        if self.broker.members:
            member = self.rng.choice(self.broker.members)
            self.broker.leave(member)
            self.say(f"GROUP expires {self.name_of(member)}; {self.owners()}")

    def rebalance(self) -> None:
        """Partitions move."""
        self.broker.rebalance()
        self.say(f"GROUP rebalances; {self.owners()}")

    def owners(self) -> str:
        """Return who owns what."""
        held = {
            f"{place[0]}[{place[1]}]": self.name_of(owner)
            for place, owner in self.broker.owners.items()
        }
        return str(held)

    def name_of(self, member: SimConsumer | None) -> str:
        """Return a member's name."""
        return "nobody" if member is None else cast("SimWorker", member.hooks).name

    def retain(self) -> None:
        """The lake takes more of a partition, then Kafka forgets some of what the lake has."""
        partition = self.rng.randrange(len(self.events))
        log = self.broker.logs[TOPICS.events, partition]
        start = self.lake_ends[partition]
        end = self.rng.randint(start, log.high)
        if end > start:
            rows = [
                LakeRow(*row)
                for row in self.traffic.storable.get(partition, [])
                if start <= row[0] < end
            ]
            folder = partition_folder(self.lake, TOPICS.events, partition)
            folder.mkdir(parents=True, exist_ok=True)
            pq.write_table(to_table(rows), folder / file_name(start, end - 1))
            self.lake_ends[partition] = end
        low = self.rng.randint(log.low, max(log.low, end))
        self.forget_letters(partition, low)
        log.low = low
        self.say(f"LAKE has partition {partition} before {end}, Kafka from {low} on")

    def forget_letters(self, partition: int, low: int) -> None:
        """What is no event and was never read goes with Kafka: the lake keeps events only."""
        sent = {letter.at for letter in self.broker.dead_letters}
        self.lost_letters |= {
            at for at in self.traffic.invalid if at[0] == partition and at[1] < low
        } - sent

    # What must be true.

    def check_write(self, worker: SimWorker, write: BucketWrite) -> None:
        """A bucket was written: its rows are those of the events before its checkpoint."""
        self.say(
            f"{worker.name} wrote bucket {write.bucket} of partition {write.partition}: "
            f"{write.expected} -> {write.advance_to}, users {list(write.rows)}"
        )
        self.check_bucket(write.bucket, write.partition)

    def check_bucket(self, bucket: int, partition: int) -> None:
        """Rows and chunks of a bucket are what its checkpoint says."""
        at = self.redis.checkpoint(bucket, 0, partition)
        end = self.broker.logs[TOPICS.events, partition].high
        self.must(at <= end, f"bucket {bucket} of partition {partition} at {at}, log ends at {end}")
        for log in self.traffic.by_place.get((bucket, partition), []):
            self.check_user(log, at)

    def check_user(self, log: UserLog, at: int) -> None:
        """A user's row and chunks are those of the user's events before an offset."""
        expected = log.below(at)
        about = f"user {log.user} of partition {log.partition} before offset {at}"
        self.must(self.redis.row(log.user) == expected.row, f"row of {about}")
        if not log.has_chunks:
            return
        held = self.redis.chunks(log.user)
        first = int(held.pop(FIRST_FIELD, 0))
        kept = {number: data for number, data in expected.chunks.items() if int(number) >= first}
        self.must(held == kept, f"chunks of {about}")
        if first:
            self.must(len(kept) >= (self.chunks_max or 0), f"too few chunks of {about}")
            end = self.lake_ends[log.partition]
            self.must(expected.ends[first - 1] < end, f"chunks dropped before {end} of {about}")

    def check_dropped(self, worker: SimWorker, user: int) -> None:
        """Chunks of a user were dropped: those that the lake has, and no others."""
        self.say(f"{worker.name} dropped chunks of {user}")
        for (bucket, partition), logs in self.traffic.by_place.items():
            if any(log.user == user for log in logs):
                self.check_bucket(bucket, partition)

    def check_commit(self, place: tuple[str, int]) -> None:
        """Kafka was told an offset: what is no event before it is kept."""
        if place == ITEMS:
            return
        end = self.broker.committed[place]
        missing = self.missing_letters(place[1], end)
        self.must(not missing, f"committed {place} {end} without dead letters {missing}")

    def missing_letters(self, partition: int, end: int) -> list[tuple[int, int]]:
        """Return which invalid records before an offset are in no dead letter."""
        kept = {letter.at for letter in self.broker.dead_letters} | self.lost_letters
        invalid = self.traffic.invalid
        return sorted(at for at in invalid.keys() - kept if at[0] == partition and at[1] < end)

    def must(self, is_true: bool, what: str) -> None:  # noqa: FBT001 - reads as a sentence
        """Raise unless a law holds."""
        if not is_true:
            raise BrokenLawError(what)

    # How it ends.

    def come_to_rest(self) -> None:
        """Nothing fails any more: everything is applied, everywhere, soon."""
        self.say("-- nothing fails from here on")
        self.is_calm = True
        self.redis.is_away = self.redis.is_full = False
        for worker in self.workers:
            if worker.run is None:
                self.start(worker)
        for self.num_rounds in range(ROUNDS_MAX):
            for worker in self.workers:
                self.time_s += 2.0
                worker.turn()
                self.must(worker.run is not None, f"{worker.name} exits though nothing fails")
            if not self.what_is_left():
                return
        self.must(is_true=False, what=f"never done: {self.what_is_left()}")

    def what_is_left(self) -> str:
        """Return what is not as it should be at rest, empty when all is well."""
        for place in self.events:
            partition, end = place[1], self.broker.logs[place].high
            for bucket in range(NUM_BUCKETS):
                at = self.redis.checkpoint(bucket, 0, partition)
                if at != end:
                    return f"bucket {bucket} of partition {partition} at {at}, log ends at {end}"
            if self.broker.committed.get(place) != end:
                return f"{place} committed {self.broker.committed.get(place)}, ends at {end}"
        items = self.broker.logs[ITEMS].messages
        for key, item in {message.raw_key: message for message in items}.items():
            held = self.redis.data.get(("item", int(key or b"")))
            if held != item.raw_value:
                return f"item {key!r} is {held!r}, expected {item.raw_value!r}"
        for text in self.traffic.domains.values():
            if self.redis.data.get(("domain", domain_hash(text))) != text:
                return f"domain {text} is not in Redis"
        return ""

    def check_everything(self) -> None:
        """All rows, chunks and dead letters are exactly what the log says."""
        for place in self.events:
            for bucket in range(NUM_BUCKETS):
                self.check_bucket(bucket, place[1])
            missing = self.missing_letters(place[1], self.broker.logs[place].high)
            self.must(not missing, f"no dead letters of {missing}")
        for letter in self.broker.dead_letters:
            sent = self.traffic.invalid.get(letter.at)
            self.must(sent is not None, f"dead letter {letter.at} {letter.reason} is an event")
            if sent is not None:
                kept = letter.key, letter.value
                self.must(kept == (sent.key, sent.value), f"dead letter {letter.at} is {kept}")
        held = {key[1] for key in self.redis.data if key[0] == "row"}
        known = {log.user for log in self.traffic.users if log.events}
        self.must(held == known, f"rows of {held ^ known}")


def run_world(world: World) -> None:
    """Let a world live, come to rest, and look at it; then, silently, Redis goes back."""
    rng = world.rng
    world.live(rng.randint(20, 90))
    world.come_to_rest()
    world.check_everything()
    if world.faults.restore:
        world.restore()
        world.come_to_rest()
        world.check_everything()
    for worker in world.workers:
        worker.finish()
    world.check_everything()


class SeedFailedError(AssertionError):
    """A seed broke a law; the message is the whole story."""

    def __init__(self, seed: int, world: World, error: BaseException) -> None:
        story = "\n".join(world.trace[-400:])
        super().__init__(f"{story}\nseed {seed}: {type(error).__name__}: {error}")
        self.seed = seed
        self.cause = f"{type(error).__name__}: {error}"


def run_seed(seed: int) -> World:
    """Return the world of a seed after it came to rest.

    Raises:
        SeedFailedError: a law was broken, or the code under test raised what it must not.
    """
    with tempfile.TemporaryDirectory(prefix="moveline-sim-") as folder:
        world = World(seed, Path(folder))
        try:
            run_world(world)
        except Exception as error:
            raise SeedFailedError(seed, world, error) from error
    return world
