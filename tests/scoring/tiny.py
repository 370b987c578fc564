"""A retrieval model that trains in seconds and fits the small rules of the tests."""

from __future__ import annotations

import numpy as np

from tests.small import SMALL
from trainer.dataset import EventLog
from trainer.loop import LoopConfig
from trainer.models.gems import GemsConfig
from trainer.train import TrainConfig

_DAY_MS = 86_400_000
ITEM_IDS = [50 + 7 * number for number in range(29)] + [2**63 - 2]


def tiny_log() -> EventLog:
    """Return the log of eight users who keep to a handful of items each."""
    rng = np.random.default_rng(3)
    rows = []
    for user in range(8):
        own = rng.choice(ITEM_IDS, 4, replace=False)
        for day in np.sort(rng.integers(0, 100, 40)):
            item = rng.choice(own) if rng.random() < 0.8 else rng.choice(ITEM_IDS)
            rows.append((user, int(item), int(day) * _DAY_MS))
    user_id, item_id, time_ms = (np.array(column) for column in zip(*rows, strict=True))
    return EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": item_id,
            "event_time_ms": time_ms,
            "ordinal": np.arange(len(user_id)) - np.searchsorted(user_id, user_id),
            "action": np.full(len(user_id), 1, np.uint8),
            "domain": np.zeros(len(user_id), np.uint64),
            "dwell_ms": np.full(len(user_id), -1, np.int32),
        }
    )


def tiny_training() -> TrainConfig:
    """Return one short pass."""
    return TrainConfig(
        loop=LoopConfig(examples_per_batch=16, num_threads=1, budget_s=60.0),
        num_targets=4,
        code_sizes=(4, 4, 4),
        label_share=1.0,
        model=GemsConfig(
            width=16,
            num_heads=2,
            num_blocks=1,
            num_recent_layers=1,
            num_recent=SMALL.recent,
            num_mid=SMALL.mid,
            dropout=0.0,
        ),
    )
