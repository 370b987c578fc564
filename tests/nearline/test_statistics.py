"""Goal: what the app pushes is what `get_online_features` answers, newest value last."""

from __future__ import annotations

from typing import TYPE_CHECKING

from features.clock import now_ms
from features.item_statistics import ItemStatistics

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.redis import StateStore


def test_rows_are_read_through_feast(stack: LocalStack, store: StateStore, tmp_path: Path) -> None:
    from features.definitions import apply, open_store  # noqa: PLC0415 - takes seconds

    writer = ItemStatistics(stack.addresses.redis, store.config)
    clock_ms = now_ms()
    big = 2**63 - 1
    writer.push({1: (2, 30), big: (0, 1)}, clock_ms)
    writer.push({1: (5, 31), 9: (0, 0)}, clock_ms + 1)
    writer.close()
    feast = open_store(redis_url=stack.addresses.redis, registry=tmp_path / "registry.db")
    apply(feast, config=store.config, lake=tmp_path / "lake")
    names = ["item_statistics:item_events_1d", "item_statistics:item_events_7d"]
    rows = [{"item_id": item} for item in (1, big, 9, 4)]
    answer = feast.get_online_features(features=names, entity_rows=rows).to_dict()
    assert answer["item_events_1d"] == [5, 0, 0, None]
    assert answer["item_events_7d"] == [31, 1, 0, None]
