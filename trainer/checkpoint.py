"""Where a training run stands, on disk: one safetensors file, replaced as a whole.

safetensors rather than torch.save: the file is read without unpickling anything, and what is no
tensor is a line of JSON in its header.
"""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.errors import CheckpointError
from trainer.ranks import Ranks

FILE: Final = "checkpoint.safetensors"
VERSION: Final = 1


@dataclass(slots=True)
class Position:
    """How far a run is.

    Attributes:
        step: Steps done.
        seconds: Wall seconds spent, over all processes that ran it.
        best: Weights of the best answer of the judge.
        num_worse: Answers of the judge since that were no better.
    """

    step: int = 0
    num_tokens: int = 0
    seconds: float = 0.0
    losses: list[float] = field(default_factory=list)
    best: dict[str, Tensor] | None = None
    best_quality: float = 0.0
    num_worse: int = 0


class Checkpoint:
    """The newest checkpoint of one run; without a folder nothing is kept or found."""

    def __init__(self, folder: Path | None, *, ranks: Ranks, run_key: dict[str, Any]) -> None:
        self._folder = folder
        self._ranks = ranks
        self._run_key = run_key

    def save(self, model: nn.Module, optimiser: torch.optim.Optimizer, position: Position) -> None:
        """The file holds this position once the call returns; a crash leaves the one before."""
        if self._folder is None:
            return
        if self._ranks.is_first:
            self._folder.mkdir(parents=True, exist_ok=True)
            path = self._folder / FILE
            written = path.with_suffix(".new")
            save_file(
                _tensors(model, optimiser, position), written, metadata=self._header(position)
            )
            _sync(written)
            written.replace(path)
            _sync(self._folder)
        self._ranks.wait()

    @staticmethod
    def is_in(folder: Path | None) -> bool:
        """Whether a folder holds a checkpoint, of whatever run."""
        return folder is not None and (folder / FILE).is_file()

    def restore(self, model: nn.Module, optimiser: torch.optim.Optimizer) -> Position | None:
        """Load the checkpoint into model and optimiser, if there is one.

        Raises:
            CheckpointError: It is of another run, or unreadable.
        """
        if self._folder is None or not self.is_in(self._folder):
            return None
        path = self._folder / FILE
        try:
            with safe_open(path, framework="pt") as file:
                header = json.loads((file.metadata() or {}).get("run", "{}"))
                self._refuse_another_run(path, header)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            msg = f"{path} cannot be read ({error}); remove it and train from the start"
            raise CheckpointError(msg) from error
        model.load_state_dict(_under(tensors, "model."))
        _load_optimiser(optimiser, _under(tensors, "optimiser."))
        return Position(
            step=header["step"],
            num_tokens=header["num_tokens"],
            seconds=header["seconds"],
            losses=tensors["losses"].tolist(),
            best=_under(tensors, "best.") or None,
            best_quality=header["best_quality"],
            num_worse=header["num_worse"],
        )

    def _header(self, position: Position) -> dict[str, str]:
        header = {
            "version": VERSION,
            "key": self._run_key,
            "step": position.step,
            "num_tokens": position.num_tokens,
            "seconds": position.seconds,
            "best_quality": position.best_quality,
            "num_worse": position.num_worse,
        }
        return {"run": json.dumps(header)}

    def _refuse_another_run(self, path: Path, header: dict[str, Any]) -> None:
        found = {"version": header.get("version"), **header.get("key", {})}
        wanted = {"version": VERSION, **self._run_key}
        other = [name for name in wanted if found.get(name) != wanted[name]]
        if other:
            name = other[0]
            msg = (
                f"{path} is of a run with {name} {found.get(name)!r}, this one has "
                f"{wanted[name]!r}; name another folder, or remove the file"
            )
            raise CheckpointError(msg)


def _tensors(
    model: nn.Module, optimiser: torch.optim.Optimizer, position: Position
) -> dict[str, Tensor]:
    named = {f"model.{name}": value for name, value in model.state_dict().items()}
    for number, state in optimiser.state_dict()["state"].items():
        named |= {f"optimiser.{number}.{name}": value for name, value in state.items()}
    named |= {f"best.{name}": value for name, value in (position.best or {}).items()}
    named["losses"] = torch.tensor(position.losses, dtype=torch.float64)
    # safetensors wants every tensor to own its memory.
    return {name: value.detach().cpu().clone().contiguous() for name, value in named.items()}


def _load_optimiser(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = value
    groups = optimiser.state_dict()["param_groups"]
    optimiser.load_state_dict({"state": state, "param_groups": groups})


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): value
        for name, value in tensors.items()
        if name.startswith(prefix)
    }


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
