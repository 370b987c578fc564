"""What the Triton model `recommend` does: state in one round trip, retrieval, an honest answer.

No Triton in here: `model_repo/recommend/1/model.py` translates tensors and hands in `retrieve`.
What an answer falls back to is the table in `scoring/ladder.py`. While a canary runs, its users'
answers are made by its version with its memories, the others' by the live one with its own: each
arm is read and asked by itself, so no answer can mix the two.
"""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

from features.errors import CorruptRowError
from features.lifelong_view import LifelongBatch
from features.view import PADDING_ITEM, StreamBatch
from scoring.arms import CANARY, CONTROL, SHADOW, arm_of
from scoring.asks import (
    Answered,
    Ask,
    Budget,
    Draft,
    RetrievalError,
    Retrieve,
    Retrieved,
    Seen,
    Took,
)
from scoring.choose import excluded_of, fill, take_retrieved
from scoring.ladder import MODEL_MS_MIN
from scoring.reading import read_when_reached, users_of
from scoring.signature import Degraded
from scoring.sources import counted_for
from scoring.within import LateError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.state import UserState
    from features.user_batch import Bools, UserBatch
    from scoring.live import Live, Snapshot

__all__ = ["Answered", "Ask", "RetrievalError", "Retrieved", "answer", "answer_shadow"]

log = logging.getLogger("moveline.recommend")

# With more time than any caller may ask for, the model is waited for where one stands.
_UNHURRIED_MS: Final = 9_000


class _Call(NamedTuple):
    """What all answers of one call share."""

    live: Live
    retrieve: Retrieve
    now_ms: int
    live_version: int
    budget: Budget


def answer(asks: Sequence[Ask], live: Live, retrieve: Retrieve, now_ms: int) -> list[Answered]:
    """Return an answer for every ask, in order; whatever is away degrades it, nothing raises."""
    snapshot = live.snapshot
    call = _Call(live, retrieve, now_ms, snapshot.model_version or 0, Budget(asks))
    arms = [arm_of(ask.user_id, snapshot.canary) for ask in asks]
    answers: dict[int, Answered] = {}

    def run(places: list[int], version: Snapshot) -> None:
        drafts = [Draft(asks[i], arms[i]) for i in places]
        answers.update(zip(places, _answer(drafts, version, call), strict=True))

    run([i for i, arm in enumerate(arms) if arm != CANARY], snapshot)
    tried = [i for i, arm in enumerate(arms) if arm == CANARY]
    run(tried, snapshot.of_canary())
    # A canary that fails costs nobody an answer: the live version speaks, and says so.
    run([i for i in tried if _is_model_away(answers[i])], snapshot)
    return [answers[i] for i in range(len(asks))]


def answer_shadow(
    asks: Sequence[Ask], live: Live, retrieve: Retrieve, now_ms: int
) -> tuple[list[Ask], list[Answered]]:
    """Return the asks of users that a shadow is tried on, and what its version would answer."""
    snapshot = live.snapshot
    if snapshot.canary is None or snapshot.canary.mode != "shadow":
        return [], []
    chosen = [
        # It waits for nothing, and no caller waits for it.
        ask._replace(min_partition=-1, deadline_ms=0)
        for ask in asks
        if arm_of(ask.user_id, snapshot.canary) == CONTROL
    ]
    call = _Call(live, retrieve, now_ms, snapshot.model_version or 0, Budget(chosen))
    return chosen, _answer([Draft(ask, SHADOW) for ask in chosen], snapshot.of_canary(), call)


def _is_model_away(one: Answered) -> bool:
    return Degraded.MODEL_AWAY in Degraded(one.provenance[-1])


def _answer(drafts: list[Draft], snapshot: Snapshot, call: _Call) -> list[Answered]:
    """Return the answers of the snapshot's version to these drafts, in order.

    A damaged row costs its user the answer, and the others no more than the time.
    """
    try:
        return _answer_together(drafts, snapshot, call) if drafts else []
    except CorruptRowError:
        alone = ([Draft(draft.ask, draft.arm)] for draft in drafts)
        return [one for each in alone for one in _answer_together(each, snapshot, call)]


def _answer_together(drafts: list[Draft], snapshot: Snapshot, call: _Call) -> list[Answered]:
    took, started_s = Took(), time.monotonic()
    found = None
    if call.budget.left_ms() < MODEL_MS_MIN:
        _mark(drafts, Degraded.DEADLINE)
    else:
        found = read_when_reached(drafts, call.live, snapshot, call.now_ms, call.budget)
        took.read_s = time.monotonic() - started_s
    # What was learnt of domains while reading.
    snapshot = replace(snapshot, trending_by_domain=call.live.snapshot.trending_by_domain)
    if found is not None:
        known, streams = _note_seen(drafts, found, snapshot)
        asked_s = time.monotonic()
        if known:
            _retrieve(known, streams, snapshot, call)
        took.model_s = time.monotonic() - asked_s
    for draft in drafts:
        fill(draft, snapshot)
    took.total_s = time.monotonic() - started_s
    return [_finish(draft, snapshot, call, took) for draft in drafts]


def _mark(drafts: Sequence[Draft], flag: Degraded) -> None:
    for draft in drafts:
        draft.degraded |= flag


def _note_seen(
    drafts: list[Draft], found: UserBatch | LifelongBatch, snapshot: Snapshot
) -> tuple[list[Draft], StreamBatch]:
    """Note what was read in the drafts of known users; return these and their streams, in order."""
    known: list[tuple[Draft, UserState]] = []
    for draft in drafts:
        if draft.state is None:
            draft.degraded |= Degraded.UNKNOWN_USER
            draft.degraded &= ~(Degraded.MID_TERM | Degraded.LIFELONG)
        else:
            known.append((draft, draft.state))
    is_known_B = users_of(found).known_B
    streams = found.streams().select(is_known_B)
    for row, (draft, state) in enumerate(known):
        draft.newest_ms = int(streams.newest_ms_B[row])
        draft.seen = Seen(
            state,
            streams.recent_BR[row],
            streams.mid_BM[row],
            int(streams.clock_ms_B[row]),
            has_mid=Degraded.MID_TERM not in draft.degraded,
        )
    if isinstance(found, LifelongBatch):
        _note_memories([draft for draft, _ in known], found, is_known_B, snapshot)
    return [draft for draft, _ in known], streams


def _note_memories(
    drafts: list[Draft], found: LifelongBatch, is_known_B: Bools, snapshot: Snapshot
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


def _retrieve(
    known: Sequence[Draft], streams: StreamBatch, snapshot: Snapshot, call: _Call
) -> None:
    """Fill the drafts of known users from the retrieval model, if it answers in time."""
    left_ms = call.budget.left_ms()
    if left_ms < MODEL_MS_MIN:
        _mark(known, Degraded.DEADLINE)
        return
    try:
        retrieved = call.live.models.within(
            left_ms,
            lambda: _ask(call, snapshot, _whole(streams, snapshot), known),
            unhurried_ms=_UNHURRIED_MS,
        )
    except RetrievalError as error:
        log.warning("retrieval model away: %s", error)
        _mark(known, Degraded.MODEL_AWAY)
        return
    except LateError as error:
        log.warning("retrieval model late: %s", error)
        _mark(known, Degraded.DEADLINE)
        return
    for row, draft in enumerate(known):
        draft.model_version = snapshot.model_version or 0
        draft.contribution = tuple(retrieved.contributions[row])
        take_retrieved(draft, retrieved.item_ids[row], retrieved.scores[row], snapshot)


def _whole(streams: StreamBatch, snapshot: Snapshot) -> StreamBatch:
    """Return streams of the widths that the model takes: a mid-term stream not read is padding."""
    width = snapshot.config.mid
    if streams.mid_BM.shape[1] >= width:
        return streams
    mid_BM = np.zeros((streams.mid_BM.shape[0], width), streams.mid_BM.dtype)
    mid_BM["item_id"] = PADDING_ITEM
    return streams._replace(mid_BM=mid_BM)


def _ask(
    call: _Call, snapshot: Snapshot, streams: StreamBatch, known: Sequence[Draft]
) -> Retrieved:
    if snapshot.model_version is None:
        raise RetrievalError("no model version is published")
    lists = call.live.followers.lists(streams.recent_BR["item_id"][:, -1].tolist())
    return call.retrieve(
        snapshot.model_version,
        streams,
        [excluded_of(draft) for draft in known],
        snapshot.withdrawn,
        counted=counted_for(snapshot.trending, lists),
        candidates=[draft.ask.candidates for draft in known],
        in_domain=[draft.ask.signed_domain for draft in known],
    )


def _finish(draft: Draft, snapshot: Snapshot, call: _Call, took: Took) -> Answered:
    return Answered(
        draft.item_ids,
        draft.scores,
        (
            draft.model_version,
            call.live_version,
            snapshot.generation,
            0 if draft.state is None else draft.state.next_ordinal,
            draft.newest_ms,
            max(0, call.now_ms - draft.newest_ms) if draft.newest_ms >= 0 else -1,
            int(draft.degraded),
        ),
        draft.contribution,
        draft.seen,
        snapshot.config,
        draft.arm,
        took,
    )
