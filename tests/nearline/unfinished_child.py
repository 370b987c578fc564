"""A Faust app of the app's own group, whose first hint never ends while the later ones do.

Run as a process of its own; the environment is the app's. It is the shape of
faust-streaming/faust#606: two actors on one partition, a slow event at the head.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import faust

from streams.nearline import Nearline, decode_hint, prepare_topics
from streams.nearline_config import from_environment

if TYPE_CHECKING:
    from faust.types import StreamT

CONFIG = from_environment(os.environ)
app = faust.App(
    CONFIG.app_id,
    broker=f"kafka://{CONFIG.kafka.bootstrap}",
    store="memory://",
    datadir=Path(tempfile.gettempdir()) / CONFIG.app_id,
    web_enabled=False,
    broker_commit_interval=0.2,
    consumer_auto_offset_reset="earliest",
    topic_allow_declare=False,
    topic_disable_leader=True,
)
hints = app.topic(CONFIG.topics.nearline, value_type=bytes, value_serializer="raw")
nearline = Nearline(CONFIG, prepare_topics(CONFIG))
begun: list[bytes] = []


@app.agent(hints, concurrency=2)
async def follow(stream: StreamT[bytes]) -> None:
    """Never finish the first hint; follow the others."""
    async for raw in stream:
        begun.append(raw)
        if len(begun) == 1:
            await asyncio.Event().wait()
        hint = decode_hint(raw)
        assert hint is not None
        await asyncio.to_thread(nearline.follow, hint)
