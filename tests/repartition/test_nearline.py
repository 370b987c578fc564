"""The near-line app over a change of topics: each event is counted once, sessions still close."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from features.nearline import TileStore
from streams.nearline import Hint, Nearline, Work, prepare_topics
from streams.nearline_config import NearlineConfig
from tests.worker.running import running

if TYPE_CHECKING:
    from compose.local.stack import LocalStack
    from tests.repartition.conftest import Log


def follow_all(nearline: Nearline) -> None:
    """Give every hint of tiles and a sweep, as if none had been given before."""
    nearline.started_at.clear()
    for partition in range(nearline.widths.tiles):
        nearline.follow(Hint(Work.TILES, partition))
    nearline.follow(Hint(Work.SWEEP))
    assert nearline.last_error is None


def test_tiles_count_each_event_once_and_sweeps_go_on(log: Log, stack: LocalStack) -> None:
    config = NearlineConfig(
        kafka=log.kafka,
        topics=log.topics,
        redis_url=stack.addresses.redis,
        generation=log.live.generation,
        lateness_s=0,
    )
    log.produce(1_000, source=0)
    with running(log.kafka, log.topics, log.live) as worker:
        log.wait(worker)
        nearline = Nearline(config, prepare_topics(config))
        follow_all(nearline)
        log.produce(500, source=0)
        log.repartition(5)
        log.produce(1_000, source=1)
        log.produce(200, source=0)
        log.command().move_late()
        log.wait(worker)
        for _ in range(3):
            follow_all(nearline)
    assert nearline.widths.tiles == 5
    nearline.close()
    tiles = TileStore(log.live.client, log.live.generation)
    counted: Counter[int] = Counter()
    for partition in range(5):
        for hour in tiles.marks(partition).changed_at:
            tile = tiles.read(partition, [hour])[hour]
            for item, count in zip(tile.item_id.tolist(), tile.num_events.tolist(), strict=True):
                counted[item] += count
    events = [event for of_user in log.accepted().values() for event in of_user]
    assert counted == Counter(event.item_id for event in events)
