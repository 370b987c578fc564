"""A small training as a process, to be killed, or to be started twice by torchrun.

Usage: python -m tests.trainer.training_program WEIGHTS [CHECKPOINTS]
"""

import json
import sys
from dataclasses import fields
from pathlib import Path

from safetensors.torch import save_file

from tests.trainer.conftest import made_up_columns, small_model, small_training
from trainer.dataset import EventLog
from trainer.loop import Outputs
from trainer.models.gems import GemsConfig
from trainer.ranks import is_first_process
from trainer.train import TrainConfig, Trained, train

# So many that a kill at the first checkpoint comes long before the end.
EPOCHS = 20.0
CHECKPOINT_EVERY_STEPS = 3


def settings(*, dropout: float, epochs: float = EPOCHS) -> TrainConfig:
    kinds = [one.name for one in fields(GemsConfig) if one.name.endswith("dropout")]
    return small_training(epochs=epochs, model=small_model(**dict.fromkeys(kinds, dropout)))


def settings_of_any_number() -> TrainConfig:
    """Settings under which the number of processes changes nothing.

    Each rank drops out what it likes, and side losses are means over something else than targets.
    """
    names = [one.name for one in fields(GemsConfig) if one.name.endswith(("dropout", "_weight"))]
    return small_training(epochs=2.0, model=small_model(**dict.fromkeys(names, 0.0)))


def run(config: TrainConfig, outputs: Outputs) -> Trained:
    return train(EventLog.from_columns(made_up_columns(seed=3)), config, outputs)


def save(trained: Trained, path: Path) -> None:
    metadata = {"losses": json.dumps(trained.fitted.losses)}
    save_file(trained.model.state_dict(), path, metadata=metadata)


if __name__ == "__main__":
    weights, *checkpoints = sys.argv[1:]
    outputs = Outputs(
        checkpoints=Path(checkpoints[0]) if checkpoints else None,
        checkpoint_every_steps=CHECKPOINT_EVERY_STEPS,
    )
    result = run(settings(dropout=0.1) if checkpoints else settings_of_any_number(), outputs)
    if is_first_process():
        save(result, Path(weights))
