"""Goal: `faust -A streams.app worker` ends at the truth whatever is done to it.

20,000 events through the real broker, worker and app; the app is killed twice in between. What is
then in Redis and in the sessions topic is compared with counts over the log.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from features.clock import now_ms
from features.nearline import Tile, TileStore, domain_trending_key
from features.redis import Pointers, StateStore, Trending
from streams.control import write_pointers, write_records
from streams.trending import hour_of, rank, total_by_item, window_hours
from tests.nearline.apps import app_running
from tests.nearline.traffic import Recent, all_sessions, popularity
from tests.streams.support import read_all
from tests.waiting import until
from tests.worker.running import running, wait_caught_up
from tests.worker.traffic import accepted_of, publish

if TYPE_CHECKING:
    from pathlib import Path

    from features.redis import CatalogueStore
    from features.state import Accepted
    from streams.kafka import KafkaConfig
    from streams.nearline_config import NearlineConfig
    from streams.topics import Topics

NUM_EVENTS = 20_000


def sessions_sent(kafka: KafkaConfig, topics: Topics) -> dict[tuple[int, int], set[bytes]]:
    """Return the values sent for each (user, session)."""
    found: dict[tuple[int, int], set[bytes]] = {}
    for message in read_all(kafka, topics.sessions):
        value = message.value() or b""
        record = msgspec.json.decode(value)
        assert message.key() == b"%d" % record["user_id"]
        found.setdefault((record["user_id"], record["session_id"]), set()).add(value)
    return found


def test_twenty_thousand_events_and_two_kills(
    config: NearlineConfig,
    kafka: KafkaConfig,
    topics: Topics,
    store: StateStore,
    catalogue: CatalogueStore,
    tmp_path: Path,
) -> None:
    traffic = Recent(seed=11, num_users=400, num_events=NUM_EVENTS)
    sent = []
    log_path = tmp_path / "app.log"
    with running(kafka, topics, store) as worker:
        for part in range(3):
            sent += traffic.make(NUM_EVENTS // 3 + 1)
            publish(kafka, topics.events, sent[len(sent) - NUM_EVENTS // 3 - 1 :])
            if part < 2:
                with app_running(config, log_path) as app:
                    app.wait_for_work()
                    app.kill()
        wait_caught_up(kafka, topics, worker)
        by_user = accepted_of(kafka, topics, sent, store.config)
        expected = {
            (user, session["session_id"]): {
                "generation": store.generation,
                "user_id": user,
                **session,
            }
            for user, events in by_user.items()
            for session in all_sessions(events, store.config).values()
        }
        with app_running(config, log_path) as app:
            until(
                lambda: len(sessions_sent(kafka, topics)) >= len(expected),
                90,
                what="all sessions",
            )
            until(lambda: catalogue.get_trending() == best_now(store), 60, what="trending")
            # A batch worth compressing: what our producers do, Faust's consumer must undo.
            write_records(kafka, topics, {b"noise-%d" % n: b"{}" * 500 for n in range(50)})
            write_pointers(kafka, topics, Pointers(5, store.generation))
            until(lambda: catalogue.get_pointers() == Pointers(5, store.generation))
            until(
                lambda: (
                    "moveline_nearline_hints_total"
                    in (app.page("/metrics", port=app.config.metrics_port) or "")
                ),
                what="the app's metrics",
            )
            assert app.end() == 0
    found = sessions_sent(kafka, topics)
    assert all(len(values) == 1 for values in found.values())
    assert {place: msgspec.json.decode(min(values)) for place, values in found.items()} == expected
    events = [event for of_user in by_user.values() for event in of_user]
    compare_popularity(events, store, catalogue)


def best_now(store: StateStore) -> Trending:
    """Return what the tiles say at this moment."""
    return rank(tiles_of(store), now_ms())


def tiles_of(store: StateStore, partitions: int = 3) -> list[tuple[int, Tile]]:
    """Return every tile of the last week."""
    tiles = TileStore(store.client, store.generation)
    hours = list(window_hours(now_ms(), 7 * 24))
    return [pair for p in range(partitions) for pair in tiles.read(p, hours).items()]


def compare_popularity(
    events: list[Accepted], store: StateStore, catalogue: CatalogueStore
) -> None:
    """Compare tiles, trending items and each domain's with counts over the events."""
    clock_ms = now_ms()
    expected = popularity(events, clock_ms)
    assert total_by_item(tiles_of(store), window_hours(clock_ms, 24)) == dict(expected.day)
    assert total_by_item(tiles_of(store), window_hours(clock_ms, 168)) == dict(expected.week)
    trending = catalogue.get_trending()
    assert trending is not None
    if hour_of(now_ms()) == hour_of(clock_ms):
        assert_ranked(trending, expected.score)
        for domain, scores in expected.by_domain.items():
            raw = store.client.get(domain_trending_key(domain))
            assert_ranked(msgspec.json.decode(raw, type=Trending), scores)


def assert_ranked(trending: Trending, scores: dict[int, float]) -> None:
    """Compare item by item; equal scores go by item id."""
    rounded = {item: round(score, 6) for item, score in scores.items()}
    best = sorted(rounded, key=lambda item: (-rounded[item], item))[:100]
    assert list(trending.item_ids) == best
    assert list(trending.scores) == pytest.approx([rounded[item] for item in best], abs=1e-5)
