"""Small seeded logs and models shared by the trainer's tests."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.once import made_once
from trainer.dataset import EventLog
from trainer.export import Provenance, export
from trainer.loop import LoopConfig
from trainer.models.gems import GemsConfig
from trainer.train import TrainConfig, Trained, train

Columns = dict[str, NDArray[np.generic]]
DAY_MS = 86_400_000
PROVENANCE = Provenance(
    name="gems",
    created_ms=1_700_000_000_000,
    window_from={"0": 0, "1": 0},
    window_to={"0": 120, "1": 99},
    feature_schema_hash="f" * 64,
    metrics={"hr10_model": 0.5},
)


def made_up_columns(
    *, seed: int, num_users: int = 8, num_items: int = 30, num_baskets: int = 20
) -> Columns:
    """Users who buy baskets of a few items, mostly from a handful of their own."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        own = rng.choice(num_items, 4, replace=False)
        times = np.sort(rng.integers(0, 100, num_baskets)) * DAY_MS
        for time in times:
            for _ in range(rng.integers(1, 4)):
                item = rng.choice(own) if rng.random() < 0.8 else rng.integers(num_items)
                rows.append((1000 + user, 50 + 7 * item, time, 10**18 * (item % 3)))
    user_id, item_id, time_ms, domain = (np.array(column) for column in zip(*rows, strict=True))
    first = np.searchsorted(user_id, user_id)
    return {
        "user_id": user_id,
        "item_id": item_id,
        "event_time_ms": time_ms,
        "ordinal": np.arange(len(user_id)) - first,
        "action": np.full(len(user_id), 5, np.uint8),
        "domain": domain.astype(np.uint64),
        "dwell_ms": np.full(len(user_id), np.nan),
    }


def small_model(**changes: object) -> GemsConfig:
    """Sizes that train in seconds."""
    sizes: dict[str, object] = {
        "width": 16,
        "num_heads": 2,
        "num_blocks": 1,
        "num_recent_layers": 1,
        "num_recent": 8,
        "num_mid": 24,
        "num_seeds": 2,
        "memory_dropout": 0.0,
        "dropout": 0.0,
    }
    return GemsConfig(**{**sizes, **changes})  # type: ignore[arg-type]


def small_training(**changes: object) -> TrainConfig:
    """One short pass over a small log; changes may be of the loop, too."""
    loop: dict[str, object] = {"examples_per_batch": 16, "num_threads": 1, "budget_s": 300.0}
    settings: dict[str, object] = {
        "num_targets": 4,
        "code_sizes": (4, 4, 4),
        "label_share": 1.0,
        "model": small_model(),
    }
    of_loop = {one.name for one in fields(LoopConfig)}
    for name, value in changes.items():
        (loop if name in of_loop else settings)[name] = value
    return TrainConfig(loop=LoopConfig(**loop), **settings)  # type: ignore[arg-type]


@pytest.fixture(scope="session")
def log() -> EventLog:
    return EventLog.from_columns(made_up_columns(seed=3))


@pytest.fixture(scope="session")
def trained(log: EventLog) -> Trained:
    return train(log, small_training(epochs=3.0))


@pytest.fixture(scope="session")
def trained_dense(log: EventLog) -> Trained:
    """The same with a dense head, which this log would not have decided for."""
    return train(log, small_training(epochs=3.0, model=small_model(dense="on")))


@pytest.fixture(scope="session")
def exported(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The package of `trained`, to be read only: exporting takes many seconds."""
    return made_once(
        tmp_path_factory, "exported", lambda folder: export(trained, folder, PROVENANCE)
    )


@pytest.fixture(scope="session")
def trained_with(log: EventLog) -> Callable[..., Trained]:
    """Train once more with other settings of the model."""

    def run(**changes: object) -> Trained:
        return train(log, small_training(model=small_model(**changes)))

    return run


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)
