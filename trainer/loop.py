"""The training loop, one for all models.

A step is a pure function of the weights, the settings and its own number: the order of a pass
follows from the seed and the number of the pass, everything random in a step from the seed, the
number of the step and, for dropout, the rank. A run that is resumed therefore needs nothing but
weights, optimiser and the number of steps done, and ends in the same weights bit by bit.
"""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Literal, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from trainer.batches import length_batches
from trainer.checkpoint import Checkpoint, Position
from trainer.dataset import Int64s
from trainer.errors import DivergedError, EmptyWindowError
from trainer.optimiser import new_optimiser, relative_rate, set_rate
from trainer.ranks import Ranks, joined
from trainer.run_log import RunLog

# Gradients longer than this are shortened.
MAX_GRADIENT_NORM = 1.0
# Before this share of the budget the clock never touches the learning rate, so that a run which
# stays inside it repeats bit by bit; after it the rate falls as at the end of a full run.
LATE = 0.9
# Kinds of randomness, mixed into the seed so that they do not repeat each other.
_ORDER, _DRAWS, _DROPOUT = range(3)
# What `budget_s` counts.
CLOCKS: Mapping[str, Callable[[], float]] = {"wall": time.monotonic, "processor": time.process_time}

EndedBy = Literal["epochs", "budget", "patience"]
BatchT = TypeVar("BatchT")
BatchT_co = TypeVar("BatchT_co", covariant=True)


class Learner(nn.Module, ABC, Generic[BatchT]):
    """A model as the loop sees it; its trainable parameters are what is learned."""

    @abstractmethod
    def loss(self, batch: BatchT) -> Tensor:
        """The loss, a mean over the targets of the batch; finite where there is none.

        A part that is a mean over something else counts by the targets too when ranks are averaged.
        """

    @abstractmethod
    def num_targets(self, batch: BatchT) -> int:
        """What the mean is over: the weight of this batch among those of other ranks."""

    @abstractmethod
    def num_tokens(self, batch: BatchT) -> int:
        """Events read, padding not counted."""


class Examples(Protocol[BatchT_co]):
    """What is learned from: examples 0, 1, ... of which batches can be made."""

    def lengths(self) -> Int64s:
        """Events of each example, one number per example; a batch is made of similar ones."""

    def batch(self, chosen: Int64s, rng: np.random.Generator) -> BatchT_co:
        """A tuple of tensors, nested as one likes, of the chosen examples.

        The generator is in the same state on all ranks: what is drawn from it per example must not
        depend on which other examples are chosen.
        """


@dataclass(frozen=True, slots=True)
class Stage:
    """A change that the model goes through on the way, as GEMs' three stages of training.

    Attributes:
        begin: Share of the training after which it is entered; 0 is before the first step.
        enter: Called once, and again for each stage passed when a run is resumed.
    """

    begin: float
    enter: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """How long and how to train; stored with every result.

    Attributes:
        epochs: Passes over the examples; may be a fraction.
        budget_s: Seconds after which training ends early. A run that ends by its budget is not
            repeatable bit by bit, one that ends by its epochs is.
        budget_clock: Which seconds: "wall", or those in which this process had a processor, so that
            whatever else the machine does takes little from a comparison.
        examples_per_batch: Of all ranks together.
        num_threads: Threads of torch.
        device: "auto" is the GPU if there is one.
        judge_every_steps, patience: With a judge: how often it is asked, and after how many
            answers that are no better than the best one training ends.
    """

    epochs: float = 1.0
    budget_s: float = 150.0
    budget_clock: Literal["wall", "processor"] = "wall"
    examples_per_batch: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 1
    num_threads: int = 2
    precision: Literal["fp32", "bf16"] = "fp32"
    device: Literal["cpu", "cuda", "auto"] = "cpu"
    judge_every_steps: int = 500
    patience: int = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Outputs:
    """Where a run leaves its traces.

    Attributes:
        checkpoints: Folder of the newest checkpoint. None keeps none.
        checkpoint_every_steps: Between two checkpoints.
        resume: Go on from the checkpoint, if there is one; otherwise it is overwritten.
        tensorboard: Folder of event files. None writes none.
        data_key: Names the data; a checkpoint of other data is refused.
    """

    checkpoints: Path | None = None
    checkpoint_every_steps: int = 500
    resume: bool = False
    tensorboard: Path | None = None
    data_key: str = ""


NO_OUTPUTS = Outputs()


@dataclass(frozen=True, slots=True)
class Fitted:
    """What a run went through; the learner holds the weights.

    Attributes:
        losses: One per step that had targets.
        seconds: By the budget's clock, those of the runs that were resumed included.
    """

    losses: list[float]
    num_steps: int
    num_tokens: int
    seconds: float
    ended_by: EndedBy


def prepare_torch(config: LoopConfig) -> None:
    """Threads and seed are set; call it before the model is made, so that it starts alike."""
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)


def fit(
    learner: Learner[BatchT],
    examples: Examples[BatchT],
    config: LoopConfig,
    *,
    name: str,
    stages: Sequence[Stage] = (),
    judge: Callable[[], float] | None = None,
    outputs: Outputs = NO_OUTPUTS,
    spent_s: float = 0.0,
) -> Fitted:
    """Train a model in place; under torchrun on all its processes together.

    Args:
        learner: Left in evaluation mode, on the CPU.
        examples: At least one.
        config: See there.
        name: Of the model, for progress and logs.
        stages: Ascending by `begin`.
        judge: Quality of the learner as it is, larger is better; it is in evaluation mode then.
            With a judge the best weights are kept, not the last.
        outputs: See there.
        spent_s: Seconds of the budget that getting ready took.

    Raises:
        EmptyWindowError: There are no examples, or none has a target.
        DivergedError: The loss or its gradient is not finite.
        DeviceError: There is no such device.
        CheckpointError: The checkpoint belongs to another run, or is damaged.
    """
    with joined(config.device) as ranks, RunLog.of(name, outputs.tensorboard, ranks) as log:
        learner.to(ranks.device)
        run = _Run(learner, examples, config, ranks, stages)
        keeper = Checkpoint(outputs.checkpoints, ranks=ranks, run_key=_run_key(run, outputs))
        found = keeper.restore(learner, run.optimiser) if outputs.resume else None
        position = found or Position()
        position.seconds += spent_s
        fitted = _train(run, position, keeper, log, judge=judge, outputs=outputs)
        learner.to("cpu").eval()
        if fitted.ended_by == "epochs" and not fitted.losses:
            raise EmptyWindowError("no batch had a target that the model knows; check the window")
        return fitted


class _Run(Generic[BatchT]):
    """What does not change from step to step."""

    def __init__(
        self,
        learner: Learner[BatchT],
        examples: Examples[BatchT],
        config: LoopConfig,
        ranks: Ranks,
        stages: Sequence[Stage],
    ) -> None:
        self.learner = learner
        self.examples = examples
        self.config = config
        self.ranks = ranks
        self.stages = stages
        self.lengths = examples.lengths()
        if len(self.lengths) == 0:
            raise EmptyWindowError("there is no example to learn from; check the window")
        self.batches_per_epoch = len(self.order(0))
        self.num_steps = max(1, math.ceil(config.epochs * self.batches_per_epoch))
        self.parameters = [p for p in learner.parameters() if p.requires_grad]
        self.optimiser = new_optimiser(learner, weight_decay=config.weight_decay)
        may_skip = ranks.num_ranks > 1 and (bool(stages) or self._skips_parameters())
        self.mean_loss = ranks.synchronised(_Loss(learner), may_skip=may_skip)

    def order(self, epoch: int) -> list[Int64s]:
        """The batches of a pass, the same on every rank."""
        rng = np.random.default_rng((self.config.seed, _ORDER, epoch))
        return length_batches(self.lengths, size=self.config.examples_per_batch, rng=rng)

    def batch(self, chosen: Int64s, step: int) -> tuple[BatchT, bool]:
        """This rank's part of a batch, and whether it is only there to keep it in step."""
        rng = np.random.default_rng((self.config.seed, _DRAWS, step))
        part = chosen[self.ranks.number :: self.ranks.num_ranks]
        is_spare = len(part) == 0
        batch = self.examples.batch(chosen[:1] if is_spare else part, rng)
        return on_device(batch, self.ranks.device), is_spare

    def _skips_parameters(self) -> bool:
        """Whether the model as it is leaves parameters out: a switch may have turned them off."""
        batch, _ = self.batch(self.order(0)[0], 0)
        torch.autograd.backward(self.learner.loss(batch))
        skips = any(p.grad is None for p in self.parameters)
        self.optimiser.zero_grad(set_to_none=True)
        return self.ranks.sums(float(skips))[0] > 0

    def done(self, step: int, late: float) -> float:
        """Share of the training that is over, by steps or by time, whichever is further."""
        share = step / self.num_steps
        return max(share, late) if late > max(share, LATE) else share


class _Loss(nn.Module):
    """DistributedDataParallel watches `forward`, which for many models is something else."""

    def __init__(self, learner: Learner[Any]) -> None:
        super().__init__()
        self.learner = learner

    def forward(self, batch: Any) -> Tensor:  # noqa: ANN401 - each learner has its own
        return self.learner.loss(batch)


def _train(
    run: _Run[BatchT],
    position: Position,
    keeper: Checkpoint,
    log: RunLog,
    *,
    judge: Callable[[], float] | None,
    outputs: Outputs,
) -> Fitted:
    clock = CLOCKS[run.config.budget_clock]
    started = clock() - position.seconds
    entered, order = 0, run.order(position.step // run.batches_per_epoch)
    ended_by: EndedBy = "epochs"
    log.begin(run.num_steps, done=position.step)
    run.learner.train()
    while position.step < run.num_steps:
        position.seconds = clock() - started
        late = run.ranks.from_first(position.seconds / run.config.budget_s)
        done = run.done(position.step, late)
        if done >= 1.0:
            ended_by = "budget"
            break
        entered = _enter(run.stages, entered, done)
        epoch, place = divmod(position.step, run.batches_per_epoch)
        if place == 0:
            order = run.order(epoch)
        _step(run, order[place], position, log, rate=run.config.learning_rate * relative_rate(done))
        if judge is not None and position.step % run.config.judge_every_steps == 0:
            _judge(run, position, judge)
            if position.num_worse >= run.config.patience:
                ended_by = "patience"
                break
        if position.step % outputs.checkpoint_every_steps == 0:
            keeper.save(run.learner, run.optimiser, position)
    if judge is not None and position.step % run.config.judge_every_steps != 0:
        # The rate falls at the end of a run: its last weights are often the best.
        _judge(run, position, judge)
    if position.best is not None:
        run.learner.load_state_dict(position.best)
    return Fitted(position.losses, run.num_steps, position.num_tokens, clock() - started, ended_by)


def _enter(stages: Sequence[Stage], entered: int, done: float) -> int:
    while entered < len(stages) and stages[entered].begin <= done:
        stages[entered].enter()
        entered += 1
    return entered


def _step(
    run: _Run[BatchT], chosen: Int64s, position: Position, log: RunLog, *, rate: float
) -> None:
    """One update; nothing is learned from a batch without targets."""
    step, config = position.step, run.config
    torch.manual_seed(_seed(config.seed, step, run.ranks.number))
    batch, is_spare = run.batch(chosen, step)
    set_rate(run.optimiser, rate)
    with torch.autocast(run.ranks.device.type, torch.bfloat16, enabled=config.precision == "bf16"):
        mean = run.mean_loss(batch)
    own = 0 if is_spare else run.learner.num_targets(batch)
    tokens = 0 if is_spare else run.learner.num_tokens(batch)
    num_targets, num_tokens, total = run.ranks.sums(own, tokens, float(mean.detach()) * own)
    run.optimiser.zero_grad(set_to_none=True)
    # Ranks are averaged afterwards: each counts by its share of the targets.
    torch.autograd.backward(mean * (own * run.ranks.num_ranks / max(num_targets, 1.0)))
    norm = float(nn.utils.clip_grad_norm_(run.parameters, MAX_GRADIENT_NORM))
    position.step += 1
    position.num_tokens += int(num_tokens)
    if num_targets == 0:
        return
    loss = total / num_targets
    _refuse_divergence(loss, norm, step)
    run.optimiser.step()
    position.losses.append(loss)
    log.step(position, loss=loss, rate=rate, norm=norm)


def _judge(run: _Run[BatchT], position: Position, judge: Callable[[], float]) -> None:
    """Remember the weights if they are the best so far."""
    run.learner.eval()
    with torch.no_grad():
        quality = run.ranks.from_first(judge() if run.ranks.is_first else 0.0)
    run.learner.train()
    is_better = position.best is None or quality > position.best_quality
    position.num_worse = 0 if is_better else position.num_worse + 1
    if is_better or quality == position.best_quality:
        # Of equals the later ones: they have learned more of what the judge does not see.
        position.best_quality = quality
        position.best = {
            name: value.detach().clone() for name, value in run.learner.state_dict().items()
        }


def _refuse_divergence(loss: float, norm: float, step: int) -> None:
    if not (math.isfinite(loss) and math.isfinite(norm)):
        msg = (
            f"the loss became {loss} and the length of its gradient {norm} at step {step + 1}; "
            "train again with a smaller learning_rate"
        )
        raise DivergedError(msg)


def _seed(seed: int, step: int, rank: int) -> int:
    mixed = np.random.SeedSequence((seed, _DROPOUT, step, rank)).generate_state(1, np.uint64)
    return int(mixed[0] >> np.uint64(1))


def on_device(batch: Any, device: torch.device) -> Any:  # noqa: ANN401 - nested tuples of tensors
    """The same nested tuples of tensors on a device; what is no tensor stays as it is."""
    if isinstance(batch, tuple):
        parts = [on_device(part, device) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch.to(device, non_blocking=True) if isinstance(batch, Tensor) else batch


def _run_key(run: _Run[Any], outputs: Outputs) -> dict[str, Any]:
    """What has to be equal for a checkpoint to be gone on from."""
    config = run.config
    return {
        "data": outputs.data_key,
        "num_examples": len(run.lengths),
        "num_steps": run.num_steps,
        "num_ranks": run.ranks.num_ranks,
        "examples_per_batch": config.examples_per_batch,
        "learning_rate": config.learning_rate,
        "weight_decay": config.weight_decay,
        "seed": config.seed,
        "precision": config.precision,
    }
