"""Reading the users' state for a batch: in one round trip, waited for, and within the time left."""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from features.errors import CorruptRowError, FeatureError, StoreUnavailableError
from features.keys import bucket_of, split_log_partition
from features.lifelong_view import LifelongBatch, read_lifelong
from features.store import read_users
from scoring.ladder import FULL_MS_MIN
from scoring.signature import WAIT_MS_MAX, Degraded
from scoring.within import LateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.redis import StateStore
    from features.state import UserState
    from features.user_batch import UserBatch
    from scoring.asks import Ask, Budget, Draft
    from scoring.live import Live, Snapshot

    Found = UserBatch | LifelongBatch

log = logging.getLogger("moveline.recommend")

# While an answer waits for a position, its rows are read again: soon at first, as an event is
# usually there within milliseconds, then more and more rarely, as many may be waiting.
_POLL_S: Final = 0.001
_POLL_GROWTH: Final = 1.5
_POLL_MAX_S: Final = 0.02
# A reading gives up by itself in this time: up to three calls of Redis, a quarter second each.
_UNHURRIED_MS: Final = 800
# What one reading decides anew, each time an answer that waits looks again.
_STREAMS: Final = Degraded.MID_TERM | Degraded.LIFELONG


def read_when_reached(
    drafts: Sequence[Draft], live: Live, snapshot: Snapshot, now_ms: int, budget: Budget
) -> Found | None:
    """Read every user's state once the positions asked for are reached, or time is up.

    Returns what was read, a row for each draft; None when Redis did not answer.

    Raises:
        CorruptRowError: of several rows one is damaged: ask for each user by itself.
    """
    started, pause_s = time.monotonic(), _POLL_S
    behind: list[Draft] = []
    while True:
        try:
            found, behind = _look(drafts, behind, live, snapshot, now_ms, budget)
        except (FeatureError, LateError) as error:
            if isinstance(error, CorruptRowError) and len(drafts) > 1:
                raise
            log.warning("state not read: %s", error)
            for draft in drafts:
                draft.degraded |= Degraded.STORE_AWAY
            return None
        waited_ms = (time.monotonic() - started) * 1000
        left_ms = budget.left_ms() - FULL_MS_MIN
        # Clients limit their wait too; a server must not have to trust them.
        if left_ms <= 0 or all(
            min(draft.ask.wait_ms, WAIT_MS_MAX) <= waited_ms for draft in behind
        ):
            for draft in behind:
                draft.degraded |= Degraded.POSITION_NOT_REACHED
            return found
        time.sleep(min(pause_s, left_ms / 1000))
        pause_s = min(pause_s * _POLL_GROWTH, _POLL_MAX_S)


def users_of(found: Found) -> UserBatch:
    """Return rows, streams and sessions of what was read."""
    return found.users if isinstance(found, LifelongBatch) else found


def _look(
    drafts: Sequence[Draft],
    behind: Sequence[Draft],
    live: Live,
    snapshot: Snapshot,
    now_ms: int,
    budget: Budget,
) -> tuple[Found, list[Draft]]:
    """Read once; return what was read, and the drafts whose position is not reached.

    Raises:
        FeatureError: Redis did not answer, or a row is corrupt.
        LateError: it did not answer in time.
    """
    left_ms = budget.left_ms()
    is_short = left_ms < FULL_MS_MIN
    look = live.reads.within(
        left_ms,
        lambda: _fetch(drafts, behind, live, snapshot, now_ms, is_short=is_short),
        unhurried_ms=_UNHURRIED_MS,
    )
    users = users_of(look.found)
    still = []
    for row, draft in enumerate(drafts):
        draft.state = users.state(row)
        draft.degraded = draft.degraded & ~_STREAMS | look.degraded
        if not (id(draft) in look.reached or _reached(draft.ask, draft.state)):
            still.append(draft)
    return look.found, still


class _Look(NamedTuple):
    """What one reading found, what it left out, and the drafts that are reached by their bucket."""

    found: Found
    degraded: Degraded
    reached: set[int]


def _fetch(
    drafts: Sequence[Draft],
    behind: Sequence[Draft],
    live: Live,
    snapshot: Snapshot,
    now_ms: int,
    *,
    is_short: bool,
) -> _Look:
    """Ask Redis, in this order: how far buckets are (for those behind), domains, rows.

    What a bucket holds is looked up before the row, and only when a row has not got there: an event
    that changed no row, such as a repeat, is reached once its bucket is beyond it.
    """
    store = live.store(snapshot)
    users = [draft.ask.user_id for draft in drafts]
    reached = _reached_by_bucket(store, behind) if behind else set()
    domains = {draft.ask.in_domain for draft in drafts} - {0, *snapshot.trending_by_domain}
    if domains:
        live.learn_domains(domains)
    version, lacks = snapshot.memory_version, Degraded.NONE
    if is_short:
        lacks = Degraded.MID_TERM | (Degraded.LIFELONG if version else Degraded.NONE)
        recent = store.config.recent
        return _Look(read_users(store, users, now_ms=now_ms, newest=recent), lacks, reached)
    if version is not None:
        try:
            return _Look(read_lifelong(store, users, version, now_ms=now_ms), lacks, reached)
        except StoreUnavailableError:
            raise
        except FeatureError as error:
            log.warning("memories not read, rows only: %s", error)
            lacks = Degraded.LIFELONG
    return _Look(read_users(store, users, now_ms=now_ms), lacks, reached)


def _reached(ask: Ask, state: UserState | None) -> bool:
    if ask.min_partition < 0:
        return True
    if state is None:
        return False
    source, partition = split_log_partition(ask.min_partition)
    at = state.position
    # All of a topic is applied before anything of the next one.
    return at.source > source or (
        (at.source, at.partition) == (source, partition) and at.offset >= ask.min_offset
    )


def _reached_by_bucket(store: StateStore, drafts: Sequence[Draft]) -> set[int]:
    """Return the identities of drafts whose bucket holds everything up to their position."""
    places = [
        (bucket_of(draft.ask.user_id), *split_log_partition(draft.ask.min_partition))
        for draft in drafts
    ]
    ends = store.read_bucket_ends(places)
    return {
        id(draft) for draft, end in zip(drafts, ends, strict=True) if end > draft.ask.min_offset
    }
