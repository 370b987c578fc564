"""Which items an answer holds: the model's in order, then what fills it up. Touches no network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from features.redis import Trending
from features.view import PADDING_ITEM
from scoring.signature import NO_ITEM, Degraded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from scoring.asks import Ask, Draft
    from scoring.live import Snapshot

NO_TRENDING = Trending((), ())


def excluded_of(draft: Draft) -> list[int]:
    """Return the user's seen items, newest first, if the ask leaves them out.

    A memory cannot list what is in it.
    """
    seen = draft.seen
    if not draft.ask.exclude_seen or seen is None:
        return []
    items = [*seen.recent["item_id"][::-1].tolist(), *seen.mid["item_id"][::-1].tolist()]
    return [item for item in dict.fromkeys(items) if item != PADDING_ITEM]


def take_retrieved(
    draft: Draft, item_ids: Sequence[int], scores: Sequence[float], snapshot: Snapshot
) -> None:
    """Append the model's items in order, as far as they may be given."""
    _take(draft, item_ids, scores, snapshot, _candidates(draft.ask))


def fill(draft: Draft, snapshot: Snapshot) -> None:
    """Fill what is missing with trending items, the asked domain's where one is asked.

    Of candidates those that trend come first, then the others as the caller ordered them, each
    with the score 0: whoever asks for a ranking gets all of it.
    """
    ask = draft.ask
    if len(draft.item_ids) >= ask.num_wanted:
        return
    if draft.item_ids:
        draft.degraded |= Degraded.FEW_CANDIDATES
    trending = _trending(ask, snapshot)
    _take(draft, trending.item_ids, trending.scores, snapshot, _candidates(ask))
    if not ask.in_domain:
        _take(draft, ask.candidates, [0.0] * len(ask.candidates), snapshot, None)
    if len(draft.item_ids) < ask.num_wanted and not trending.item_ids:
        draft.degraded |= Degraded.NO_TRENDING


def _candidates(ask: Ask) -> frozenset[int] | None:
    return frozenset(ask.candidates) if ask.candidates else None


def _trending(ask: Ask, snapshot: Snapshot) -> Trending:
    if ask.in_domain:
        return snapshot.trending_by_domain.get(ask.in_domain, NO_TRENDING)
    return snapshot.trending


def _take(
    draft: Draft,
    item_ids: Iterable[int],
    scores: Iterable[float],
    snapshot: Snapshot,
    allowed: frozenset[int] | None,
) -> None:
    """Append items in order until there are enough: none withdrawn, repeated or, if asked, seen."""
    skip = set(draft.item_ids) | snapshot.withdrawn | {NO_ITEM}
    skip |= set(excluded_of(draft))
    for item_id, score in zip(item_ids, scores, strict=True):
        if len(draft.item_ids) >= draft.ask.num_wanted:
            return
        if item_id not in skip and (allowed is None or item_id in allowed):
            skip.add(item_id)
            draft.item_ids.append(item_id)
            draft.scores.append(score)
