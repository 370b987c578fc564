"""Goal: a live source says in training what it says in service, for the same events and time."""

from __future__ import annotations

import numpy as np
import pytest

from features.followers import FOLLOWERS_MAX, added
from features.nearline import HOUR_MS, Tile
from features.sources import (
    FOLLOWERS_HALF_LIVES_KEPT,
    NUM_COUNTED,
    followers_half_life_h,
    popularity_hours,
)
from features.state import Accepted, Position
from streams.followers import counts_of, pairs_of
from streams.trending import count_events, rank
from trainer.counted import LiveSources
from trainer.dataset import EventLog

BEGIN_MS = 490_000 * HOUR_MS
NO_ROWS = np.zeros(0, [("event_time_ms", "i8"), ("ordinal", "i8"), ("item_id", "i8"),
                       ("event_hash", "u8")])  # fmt: skip


def some_log(seed: int, *, num_items: int = 150) -> EventLog:
    """Return two days of thirty users, a few items far more popular than the others."""
    rng = np.random.default_rng(seed)
    num_events = 3_000
    user_id = np.sort(rng.integers(0, 30, num_events))
    return EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": 10**12 + (num_items * rng.random(num_events) ** 3).astype(np.int64),
            # No two at one time: which of them came first is not what is compared.
            "event_time_ms": BEGIN_MS + rng.permutation(48 * 3_600)[:num_events] * 1_000,
            "ordinal": np.arange(num_events) - np.searchsorted(user_id, user_id),
            "domain": rng.integers(0, 3, num_events).astype(np.uint64),
        }
    )


def events_before(log: EventLog, now_ms: int) -> dict[int, list[Accepted]]:
    """Return what the near-line app had seen by then, by user and in the order of time."""
    by_user: dict[int, list[Accepted]] = {}
    for row in np.flatnonzero(log.event_time_ms_N < now_ms).tolist():
        time_ms = int(log.event_time_ms_N[row])
        one = Accepted(
            Position(0, 0, row),
            time_ms,
            int(log.item_id_N[row]),
            time_ms,
            int(log.domain_N[row]),
            row,
            0,
            0.0,
            1,
        )
        by_user.setdefault(int(log.user_N[row]), []).append(one)
    return by_user


@pytest.mark.parametrize("half_life_h", [1, 3, 6, 100])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_popularity(seed: int, half_life_h: int) -> None:
    log = some_log(seed)
    now_ms = BEGIN_MS + (24 + 7 * seed) * HOUR_MS + 60_000 * 17
    events = [one for of_user in events_before(log, now_ms).values() for one in of_user]
    tiles = [
        (
            hour,
            Tile(
                np.array([domain for domain, _ in counts], np.uint64),
                np.array([item for _, item in counts], np.int64),
                np.array(list(counts.values()), np.int64),
            ),
        )
        for hour, counts in count_events(events).items()
    ]
    served = rank(tiles, now_ms, half_life_h=half_life_h)
    items, shares = LiveSources.of(log, half_life_h=half_life_h).popularity.at(now_ms)
    assert items[:NUM_COUNTED].tolist() == list(served.item_ids)
    np.testing.assert_allclose(
        shares[:NUM_COUNTED], np.array(served.scores) / served.total, rtol=1e-6
    )
    assert served.half_life_h == half_life_h


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_followers(seed: int) -> None:
    """Few enough items that none has more followers than are kept."""
    log = some_log(seed, num_items=FOLLOWERS_MAX - 1)
    half_life_h = 2
    slow_h = followers_half_life_h(half_life_h)
    now_ms = BEGIN_MS + 30 * HOUR_MS + 123_456
    counts = counts_of(
        [
            pair
            for of_user in events_before(log, now_ms).values()
            for pair in pairs_of(of_user, NO_ROWS)
        ],
        slow_h,
    )
    source = LiveSources.of(log, half_life_h=half_life_h).followers
    assert len(counts) > 50
    for item_id, served in counts.items():
        ordered = added([served], slow_h, num_max=FOLLOWERS_MAX)
        items, shares = source.at(item_id, now_ms)
        found = dict(zip(items.tolist(), shares.tolist(), strict=True))
        expected = ordered.weight / ordered.total
        assert found == pytest.approx(
            dict(zip(ordered.item_id.tolist(), expected.tolist(), strict=True)), rel=1e-4
        )


def test_both_forget_after_the_same_time() -> None:
    log = some_log(1)
    source = LiveSources.of(log, half_life_h=1)
    last_hour = int(log.event_time_ms_N.max()) // HOUR_MS
    assert len(source.popularity.at((last_hour + 1) * HOUR_MS)[0])
    assert not len(source.popularity.at((last_hour + popularity_hours(1)) * HOUR_MS)[0])
    kept_h = FOLLOWERS_HALF_LIVES_KEPT * followers_half_life_h(1)
    newest_ms = source.followers.time_ms_P[source.followers.offsets[1] - 1]
    first = int(source.followers.item_ids_I[0])
    newest_hour = int(newest_ms) // HOUR_MS
    assert len(source.followers.at(first, (newest_hour + kept_h) * HOUR_MS)[0])
    assert not len(source.followers.at(first, (newest_hour + kept_h + 1) * HOUR_MS)[0])
