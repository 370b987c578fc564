"""Made-up traffic of the last day, and what trending, statistics and sessions must be after it.

The expectations are worked out from a list of all events, one question at a time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from features.clock import now_ms
from features.oracle import accept
from tests.worker.traffic import Traffic

if TYPE_CHECKING:
    from collections.abc import Iterable

    from features.config import StateConfig
    from features.events import Event
    from features.oracle import Numbered
    from features.state import Accepted

HOUR_MS: Final = 3_600_000


@dataclass
class Recent(Traffic):
    """Traffic of a day and more that ends two hours before this one: every session is over.

    Most sessions are replaced by later ones of their user, the last of each only by the clock.
    """

    num_events: int = 20_000
    span_ms: int = 30 * HOUR_MS

    def __post_init__(self) -> None:
        """Begin as long ago as the span."""
        super().__post_init__()
        self.start_ms = now_ms() // HOUR_MS * HOUR_MS - 2 * HOUR_MS - self.span_ms

    def _event(self, user: int) -> Event:
        event = super()._event(user)
        ahead_ms = self.number * (self.span_ms // self.num_events - 100)
        return msgspec.structs.replace(event, event_time_ms=event.event_time_ms + ahead_ms)


class Expected(NamedTuple):
    """Scores by item, by (domain, item), and events of a day and a week by item."""

    score: dict[int, float]
    by_domain: dict[int, dict[int, float]]
    day: Counter[int]
    week: Counter[int]


def popularity(events: Iterable[Accepted], clock_ms: int) -> Expected:
    """Return what a brute-force count over all streamed events says."""
    score: dict[int, float] = defaultdict(float)
    by_domain: dict[int, dict[int, float]] = defaultdict(lambda: defaultdict(float))
    day: Counter[int] = Counter()
    week: Counter[int] = Counter()
    for event in events:
        age = clock_ms // HOUR_MS - event.event_time_ms // HOUR_MS
        if 0 <= age < 24 * 7:
            week[event.item_id] += 1
        if 0 <= age < 24:
            day[event.item_id] += 1
            score[event.item_id] += 0.5 ** (age / 6)
            by_domain[event.domain][event.item_id] += 0.5 ** (age / 6)
    return Expected(dict(score), {d: dict(s) for d, s in by_domain.items()}, day, week)


def all_sessions(events: list[Accepted], config: StateConfig) -> dict[int, dict[str, object]]:
    """Return every session a user's events make, as it last stood, by its id.

    The rules of `features.oracle.sessions`, told for one session after another.
    """
    found: dict[int, list[Numbered]] = {}
    members: list[Numbered] = []
    for numbered in accept(events, config):
        time_ms = numbered.event.event_time_ms
        times = [n.event.event_time_ms for n in members]
        if not members or time_ms > max(times) + config.session_gap_ms:
            members = [numbered]
        elif time_ms >= min(times) - config.session_gap_ms:
            if max([*times, time_ms]) - min([*times, time_ms]) <= config.session_max_ms:
                members.append(numbered)
            elif time_ms > max(times):
                members = [numbered]
        found[members[0].ordinal] = members
    return {ordinal: _described(members, config) for ordinal, members in found.items()}


def _described(members: list[Numbered], config: StateConfig) -> dict[str, object]:
    times = [n.event.event_time_ms for n in members]
    counts = Counter(config.actions[n.event.action] for n in members)
    return {
        "session_id": members[0].ordinal,
        "start_ms": min(times),
        "last_ms": max(times),
        "num_events": len(members),
        "dwell_ms": sum(max(0, n.event.dwell_ms) for n in members),
        "action_counts": dict(counts),
    }
