"""An installation small enough to train in, and a program that runs its trainer once.

Usage: python -m tests.trainer_service.installation SETTINGS, which is what `Settings` has as JSON.

Models have the sizes of the tests, and the rankings without a model are not asked: on a few hundred
made-up events counting is as good as any model, and it is not the model that is tested here.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING
from unittest.mock import patch

import numpy as np

from features.lake_revisions import Place
from tests.lake.writing import append, event

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    from compose.settings import Settings
    from compose.training import TrainRequest
    from features.config import StateConfig
    from trainer.train import TrainConfig

NUM_USERS = 12
NUM_EVENTS = 400


def add_events(settings: Settings, *, seed: int, num_items: int = 6) -> None:
    """Users who keep to a handful of items each; the lake has them as its sink writes them."""
    rng = np.random.default_rng(seed)
    place = Place(settings.lake.path, f"{settings.kafka.prefix}.events", 0)
    users = rng.integers(0, NUM_USERS, NUM_EVENTS).tolist()
    append(
        place,
        [
            event(
                NUM_EVENTS * seed + number,
                user_id=user,
                item_id=100 + 5 * user + int(rng.integers(num_items)),
            )
            for number, user in enumerate(users)
        ],
    )


def small_config(settings: Settings, request: TrainRequest, config: StateConfig) -> TrainConfig:
    """Stand for `compose.training.train_config`."""
    from tests.scoring.tiny import tiny_training  # noqa: PLC0415 - imports torch

    del settings, config
    tiny = tiny_training()
    return replace(tiny, loop=replace(tiny.loop, budget_s=request.budget_s, epochs=request.epochs))


def small() -> Iterator[AbstractContextManager[object]]:
    """Yield what has to be entered for a run to be small."""
    yield patch("compose.trainer_service.learn.train_config", small_config)
    yield patch("trainer.gates.RIVALS", ())


def main() -> None:
    """Run once; a signal ends it as it does the command."""
    from contextlib import ExitStack  # noqa: PLC0415 - of this program only

    from compose.local.interrupts import interrupts  # noqa: PLC0415 - likewise
    from compose.settings import Settings  # noqa: PLC0415 - likewise
    from compose.trainer_service.one_run import run_once  # noqa: PLC0415 - likewise

    settings = Settings.model_validate_json(sys.argv[1])
    with ExitStack() as stack, interrupts():
        for one in small():
            stack.enter_context(one)
        record = run_once(settings)
    sys.stdout.write(f"{record.state} {record.says}\n")


if __name__ == "__main__":
    main()
