"""The hot path's effects: step every user of a micro-batch and write each by compare-and-set.

Numbered effects and what a crash between any two of them leaves: ARCHITECTURE.md, section 8.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from features.row import encode_write
from features.state import EMPTY_STATE, UserState, step
from streams.errors import StateContendedError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from features.config import StateConfig
    from features.row import RowWrite
    from features.state import Accepted, Change

# A refusal means another writer moved the user on; past this many in a row two workers fight
# over one partition, which only an operator can end.
REFUSALS_MAX: Final = 5
# States of idle users cost memory and save one read each; the rest is re-read when it returns.
CACHE_BYTES_DEFAULT: Final = 256 * 1024 * 1024
_STATE_OVERHEAD_BYTES: Final = 1_500


class States(Protocol):
    """What the processor needs of Redis: `features.redis.StateStore` keeps these promises."""

    def load(self, user_ids: Sequence[int]) -> dict[int, UserState]: ...  # noqa: D102 - see StateStore

    def write(self, writes: Mapping[int, RowWrite]) -> list[int]: ...  # noqa: D102 - see StateStore


@dataclass
class Report:
    """What one micro-batch did."""

    num_applied: int = 0
    num_duplicates: int = 0
    num_skipped: int = 0
    num_late: int = 0
    num_refused: int = 0
    load_s: float = 0.0
    step_s: float = 0.0
    write_s: float = 0.0


@dataclass
class StateCache:
    """The states this worker wrote last, least recently used first out, bounded in bytes."""

    bytes_max: int = CACHE_BYTES_DEFAULT
    bytes_held: int = 0
    states: OrderedDict[int, UserState] = field(default_factory=OrderedDict)

    def get(self, user_id: int) -> UserState | None:
        """Return the cached state and mark it used."""
        state = self.states.get(user_id)
        if state is not None:
            self.states.move_to_end(user_id)
        return state

    def put(self, user_id: int, state: UserState) -> None:
        """Keep a state that Redis has acknowledged."""
        self.drop(user_id)
        self.states[user_id] = state
        self.bytes_held += len(state.tail) + _STATE_OVERHEAD_BYTES
        while self.bytes_held > self.bytes_max:
            self.drop(next(iter(self.states)))

    def drop(self, user_id: int) -> None:
        """Forget one state."""
        state = self.states.pop(user_id, None)
        if state is not None:
            self.bytes_held -= len(state.tail) + _STATE_OVERHEAD_BYTES

    def clear(self) -> None:
        """Forget everything: after a rebalance, or when Redis may have changed behind us."""
        self.states.clear()
        self.bytes_held = 0


@dataclass
class Processor:
    """Applies micro-batches to the states of one generation."""

    states: States
    config: StateConfig
    cache: StateCache = field(default_factory=StateCache)

    def apply(self, by_user: Mapping[int, Sequence[Accepted]]) -> Report:
        """Return once every event is in Redis, applied exactly once.

        Raises:
            StoreError: Redis is away or full. Some users may be written; applying the same
                micro-batch again skips what is already in.
            StateContendedError: writes kept being refused.
        """
        report = Report()
        todo: Mapping[int, Sequence[Accepted]] = by_user
        for _ in range(REFUSALS_MAX + 1):
            refused = self._apply_once(todo, report)
            if not refused:
                return report
            report.num_refused += len(refused)
            todo = {user: todo[user] for user in refused}
        raise StateContendedError(
            f"{len(todo)} users (first: {next(iter(todo))}) were changed by another writer "
            f"{REFUSALS_MAX + 1} times in a row: is a second consumer group writing to this "
            "generation? Check `moveline status`."
        )

    def _apply_once(self, by_user: Mapping[int, Sequence[Accepted]], report: Report) -> list[int]:
        started = time.perf_counter()
        before = self._states_of(by_user)
        loaded = time.perf_counter()
        changes = {user: step(before[user], by_user[user], self.config) for user in by_user}
        writes = {
            user: encode_write(before[user], change, len(self.config.actions))
            for user, change in changes.items()
            if change.num_applied
        }
        stepped = time.perf_counter()
        refused = self._write(writes)
        for user in refused:
            self.cache.drop(user)
        self._settle(before, changes, set(refused), report)
        report.load_s += loaded - started
        report.step_s += stepped - loaded
        report.write_s += time.perf_counter() - stepped
        return refused

    def _write(self, writes: dict[int, RowWrite]) -> list[int]:
        if not writes:
            return []
        try:
            return self.states.write(writes)
        except Exception:
            # Unknown how much was written: what is cached may be behind Redis.
            self.cache.clear()
            raise

    def _states_of(self, user_ids: Mapping[int, object]) -> dict[int, UserState]:
        found = {user: self.cache.get(user) for user in user_ids}
        missing = [user for user, state in found.items() if state is None]
        loaded = self.states.load(missing) if missing else {}
        return {user: loaded[user] if state is None else state for user, state in found.items()}

    def _settle(
        self,
        before: Mapping[int, UserState],
        changes: Mapping[int, Change],
        refused: set[int],
        report: Report,
    ) -> None:
        for user, change in changes.items():
            if user in refused:
                continue
            report.num_applied += change.num_applied
            report.num_duplicates += change.num_duplicates
            report.num_skipped += change.num_skipped
            report.num_late += change.state.num_late - before[user].num_late
            if change.state is not EMPTY_STATE:
                self.cache.put(user, change.state)
