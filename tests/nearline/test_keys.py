"""Goal: the keys in Redis are the documented bytes, and the documents name all of them."""

from __future__ import annotations

from pathlib import Path

from features import nearline
from streams.nearline import TICKS
from streams.topics import Topics

PAGE = (Path(__file__).parents[2] / "docs" / "nearline.md").read_text()


def test_keys() -> None:
    assert nearline.marks_key(1, 3) == "moveline:{t3}:g1:marks"
    assert nearline.tile_key(1, 3, 490_000) == "moveline:{t3}:g1:tile:490000"
    assert nearline.markers_key(1, 632) == "moveline:{b632}:g1:session-markers"
    assert nearline.outbox_key(1, 632) == "moveline:{b632}:g1:session-outbox"
    assert nearline.domain_trending_key(2**64 - 1) == "moveline:trending:18446744073709551615"


def test_the_page_names_topics_keys_and_hints() -> None:
    names = [
        nearline.marks_key(1, 3),
        nearline.markers_key(1, 632),
        nearline.outbox_key(1, 632),
        Topics("prefix").sessions.replace("prefix", "<prefix>"),
        Topics("prefix").nearline.replace("prefix", "<prefix>"),
        *(f"`{work}`" for work in TICKS),
    ]
    assert [name for name in names if name not in PAGE] == []
