"""What the Triton model `recommend` does: state in one round trip, retrieval, an honest answer.

No Triton in here: `model_repo/recommend/1/model.py` translates tensors and hands in `retrieve`.
The ladder when something is away: no model -> trending; no Redis -> trending; unknown user ->
trending; each marked in the answer.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from features.errors import FeatureError
from features.keys import split_log_partition
from features.lifelong_view import LifelongBatch, read_lifelong
from features.store import read_users
from features.view import PADDING_ITEM
from scoring.signature import NO_CONTRIBUTION, NO_ITEM, WAIT_MS_MAX, Degraded
from scoring.sources import counted_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig
    from features.redis import StateStore
    from features.sources import Counted
    from features.state import UserState
    from features.user_batch import Bools, UserBatch
    from features.view import Records, StreamBatch
    from scoring.live import Live, Snapshot

log = logging.getLogger("moveline.recommend")

# While an answer waits for a position, its rows are read again: soon at first, as an event is
# usually there within milliseconds, then more and more rarely, as many may be waiting.
_POLL_S: Final = 0.001
_POLL_GROWTH: Final = 1.5
_POLL_MAX_S: Final = 0.02


class Ask(NamedTuple):
    """What one user's answer should respect. A negative partition asks for no position."""

    user_id: int
    k: int
    min_partition: int = -1
    min_offset: int = -1
    wait_ms: int = 0
    exclude_seen: bool = False
    request_id: str = ""


class Retrieved(NamedTuple):
    """What the retrieval model returned for a batch of users, best first."""

    item_ids: list[list[int]]
    scores: list[list[float]]
    contributions: list[list[float]]


class Seen(NamedTuple):
    """What the model was given of a user: the streams as batched, padding and all.

    Attributes:
        memory_version: the memories that were read; None where the model reads none.
        num_folded: chunks in the user's; the mid-term stream is then all else but the recent one.
    """

    state: UserState
    recent: Records
    mid: Records
    clock_ms: int
    memory_version: str | None = None
    num_folded: int = 0


class Answered(NamedTuple):
    """One user's answer, padded to nothing: as long as there are items.

    `seen` is what it was made from, under the rules `config`; None where no state was read.
    """

    item_ids: list[int]
    scores: list[float]
    provenance: tuple[int, ...]  # in the order of scoring.signature.PROVENANCE
    contribution: tuple[float, ...]  # of scoring.signature.CONTRIBUTION
    seen: Seen | None
    config: StateConfig


class Retrieve(Protocol):
    """Runs one version of the retrieval model; raises RetrievalError when it is away."""

    def __call__(
        self,
        version: int,
        streams: StreamBatch,
        excluded: Sequence[Sequence[int]],
        withdrawn: frozenset[int],
        counted: Counted,
    ) -> Retrieved:
        """Return the items for each row of the batch."""
        ...


class RetrievalError(Exception):
    """The retrieval model did not answer."""


@dataclass
class _Draft:
    """One answer in the making."""

    ask: Ask
    state: UserState | None = None
    degraded: Degraded = Degraded.NONE
    item_ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    contribution: tuple[float, ...] = NO_CONTRIBUTION
    model_version: int = 0
    newest_ms: int = -1
    seen: Seen | None = None


def answer(asks: Sequence[Ask], live: Live, retrieve: Retrieve, now_ms: int) -> list[Answered]:
    """Return an answer for every ask, in order; whatever is away degrades it, nothing raises."""
    snapshot = live.snapshot
    drafts = [_Draft(ask) for ask in asks]
    found = _read_when_reached(drafts, live, snapshot, now_ms)
    if found is not None:
        _retrieve(drafts, found, live, snapshot, retrieve)
    for draft in drafts:
        _fill_with_trending(draft, snapshot)
    return [_finish(draft, snapshot, now_ms) for draft in drafts]


def _read_when_reached(
    drafts: list[_Draft], live: Live, snapshot: Snapshot, now_ms: int
) -> UserBatch | LifelongBatch | None:
    """Read every user's state once the positions asked for are reached, or time is up.

    Returns what was read, a row for each draft; None when Redis did not answer.
    """
    store = live.store(snapshot)
    started, pause_s = time.monotonic(), _POLL_S
    while True:
        try:
            asked = [draft.ask.user_id for draft in drafts]
            found = _read(store, asked, snapshot, now_ms)
        except FeatureError as error:
            log.warning("state not read: %s", error)
            for draft in drafts:
                draft.degraded |= Degraded.STORE_AWAY
            return None
        users = _users(found)
        waited_ms = (time.monotonic() - started) * 1000
        behind = []
        for row, draft in enumerate(drafts):
            draft.state = users.state(row)
            if not _reached(draft.ask, draft.state):
                behind.append(draft)
        # Clients limit their wait too; a server must not have to trust them.
        if all(min(draft.ask.wait_ms, WAIT_MS_MAX) <= waited_ms for draft in behind):
            for draft in behind:
                draft.degraded |= Degraded.POSITION_NOT_REACHED
            return found
        time.sleep(pause_s)
        pause_s = min(pause_s * _POLL_GROWTH, _POLL_MAX_S)


def _read(
    store: StateStore, user_ids: Sequence[int], snapshot: Snapshot, now_ms: int
) -> UserBatch | LifelongBatch:
    """Return the users' state, with memories of the version that the live model reads, if any."""
    version = snapshot.memory_version
    if version is None:
        return read_users(store, user_ids, now_ms=now_ms)
    return read_lifelong(store, user_ids, version, now_ms=now_ms)


def _users(found: UserBatch | LifelongBatch) -> UserBatch:
    return found.users if isinstance(found, LifelongBatch) else found


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


def _retrieve(
    drafts: list[_Draft],
    found: UserBatch | LifelongBatch,
    live: Live,
    snapshot: Snapshot,
    retrieve: Retrieve,
) -> None:
    """Fill the drafts of known users from the retrieval model."""
    known: list[tuple[_Draft, UserState]] = []
    for draft in drafts:
        if draft.state is None:
            draft.degraded |= Degraded.UNKNOWN_USER
        else:
            known.append((draft, draft.state))
    if not known:
        return
    is_known_B = _users(found).known_B
    streams = found.streams().select(is_known_B)
    for row, (draft, state) in enumerate(known):
        draft.newest_ms = int(streams.newest_ms_B[row])
        clock_ms = int(streams.clock_ms_B[row])
        draft.seen = Seen(state, streams.recent_BR[row], streams.mid_BM[row], clock_ms)
    if isinstance(found, LifelongBatch):
        _note_memories([draft for draft, _ in known], found, is_known_B, snapshot)
    try:
        excluded = [_excluded(draft) for draft, _ in known]
        lists = live.followers.lists(streams.recent_BR["item_id"][:, -1].tolist())
        counted = counted_for(snapshot.trending, lists)
        retrieved = _ask(retrieve, snapshot, streams, excluded, counted)
    except RetrievalError as error:
        log.warning("retrieval model away: %s", error)
        for draft, _ in known:
            draft.degraded |= Degraded.MODEL_AWAY
        return
    for row, (draft, _) in enumerate(known):
        draft.model_version = snapshot.model_version or 0
        draft.contribution = tuple(retrieved.contributions[row])
        _take(draft, retrieved.item_ids[row], retrieved.scores[row], snapshot)


def _note_memories(
    drafts: list[_Draft], found: LifelongBatch, is_known_B: Bools, snapshot: Snapshot
) -> None:
    """Say in the drafts of known users which memories were read, and what they lack."""
    folded, lacks = found.num_folded_B[is_known_B], found.is_incomplete_B[is_known_B]
    for draft, num_folded, is_incomplete in zip(drafts, folded, lacks, strict=True):
        assert draft.seen is not None
        draft.seen = draft.seen._replace(
            memory_version=snapshot.memory_version, num_folded=int(num_folded)
        )
        if is_incomplete:
            draft.degraded |= Degraded.LIFELONG


def _ask(
    retrieve: Retrieve,
    snapshot: Snapshot,
    streams: StreamBatch,
    excluded: Sequence[Sequence[int]],
    counted: Counted,
) -> Retrieved:
    if snapshot.model_version is None:
        raise RetrievalError("no model version is published")
    return retrieve(snapshot.model_version, streams, excluded, snapshot.withdrawn, counted)


def _excluded(draft: _Draft) -> list[int]:
    """Return the user's seen items, newest first, if the ask leaves them out.

    A memory cannot list what is in it.
    """
    seen = draft.seen
    if not draft.ask.exclude_seen or seen is None:
        return []
    items = [*seen.recent["item_id"][::-1].tolist(), *seen.mid["item_id"][::-1].tolist()]
    return [item for item in dict.fromkeys(items) if item != PADDING_ITEM]


def _take(
    draft: _Draft, item_ids: Sequence[int], scores: Sequence[float], snapshot: Snapshot
) -> None:
    """Append items in order until k, leaving out withdrawn, repeated and (if asked) seen ones."""
    skip = set(draft.item_ids) | snapshot.withdrawn | {NO_ITEM}
    skip |= set(_excluded(draft))
    for item_id, score in zip(item_ids, scores, strict=True):
        if len(draft.item_ids) >= draft.ask.k:
            return
        if item_id not in skip:
            skip.add(item_id)
            draft.item_ids.append(item_id)
            draft.scores.append(score)


def _fill_with_trending(draft: _Draft, snapshot: Snapshot) -> None:
    if len(draft.item_ids) >= draft.ask.k:
        return
    if draft.item_ids:
        draft.degraded |= Degraded.FEW_CANDIDATES
    trending = snapshot.trending
    _take(draft, trending.item_ids, trending.scores, snapshot)


def _finish(draft: _Draft, snapshot: Snapshot, now_ms: int) -> Answered:
    return Answered(
        draft.item_ids,
        draft.scores,
        (
            draft.model_version,
            snapshot.model_version or 0,
            snapshot.generation,
            0 if draft.state is None else draft.state.next_ordinal,
            draft.newest_ms,
            max(0, now_ms - draft.newest_ms) if draft.newest_ms >= 0 else -1,
            int(draft.degraded),
        ),
        draft.contribution,
        draft.seen,
        snapshot.config,
    )
