"""What a training run shows while it goes on: a progress bar, and TensorBoard's event files."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Self

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from trainer.checkpoint import Position
from trainer.ranks import Ranks

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

# Losses of so many newest steps are averaged in the progress bar.
SHOWN_LOSSES = 50


class RunLog:
    """Shows each step; only the first rank shows anything."""

    def __init__(self, name: str, progress: Progress, folder: Path | None) -> None:
        self._name = name
        self._progress = progress
        self._folder = folder
        self._writer: SummaryWriter | None = None

    @classmethod
    def of(cls, name: str, folder: Path | None, ranks: Ranks) -> Self:
        """A log that writes nothing yet."""
        console = Console(stderr=True)
        progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} steps  {task.fields[note]}"),
            TimeRemainingColumn(),
            console=console,
            transient=console.is_terminal,
            disable=not ranks.is_first,
        )
        return cls(name, progress, folder if ranks.is_first else None)

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def begin(self, num_steps: int, *, done: int) -> None:
        """Show a run of which some steps may be done already."""
        self._task = self._progress.add_task(
            f"train {self._name}", total=num_steps, completed=done, note=""
        )
        self._at = time.monotonic()
        self._tokens: int | None = None
        if self._folder is not None:
            from torch.utils.tensorboard import (  # noqa: PLC0415 - only who writes events pays
                SummaryWriter,
            )

            # A folder shows one run: steps of an earlier one, or those that an interrupted run
            # made after its last checkpoint, are hidden.
            self._writer = SummaryWriter(str(self._folder / self._name), purge_step=done + 1)

    def step(self, position: Position, *, loss: float, rate: float, norm: float) -> None:
        """Show a step that was done."""
        now = time.monotonic()
        before = position.num_tokens if self._tokens is None else self._tokens
        speed = (position.num_tokens - before) / max(now - self._at, 1e-9)
        self._at, self._tokens = now, position.num_tokens
        mean = np.mean(position.losses[-SHOWN_LOSSES:])
        overall = position.num_tokens / max(position.seconds, 1e-9)
        self._progress.update(
            self._task,
            completed=position.step,
            note=f"loss {mean:.3f}  {overall:,.0f} tokens/s",
        )
        if self._writer is None:
            return
        for tag, value in {
            "loss": loss,
            "learning_rate": rate,
            "gradient_norm": norm,
            "tokens_per_s": speed,
        }.items():
            self._writer.add_scalar(tag, value, position.step)
