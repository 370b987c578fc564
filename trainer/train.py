"""Trains a GEMs retrieval model on an event log.

Legend: T targets of a group.
"""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from trainer.batches import NUM_TARGETS, Batch, BatchSource, shuffled
from trainer.dataset import (
    TRAIN_QUANTILE,
    EventLog,
    LabelGroups,
    label_groups,
    newest,
    split_time_ms,
    training_groups,
)
from trainer.errors import BudgetError, DivergedError
from trainer.item_vectors import co_occurrence_vectors, with_domains
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems
from trainer.models.lifelong import Compressor
from trainer.semantic_ids import CODE_SIZES, learn_semantic_ids
from trainer.vocabulary import Vocabulary, item_counts

# Share of all steps over which the learning rate rises from 0.
WARM_UP = 0.05
# Learning rate at the end, relative to its peak.
FINAL_RATE = 0.02
# Gradients longer than this are shortened.
MAX_GRADIENT_NORM = 1.0
# Before this share of the budget the clock never touches the learning rate, so that a run which
# stays inside it repeats bit by bit; after it the rate falls as at the end of a full run.
LATE = 0.9


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """How long and how to train; stored with every export.

    Attributes:
        epochs: Passes over the training groups; may be a fraction.
        label_share: Share of the training labels that is learned from, the newest: they resemble
            what will be asked most, and have the fullest histories.
        budget_s: Wall seconds after which training ends early. A run that ends by its budget is not
            repeatable bit by bit, one that ends by its epochs is.
        num_threads: Threads of torch.
    """

    epochs: float = 1.0
    label_share: float = 0.4
    budget_s: float = 150.0
    groups_per_batch: int = 32
    num_targets: int = NUM_TARGETS
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 1
    num_threads: int = 2
    train_quantile: float = TRAIN_QUANTILE
    code_sizes: tuple[int, int, int] = CODE_SIZES
    model: GemsConfig = field(default_factory=GemsConfig)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, and what its evaluation and export need to know of its training."""

    model: Gems
    config: TrainConfig
    vocabulary: Vocabulary
    source: BatchSource
    groups: LabelGroups
    split_ms: int
    losses: list[float]
    seconds: float
    ended_by_budget: bool


def train(log: EventLog, config: TrainConfig) -> Trained:
    """Learn semantic ids and the model from the events up to the split.

    Raises:
        EmptyWindowError: There is nothing to learn from.
        VocabularyError: There are more items than semantic ids.
        DivergedError: The loss is not finite.
        BudgetError: The budget does not reach the first step.
    """
    started = time.monotonic()
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)
    groups = label_groups(log)
    split_ms = split_time_ms(log, quantile=config.train_quantile)
    learnable = newest(training_groups(log, groups, split_ms=split_ms), share=config.label_share)
    vocabulary = Vocabulary.of(log, split_ms=split_ms)
    source = BatchSource.of(
        log,
        vocabulary,
        num_recent=config.model.num_recent,
        num_mid=config.model.num_mid,
        num_older=config.model.num_older_read,
    )
    model = new_model(log, vocabulary, config, tables_ms=split_ms)
    plan = _Plan.of(config, num_groups=len(learnable), started=started)
    losses = _fit(model, source, learnable, config, plan)
    seconds = time.monotonic() - started
    if not losses:
        raise BudgetError(
            f"{seconds:.1f} s went by before the first step, but budget_s is {config.budget_s}; "
            "train again with a larger budget"
        )
    return Trained(
        model=model.eval(),
        config=config,
        vocabulary=vocabulary,
        source=source,
        groups=groups,
        split_ms=split_ms,
        losses=losses,
        seconds=seconds,
        ended_by_budget=len(losses) < plan.num_steps,
    )


def new_model(
    log: EventLog, vocabulary: Vocabulary, config: TrainConfig, *, tables_ms: int
) -> Gems:
    """A model whose items carry vectors and semantic ids read off the log, otherwise untrained.

    Args:
        log: Events; those after `tables_ms` tell nothing but the domain of an item.
        vocabulary: The items to recommend.
        config: Sizes and seed.
        tables_ms: Vectors and counts come from events up to here.
    """
    vectors = co_occurrence_vectors(log, vocabulary, split_ms=tables_ms, seed=config.seed)
    described = with_domains(vectors, log, vocabulary)
    semantic_ids = learn_semantic_ids(described, sizes=config.code_sizes, seed=config.seed)
    return Gems(
        config.model,
        semantic_ids,
        num_domains=len(vocabulary.domain_ids),
        item_vectors_VE=vectors,
        item_counts_V=torch.from_numpy(item_counts(log, vocabulary, until_ms=tables_ms)),
        compressor=Compressor(
            width=config.model.width,
            item_ids_V=torch.from_numpy(vocabulary.item_ids_V),
            domain_ids=torch.from_numpy(vocabulary.domain_ids),
            item_vectors_VE=vectors,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    """When training ends and which learning rate holds until then."""

    num_steps: int
    started: float
    budget_s: float

    @classmethod
    def of(cls, config: TrainConfig, *, num_groups: int, started: float) -> "_Plan":
        steps = max(1, math.ceil(config.epochs * num_groups / config.groups_per_batch))
        return cls(steps, started, config.budget_s)

    def done(self, step: int) -> float:
        """Share of the training that is over, by steps or by time, whichever is further."""
        share = step / self.num_steps
        late = (time.monotonic() - self.started) / self.budget_s
        return max(share, late) if late > max(share, LATE) else share


def _fit(
    model: Gems, source: BatchSource, groups: LabelGroups, config: TrainConfig, plan: _Plan
) -> list[float]:
    optimiser = torch.optim.AdamW(_parameter_groups(model, config), fused=True, betas=(0.9, 0.98))
    rng = np.random.default_rng(config.seed)
    losses: list[float] = []
    num_events = 0
    model.train()
    with _progress() as progress:
        task = progress.add_task("train gems", total=plan.num_steps, note="")
        for part in _repeated(groups, size=config.groups_per_batch, rng=rng):
            done = plan.done(len(losses))
            if done >= 1.0:
                break
            batch = source.batch(part, num_targets=config.num_targets, rng=rng)
            loss = _step(model, optimiser, batch, rate=config.learning_rate * _rate(done))
            if loss is None:
                continue
            losses.append(loss)
            _refuse_divergence(losses)
            num_events += int(batch.recent.mask.sum()) + int(batch.mid.mask.sum())
            rate = num_events / (time.monotonic() - plan.started)
            progress.update(
                task, advance=1, note=f"loss {np.mean(losses[-50:]):.3f}  {rate:,.0f} tokens/s"
            )
    return losses


def _repeated(groups: LabelGroups, *, size: int, rng: np.random.Generator) -> Iterator[LabelGroups]:
    while True:
        yield from shuffled(groups, size=size, rng=rng)


def _step(
    model: Gems, optimiser: torch.optim.Optimizer, batch: Batch, *, rate: float
) -> float | None:
    """The loss of one update, None without any target."""
    if not (batch.targets_BT > 0).any():
        return None
    for group in optimiser.param_groups:
        group["lr"] = rate
    loss = model.loss(batch)
    optimiser.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    nn.utils.clip_grad_norm_(model.parameters(), MAX_GRADIENT_NORM)
    optimiser.step()
    return float(loss.detach())


def _rate(done: float) -> float:
    """Relative learning rate: a linear rise, then half a cosine down."""
    if done < WARM_UP:
        return max(done, 1e-3) / WARM_UP
    wave = 0.5 * (1 + math.cos(math.pi * (done - WARM_UP) / (1 - WARM_UP)))
    return FINAL_RATE + (1 - FINAL_RATE) * wave


def _parameter_groups(model: Gems, config: TrainConfig) -> list[dict[str, object]]:
    """Decay the matrices of linear layers; tables and biases hold counts and stay undecayed."""
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    decayed: list[Tensor] = [p for p in model.parameters() if id(p) in linear]
    kept: list[Tensor] = [p for p in model.parameters() if id(p) not in linear]
    return [
        {"params": [p for p in decayed if p.requires_grad], "weight_decay": config.weight_decay},
        {"params": [p for p in kept if p.requires_grad], "weight_decay": 0.0},
    ]


def _refuse_divergence(losses: list[float]) -> None:
    if not math.isfinite(losses[-1]):
        msg = (
            f"the loss became {losses[-1]} at step {len(losses)}; "
            "train again with a smaller learning_rate"
        )
        raise DivergedError(msg)


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} steps  {task.fields[note]}"),
        TimeRemainingColumn(),
        console=console,
        transient=console.is_terminal,
    )
