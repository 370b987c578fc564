"""Two processes that train together take the steps that one takes alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.trainer.training_program import run, settings_of_any_number
from trainer.errors import DeviceError
from trainer.loop import Outputs
from trainer.ranks import chosen_device

# Sums of float32 in another order.
TOLERANCE = 1e-5


def test_two_processes_have_the_loss_curve_of_one(tmp_path: Path) -> None:
    """Some batches are smaller than the number of ranks; one rank then has nothing of its own."""
    weights = tmp_path / "weights.safetensors"
    subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", "2", "-m", "tests.trainer.training_program", str(weights)),
        ],
        check=True,
        timeout=120,
    )
    alone = run(settings_of_any_number(), Outputs())
    with safe_open(weights, framework="pt") as file:
        losses = json.loads(file.metadata()["losses"])
        assert losses == pytest.approx(alone.fitted.losses, abs=TOLERANCE)
        assert losses[-1] < losses[0]
        for name, value in alone.model.state_dict().items():
            # A softmax takes this away again: its gradient is rounding, which AdamW makes steps of.
            if name == "copy.score.bias":
                continue
            together = file.get_tensor(name)
            assert torch.allclose(together.float(), value.float(), atol=1e-3), name


def test_a_missing_gpu_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(DeviceError, match="sees no GPU"):
        chosen_device("cuda")
    assert chosen_device("auto").type == "cpu"
