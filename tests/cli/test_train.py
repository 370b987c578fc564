"""`moveline train` as processes: killed and gone on with, and started by torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from compose.training_log import FILE as EVENTS_FILE
from features.lake_revisions import Place
from tests.lake.writing import append, event
from tests.small import REPOSITORY, UNCOMPILED
from tests.waiting import until
from trainer.checkpoint import FILE as CHECKPOINT_FILE

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from features.redis import StateStore

NUM_USERS = 12
NUM_EVENTS = 240
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
TRAIN = ("-m", "compose.cli", "train", "--epochs", "2", "--threads", "1")


def add_events(
    lake: Path, *, seed: int, topic: str = "moveline.events", first_item: int = 100
) -> None:
    """Users who keep to a handful of items each."""
    rng = np.random.default_rng(seed)
    place = Place(lake, topic, 0)
    append(
        place,
        [
            event(
                NUM_EVENTS * seed + number,
                user_id=user,
                item_id=first_item + 5 * user + int(rng.integers(6)),
            )
            for number, user in enumerate(rng.integers(0, NUM_USERS, NUM_EVENTS).tolist())
        ],
    )


@pytest.fixture
def surroundings(stack: LocalStack, store: StateStore, tmp_path: Path) -> dict[str, str]:
    """The environment of a command that has Redis, rules in it, and a lake."""
    store.claim_generation()
    add_events(tmp_path / "run" / "lake", seed=1)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MOVELINE_")}
    return {
        **clean,
        **UNCOMPILED,
        "PYTHONPATH": str(REPOSITORY),
        "MOVELINE_REDIS__URL": stack.addresses.redis,
        "MOVELINE_GENERATION": f"g{store.generation}",
        "MOVELINE_RUN_DIR": str(tmp_path / "run"),
        "MOVELINE_TRAINING__CHECKPOINT_EVERY_STEPS": "2",
    }


def manifest(package: Path) -> dict[str, Any]:
    read: dict[str, Any] = json.loads((package / "manifest.json").read_text(encoding="utf-8"))
    return read


def train(surroundings: dict[str, str], folder: Path, *arguments: str) -> dict[str, Any]:
    subprocess.run(
        [sys.executable, *arguments, "--out", str(folder)],
        env=surroundings,
        cwd=folder.parent,
        check=True,
        timeout=120,
    )
    return manifest(folder)


def test_a_killed_command_goes_on_on_the_events_it_began_with(
    surroundings: dict[str, str], tmp_path: Path
) -> None:
    whole = train(surroundings, tmp_path / "whole", *TRAIN)
    checkpoints = tmp_path / "run" / "checkpoints"
    assert list(checkpoints.iterdir()) == []
    killed = subprocess.Popen(
        [sys.executable, *TRAIN, "--out", str(tmp_path / "never")],
        env=surroundings,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
    )
    try:
        until((checkpoints / CHECKPOINT_FILE).is_file, what="a first checkpoint")
    finally:
        killed.kill()
        killed.wait()
    assert not (tmp_path / "never").exists()
    assert (checkpoints / EVENTS_FILE).is_file()
    add_events(tmp_path / "run" / "lake", seed=2)
    resumed = train(surroundings, tmp_path / "resumed", *TRAIN, "--resume")
    for key in ("window_to", "split_ms", "metrics", "num_items"):
        assert resumed[key] == whole[key], key
    assert resumed["training"]["final_loss"] == whole["training"]["final_loss"]
    assert resumed["files"] == whole["files"]
    assert list(checkpoints.iterdir()) == []


def test_two_processes_of_torchrun_write_one_package(
    surroundings: dict[str, str], tmp_path: Path
) -> None:
    logs = tmp_path / "logs"
    together = train(
        surroundings, tmp_path / "together", *TORCHRUN, *TRAIN, "--tensorboard", str(logs)
    )
    assert together["training"]["ended_by"] == "epochs"
    assert together["config"]["loop"]["precision"] == "fp32"
    # One process wrote them.
    assert len(list((logs / "gems").iterdir())) == 1
