"""Two generations side by side: which users are equal, which differ, and in what.

Under the same rules rows are compared byte for byte. Under other rules bytes differ by nature;
compared is then what both define: events accepted, the session, and the newest events both hold.
"""

from __future__ import annotations

import time
from collections import Counter
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from features.chunks import ChunkStore, Waiting
from features.generations import Generations
from features.keys import NUM_BUCKETS, bucket_of
from features.redis import WRITTEN
from features.row import FORGET, FORMATS, ROW_FORMAT, RowFormat, decode_row
from features.state import EMPTY_STATE, UserState, rebuild_window
from streams.event_log import num_missing
from streams.processor import Processor, States
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from threading import Event as StopEvent

    from features.config import StateConfig
    from features.redis import BucketWrite, StateStore
    from streams.event_log import EventLog, Keep
    from streams.micro_batch import MicroBatch
    from streams.replay import ReplayRequest

_Rules = tuple["StateConfig", "StateConfig"]
# Up to where each bucket of a topic's partition, (source, partition), is applied; and by side.
Applied = dict[tuple[int, int], list[int]]
_Applied = tuple[Applied, Applied]

# Differing users that are shown; the others are counted.
SHOWN_MAX: Final = 10
# Live users move on while they are compared. Those that did are looked at again, this often.
ROUNDS_MAX: Final = 6
_ROUND_S: Final = 1.0
# How long a round waits for the live workers to reach the end that the replay has reached: they
# bring idle buckets up every few seconds.
_LIVE_WAIT_S: Final = 8.0
_POLL_S: Final = 0.05
# Rows read from Redis at once.
_ROWS: Final = 500


@dataclass(frozen=True)
class Held:
    """What a generation has of one user: row and waiting chunks.

    Attributes:
        first: chunks before it are marked as having left for the lake.
    """

    row: bytes
    chunks: Mapping[int, bytes]
    first: int = 0

    def missing_chunks(self) -> list[int]:
        """Return the chunks that are neither there nor marked, or there although marked."""
        return Waiting(self.first, dict(self.chunks)).missing(decode_row(self.row).num_chunks)


@dataclass
class MemoryStates:
    """`streams.processor.States` for one writer and a sample of users: nothing leaves the process.

    There is nothing to compare-and-set: nobody else writes here.
    """

    config: StateConfig
    row_format: RowFormat = FORMATS[ROW_FORMAT]
    rows: dict[int, bytes] = field(default_factory=dict)
    chunks: dict[int, dict[int, bytes]] = field(default_factory=dict)
    checkpoints: dict[tuple[int, int], list[int]] = field(default_factory=dict)

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]:
        """Return whole states, EMPTY_STATE for users that have none."""
        window = self.config.dedup_window
        return {
            user: rebuild_window(decode_row(row), window) if row is not None else EMPTY_STATE
            for user in user_ids
            for row in [self.rows.get(user)]
        }

    def write_buckets(self, writes: Iterable[BucketWrite]) -> list[int]:
        """Write every bucket."""
        replies = []
        for write in writes:
            for user, row in write.rows.items():
                kept = self.rows[user][: row.keep] if row.keep >= 0 else b""
                self.rows[user] = kept + row.data
                numbers = map(int, row.chunks[::2])
                chunks = dict(zip(numbers, row.chunks[1::2], strict=True))
                if row.keep == FORGET:
                    self.chunks.pop(user, None)
                self.chunks.setdefault(user, {}).update(chunks)
            self._held(write.source, write.partition)[write.bucket] = write.advance_to
            replies.append(WRITTEN)
        return replies

    def read_checkpoints(self, source: int, partitions: Sequence[int]) -> dict[int, list[int]]:
        """Return each partition's next offset by bucket, -1 where there is none."""
        return {partition: list(self._held(source, partition)) for partition in partitions}

    def _held(self, source: int, partition: int) -> list[int]:
        return self.checkpoints.setdefault((source, partition), [-1] * NUM_BUCKETS)

    def held(self, user_ids: Iterable[int]) -> dict[int, Held]:
        """Return what there is of these users."""
        return {
            user: Held(self.rows[user], self.chunks.get(user, {}))
            for user in user_ids
            if user in self.rows
        }


@dataclass(kw_only=True)
class Comparison:
    """How two generations compare.

    Attributes:
        missing: users only the other (live) generation has.
        extra: users only this one has.
        moving: users that kept changing while they were compared, so that nothing is said.
        examples: the first differing users, and in what they differ.
        dead_letters: records of the sample that are no events under the new rules, by reason.
    """

    num_equal: int = 0
    different: int = 0
    missing: int = 0
    extra: int = 0
    moving: int = 0
    same_rules: bool = True
    examples: dict[int, str] = field(default_factory=dict)
    dead_letters: Counter[str] = field(default_factory=Counter)

    @property
    def num_users(self) -> int:
        """Return how many users were looked at."""
        return self.num_equal + self.different + self.missing + self.extra + self.moving

    @property
    def is_equal(self) -> bool:
        """Return whether nothing differs."""
        return not (self.different or self.missing or self.extra)

    def add_settled(
        self,
        users: Sequence[int],
        held: tuple[Mapping[int, Held], Mapping[int, Held]],
        applied: _Applied,
        rules: _Rules,
    ) -> list[int]:
        """Count the users of whom both sides have seen the same; return the others."""
        apart = []
        for user in users:
            mine, other = held[0].get(user), held[1].get(user)
            if _is_apart(user, mine, other, applied):
                apart.append(user)
            else:
                self._add(user, mine, other, rules)
        return apart

    def _add(self, user: int, ours: Held | None, theirs: Held | None, rules: _Rules) -> None:
        """Count one user."""
        if ours is None or theirs is None:
            self.missing += ours is None
            self.extra += theirs is None
            what = "only in the live one" if ours is None else "not in the live one"
        else:
            found = difference(ours, theirs, rules)
            if found is None:
                self.num_equal += 1
                return
            self.different += 1
            what = found
        if len(self.examples) < SHOWN_MAX:
            self.examples[user] = what


def difference(ours: Held, theirs: Held, rules: _Rules) -> str | None:
    """Return in what two users differ, None if in nothing that can be compared."""
    same_rules = rules[0] == rules[1]
    if same_rules and ours.row == theirs.row:
        return _differing_chunks(ours, theirs)
    mine, other = decode_row(ours.row), decode_row(theirs.row)
    for name in ("next_ordinal", "user_session", "num_late"):
        left, right = getattr(mine, name), getattr(other, name)
        if left != right:
            return f"{name}: {left} here, {right} there"
    newest = min(len(mine.records), len(other.records), *(each.recent for each in rules))
    left_items, right_items = mine.records[-newest:], other.records[-newest:]
    for at, (left, right) in enumerate(zip(left_items, right_items, strict=True)):
        if left.tobytes() != right.tobytes():
            age = newest - at
            return (
                f"event {age} from the end: item {left['item_id']} here, {right['item_id']} there"
            )
    return "bytes of the row" if same_rules else None


def _differing_chunks(ours: Held, theirs: Held) -> str | None:
    """Return which chunks differ; those marked on either side cannot be compared."""
    both = {n for n in ours.chunks.keys() | theirs.chunks.keys() if n >= ours.first}
    wrong = {n for n in both if n >= theirs.first and ours.chunks.get(n) != theirs.chunks.get(n)}
    wrong |= {*ours.missing_chunks(), *theirs.missing_chunks()}
    return f"chunks {sorted(wrong)[:5]}" if wrong else None


def read_applied(states: States, partitions: Mapping[int, Iterable[int]]) -> Applied:
    """Return up to where each bucket is applied, by (source, partition).

    Args:
        states: the generation.
        partitions: by topic of the log (its source), the partitions.
    """
    return {
        (source, partition): offsets
        for source, of_topic in partitions.items()
        for partition, offsets in states.read_checkpoints(source, list(of_topic)).items()
    }


def read_held(store: StateStore, user_ids: Sequence[int]) -> dict[int, Held]:
    """Return what a generation has of these users; a user unknown to it is left out.

    Rows are read first: chunks that have left since are newer than the row, and left out.
    """
    held: dict[int, Held] = {}
    chunks = ChunkStore(store.client, store.generation)
    for at in range(0, len(user_ids), _ROWS):
        users = user_ids[at : at + _ROWS]
        rows = store.read_rows(users)
        for user, row, waiting in zip(users, rows, chunks.read(users), strict=True):
            if row is not None:
                num_chunks = decode_row(row).num_chunks
                known = {n: data for n, data in waiting.records.items() if n < num_chunks}
                held[user] = Held(row, known, min(waiting.first, num_chunks))
    return held


def compare_generations(
    ours: StateStore,
    theirs: StateStore,
    keep: Keep,
    partitions: Mapping[int, Iterable[int]],
) -> Comparison:
    """Return how the kept users of two generations compare.

    A user of whom one generation has applied what the other has not yet is looked at again, and
    counted as moving if that does not change.

    Args:
        ours: one of them.
        theirs: the other.
        keep: the users to compare.
        partitions: by topic of the log (its source), the partitions.
    """
    result = Comparison(same_rules=ours.config == theirs.config)
    listed = Generations(ours.client).users
    left = sorted({*listed(ours.generation, keep), *listed(theirs.generation, keep)})
    for attempt in range(ROUNDS_MAX):
        # Before the rows: what is applied afterwards only makes a user be looked at again.
        applied = (
            read_applied(ours, partitions),
            read_applied(theirs, partitions),
        )
        held = read_held(ours, left), read_held(theirs, left)
        left = result.add_settled(left, held, applied, (ours.config, theirs.config))
        if not left:
            break
        if attempt < ROUNDS_MAX - 1:
            time.sleep(_ROUND_S)
    result.moving = len(left)
    return result


def dry_run(
    logs: Sequence[EventLog],
    request: ReplayRequest,
    config: StateConfig,
    live: StateStore,
    keep: Keep,
    stop: StopEvent,
    *,
    shown: bool = False,
) -> Comparison:
    """Return how the generation that a replay would build compares with the live one.

    The sample's states are built in memory, so that Redis is only read. The replay follows the
    log until the live rows it is compared with stand still. With `request.to_ms`, users with
    events after it count as moving.
    """
    states = MemoryStates(config)
    topics = [_TopicBuild(states, events, request.starts(events)) for events in logs]
    result = Comparison(same_rules=config == live.config)
    left: list[int] | None = None
    for _ in range(1 if request.to_ms is not None else ROUNDS_MAX):
        ends = {one.events.source: request.ends(one.events) for one in topics}
        for one in topics:
            for batch in one.advance(ends[one.events.source], keep, shown=shown):
                result.dead_letters.update(letter.reason.value for letter in batch.dead_letters)
                if stop.is_set():
                    return result
        _await_live(live, ends, stop)
        ours = {(s, p): [end] * NUM_BUCKETS for s, of in ends.items() for p, end in of.items()}
        applied = ours, read_applied(live, ends)
        if left is None:
            known = Generations(live.client).users(live.generation, keep)
            left = sorted({*known, *states.rows})
        held = states.held(left), read_held(live, left)
        left = result.add_settled(left, held, applied, (config, live.config))
        if not left:
            break
    result.moving = len(left or ())
    return result


@dataclass
class _TopicBuild:
    """One topic of the log, applied to a sample as far as `positions`."""

    states: MemoryStates
    events: EventLog
    positions: dict[int, int]
    processor: Processor = field(init=False)

    def __post_init__(self) -> None:
        """Nothing is applied yet."""
        self.processor = Processor(self.states, self.states.config, source=self.events.source)
        self.processor.assign(list(self.positions))

    def advance(self, ends: Mapping[int, int], keep: Keep, *, shown: bool) -> Iterator[MicroBatch]:
        """Apply everything before `ends`, with a progress bar over the offsets."""
        left = num_missing(self.positions, ends)
        # What another topic's build has written since.
        self.processor.cache.clear()
        batches = self.events.batches(self.positions, ends, self.states.config, keep=keep)
        with (
            progress_bar("read the log", total=left, shown=shown and left > 0) as advance,
            closing(batches),
        ):
            for batch in batches:
                self.processor.apply(batch)
                yield batch
                now = num_missing({**self.positions, **batch.ends}, ends)
                advance(left - now)
                left = now


def _await_live(live: StateStore, ends: Mapping[int, Mapping[int, int]], stop: StopEvent) -> None:
    """Return once the live generation has applied everything before `ends`, or after a while.

    Args:
        live: the generation.
        ends: by topic of the log (its source) and partition.
        stop: ends the waiting.
    """
    deadline = time.monotonic() + _LIVE_WAIT_S
    while time.monotonic() < deadline and not stop.is_set():
        applied = read_applied(live, ends)
        if all(
            max(0, min(applied[source, p])) >= end
            for source, of in ends.items()
            for p, end in of.items()
        ):
            return
        stop.wait(_POLL_S)


def _is_apart(user: int, mine: Held | None, other: Held | None, applied: _Applied) -> bool:
    return _lacks(user, mine, other, applied[0]) or _lacks(user, other, mine, applied[1])


def _lacks(user: int, behind: Held | None, ahead: Held | None, applied: Applied) -> bool:
    """Return whether `ahead` holds an event that was not looked at yet on the other side."""
    if ahead is None:
        return False
    position = decode_row(ahead.row).position
    if behind is not None:
        other = decode_row(behind.row).position
        # One partition a topic, so these two order the user's events.
        if (other.source, other.offset) >= (position.source, position.offset):
            return False
    place = position.source, position.partition
    return place not in applied or applied[place][bucket_of(user)] <= position.offset
