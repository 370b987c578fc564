"""A training that was killed ends in the same weights as one that was not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.trainer.training_program import CHECKPOINT_EVERY_STEPS, run, settings
from tests.waiting import until
from trainer.checkpoint import FILE
from trainer.errors import CheckpointError
from trainer.loop import Outputs
from trainer.train import Trained

DROPOUT = 0.1


def outputs(folder: Path, *, resume: bool = True) -> Outputs:
    return Outputs(checkpoints=folder, checkpoint_every_steps=CHECKPOINT_EVERY_STEPS, resume=resume)


def assert_same(one: Trained, other: Trained) -> None:
    assert one.fitted.losses == other.fitted.losses
    weights = other.model.state_dict()
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, weights[name]), name


def header_of(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()["run"])


def test_killed_in_the_middle_and_resumed_the_weights_are_the_same(tmp_path: Path) -> None:
    """A kill -9 of a real process, right after its first checkpoint appeared."""
    killed = subprocess.Popen(
        [sys.executable, "-m", "tests.trainer.training_program", "never", str(tmp_path)],
        stderr=subprocess.DEVNULL,
    )
    try:
        until((tmp_path / FILE).is_file, what="a first checkpoint")
    finally:
        killed.kill()
        assert killed.wait() == -9
    assert '"step": ' in header_of(tmp_path / FILE)
    resumed = run(settings(dropout=DROPOUT), outputs(tmp_path))
    whole = run(settings(dropout=DROPOUT), Outputs())
    assert_same(resumed, whole)
    assert resumed.fitted.num_tokens == whole.fitted.num_tokens


def test_the_last_steps_of_a_run_can_be_repeated(tmp_path: Path) -> None:
    """Its last checkpoint stands a few steps before the end, inside the second pass."""
    config = settings(dropout=DROPOUT, epochs=2.0)
    whole = run(config, outputs(tmp_path, resume=False))
    again = run(config, outputs(tmp_path))
    assert_same(again, whole)


def test_without_resume_an_old_checkpoint_is_overwritten(tmp_path: Path) -> None:
    config = settings(dropout=DROPOUT, epochs=1.0)
    run(config, outputs(tmp_path))
    before = header_of(tmp_path / FILE)
    other = settings(dropout=DROPOUT, epochs=3.0)
    run(other, outputs(tmp_path, resume=False))
    assert header_of(tmp_path / FILE) != before


def test_another_run_is_refused_by_name(tmp_path: Path) -> None:
    run(settings(dropout=DROPOUT, epochs=1.0), outputs(tmp_path))
    with pytest.raises(CheckpointError, match="num_steps"):
        run(settings(dropout=DROPOUT, epochs=2.0), outputs(tmp_path))
    with pytest.raises(CheckpointError, match="data"):
        run(settings(dropout=0.0, epochs=1.0), outputs(tmp_path))


def test_a_torn_file_is_refused_with_the_way_out(tmp_path: Path) -> None:
    run(settings(dropout=DROPOUT, epochs=1.0), outputs(tmp_path))
    path = tmp_path / FILE
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="remove it"):
        run(settings(dropout=DROPOUT, epochs=1.0), outputs(tmp_path))


def test_what_a_crash_left_half_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / FILE).with_suffix(".new").write_bytes(b"half")
    config = settings(dropout=DROPOUT, epochs=1.0)
    assert_same(run(config, outputs(tmp_path)), run(config, Outputs()))
