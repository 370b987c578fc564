"""Trains a GEMs retrieval model on an event log; how is in trainer/loop.py."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from features.sources import HALF_LIFE_H_DEFAULT
from trainer.batches import NUM_TARGETS, PADDING, Batch, BatchSource, LabelExamples
from trainer.calibration import calibrate
from trainer.checkpoint import Checkpoint
from trainer.counted import LiveSources
from trainer.dataset import (
    TRAIN_QUANTILE,
    EventLog,
    Int64s,
    LabelGroups,
    label_groups,
    newest,
    split_time_ms,
    training_groups,
)
from trainer.errors import BudgetError, EmptyWindowError
from trainer.evaluate import tuning_groups
from trainer.heads_first import has_repeats, learn_heads
from trainer.item_vectors import co_occurrence_vectors, domains_of, with_domains
from trainer.loop import (
    CLOCKS,
    NO_OUTPUTS,
    Fitted,
    Learner,
    LoopConfig,
    Outputs,
    Stage,
    fit,
    prepare_torch,
)
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems
from trainer.models.indexer import DISTIL, FULL, TOP_K
from trainer.models.lifelong import Compressor
from trainer.models.sources import SourceGate
from trainer.ranks import joined
from trainer.semantic_ids import CODE_SIZES, learn_semantic_ids
from trainer.served import Served
from trainer.vocabulary import Vocabulary, item_counts, item_users

# The newest share of event times before the split, which nothing is learned from: there the model
# is weighed against the live sources. Where it holds no label, nothing is weighed.
CALIBRATION_SHARE = 0.02
# Labels of it that are looked at, at most; drawn by seed.
CALIBRATION_USERS = 800
CALIBRATION_TIMES_PER_USER = 2
CALIBRATION_SEED = 5
# Shares of a training after which its stages begin. The paper stops each when its loss has
# converged and calls the third short; shares end within a given budget.
STAGE_BEGINS = (0.0, 0.6, 0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train, how long and how; stored with every export.

    Attributes:
        label_share: Share of the training labels that is learned from, the newest: they resemble
            what will be asked most, and have the fullest histories.
        half_life_h: Of the live source of recent popularity, in hours.
    """

    label_share: float = 0.4
    num_targets: int = NUM_TARGETS
    train_quantile: float = TRAIN_QUANTILE
    half_life_h: int = HALF_LIFE_H_DEFAULT
    code_sizes: tuple[int, int, int] = CODE_SIZES
    model: GemsConfig = field(default_factory=GemsConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, and what its evaluation and export need to know of its training.

    Attributes:
        split_ms: The end of the training window, its calibration part included.
        count_V: Events of each item that the priors stand on.
        domain_V: Dense domain of each item that its semantic id was made with.
        gate: Weighs the model and the live sources.
    """

    model: Gems
    config: TrainConfig
    vocabulary: Vocabulary
    source: BatchSource
    groups: LabelGroups
    split_ms: int
    fitted: Fitted
    count_V: NDArray[np.float64]
    domain_V: Int64s
    gate: SourceGate = field(default_factory=SourceGate.untuned)


class GemsLearner(Learner[Batch]):
    """GEMs as the training loop sees it: the mean negative log-likelihood per target."""

    def __init__(self, model: Gems) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: Batch) -> Tensor:
        """See `Learner`."""
        return self.model.loss(batch)

    def num_targets(self, batch: Batch) -> int:
        """See `Learner`."""
        return int((batch.targets_BT > 0).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See `Learner`."""
        older = 0 if batch.older is None else int((batch.older.item != PADDING).sum())
        return int(batch.recent.mask.sum()) + int(batch.mid.mask.sum()) + older


def train(
    log: EventLog,
    config: TrainConfig,
    outputs: Outputs = NO_OUTPUTS,
    *,
    compressor: Compressor | None = None,
) -> Trained:
    """Learn semantic ids and the model from the events up to the split.

    The newest part before the split is kept from the model, to weigh it against the live sources.

    Args:
        log: The events.
        config: What and how long.
        outputs: Where the run leaves its traces.
        compressor: Of an earlier model, used as it is: the new model then reads the memories that
            exist. Left out, a compressor is learned, and memories have to be made anew.

    Raises:
        EmptyWindowError: There is nothing to learn from.
        VocabularyError: There are more items than semantic ids.
        DivergedError: The loss is not finite.
        BudgetError: The budget does not reach the first step.
        DeviceError: There is no such device.
        CheckpointError: The checkpoint belongs to another run, or is damaged.
    """
    clock = CLOCKS[config.loop.budget_clock]
    started = clock()
    prepare_torch(config.loop)
    groups = label_groups(log)
    split_ms = split_time_ms(log, quantile=config.train_quantile)
    fit_ms = fit_time_ms(log, groups, config)
    learnable = newest(training_groups(log, groups, split_ms=fit_ms), share=config.label_share)
    vocabulary = Vocabulary.of(log, split_ms=fit_ms)
    model = new_model(log, vocabulary, config, tables_ms=fit_ms, compressor=compressor)
    config = replace(config, model=model.config)
    source = gems_source(log, vocabulary, config.model)
    fitted = _learned(
        model,
        LabelExamples(source, learnable, config.num_targets),
        config.loop,
        replace(outputs, data_key=data_key(log, config)),
        spent_s=clock() - started,
    )
    trained = Trained(
        model=model,
        config=config,
        vocabulary=vocabulary,
        source=source,
        groups=groups,
        split_ms=split_ms,
        fitted=fitted,
        count_V=item_counts(log, vocabulary, until_ms=fit_ms).astype(np.float64),
        domain_V=domains_of(log, vocabulary),
    )
    return with_gate(trained, calibration_groups(log, groups, fit_ms=fit_ms, split_ms=split_ms))


def _learned(
    model: Gems, examples: LabelExamples, loop: LoopConfig, outputs: Outputs, *, spent_s: float
) -> Fitted:
    """Heads learn first, then all of the model; what they go through as one."""
    clock = CLOCKS[loop.budget_clock]
    started = clock() - spent_s
    heads: list[Fitted] = []
    # Processes that train together stay together from one loop to the next.
    with joined(loop.device):
        # A run that is resumed has them in its checkpoint.
        if not (outputs.resume and Checkpoint.is_in(outputs.checkpoints)):
            heads = learn_heads(model, examples, loop)
        fitted = fit(
            GemsLearner(model),
            examples,
            loop,
            name="gems",
            outputs=outputs,
            stages=training_stages(model),
            spent_s=clock() - started,
        )
    refuse_no_step(fitted, loop)
    if any(head.ended_by == "budget" for head in heads):
        # Not repeatable either.
        return replace(fitted, ended_by="budget")
    return fitted


def fit_time_ms(log: EventLog, groups: LabelGroups, config: TrainConfig) -> int:
    """The last millisecond that weights and tables know; the split where little comes before it."""
    split_ms = split_time_ms(log, quantile=config.train_quantile)
    fit_ms = split_time_ms(log, quantile=config.train_quantile - CALIBRATION_SHARE)
    try:
        training_groups(log, groups, split_ms=fit_ms)
    except EmptyWindowError:
        return split_ms
    return fit_ms


def calibration_groups(
    log: EventLog, groups: LabelGroups, *, fit_ms: int, split_ms: int
) -> LabelGroups:
    """A sample of the labels after `fit_ms` up to the split; there may be none."""
    window = groups.select((groups.time_ms_G > fit_ms) & (groups.time_ms_G <= split_ms))
    if len(window) == 0:
        return window
    return tuning_groups(
        log,
        window,
        split_ms=fit_ms,
        seed=CALIBRATION_SEED,
        max_users=CALIBRATION_USERS,
        max_groups_per_user=CALIBRATION_TIMES_PER_USER,
    )


def with_gate(trained: Trained, groups: LabelGroups) -> Trained:
    """The same with its live sources weighed by labels that the model was not fitted on."""
    return replace(trained, gate=calibrate(served(trained), groups))


def served(trained: Trained) -> Served:
    """The trained model with its live sources over the log it was trained on."""
    live = LiveSources.of(trained.source.log, half_life_h=trained.config.half_life_h)
    return Served(trained.model, trained.vocabulary, trained.source, live)


def gems_source(log: EventLog, vocabulary: Vocabulary, config: GemsConfig) -> BatchSource:
    """Batches of what a model of this configuration reads."""
    return BatchSource.of(
        log,
        vocabulary,
        num_recent=config.num_recent,
        num_mid=config.num_mid,
        num_older=config.num_older_read,
    )


def refuse_no_step(fitted: Fitted, loop: LoopConfig) -> None:
    """Return if anything was learned.

    Raises:
        BudgetError: The budget was spent on getting ready.
    """
    if not fitted.losses:
        raise BudgetError(
            f"{fitted.seconds:.1f} s went by before the first step, but budget_s is "
            f"{loop.budget_s}; train again with a larger budget"
        )


def training_stages(model: Gems) -> list[Stage]:
    """The three stages of the paper's section on training; none for a model without an indexer."""
    if model.config.used_indexer is None:
        return []
    first, second, third = STAGE_BEGINS
    return [
        Stage(first, partial(model.set_stage, FULL)),
        Stage(second, partial(model.set_stage, DISTIL)),
        Stage(third, partial(model.set_stage, TOP_K)),
    ]


def new_model(
    log: EventLog,
    vocabulary: Vocabulary,
    config: TrainConfig,
    *,
    tables_ms: int,
    compressor: Compressor | None = None,
) -> Gems:
    """A model whose items carry vectors and semantic ids read off the log, otherwise untrained.

    Its own configuration is that of `config`, settled by the log.

    Args:
        log: Events; those after `tables_ms` tell nothing but the domain of an item, and whether
            people repeat themselves.
        vocabulary: The items to recommend.
        config: Sizes and seed.
        tables_ms: Vectors and counts come from events up to here.
        compressor: One to be used and frozen; a fresh one if left out.
    """
    vectors = co_occurrence_vectors(log, vocabulary, split_ms=tables_ms, seed=config.loop.seed)
    described = with_domains(vectors, log, vocabulary)
    semantic_ids = learn_semantic_ids(described, sizes=config.code_sizes, seed=config.loop.seed)
    return Gems(
        config.model.settled(repeats=has_repeats(log), num_items=vocabulary.num_items),
        semantic_ids,
        num_domains=len(vocabulary.domain_ids),
        item_vectors_VE=vectors,
        item_counts_V=torch.from_numpy(item_counts(log, vocabulary, until_ms=tables_ms)),
        item_users_V=torch.from_numpy(item_users(log, vocabulary, until_ms=tables_ms)),
        compressor=Compressor(
            width=config.model.width,
            item_ids_V=torch.from_numpy(vocabulary.item_ids_V),
            domain_ids=torch.from_numpy(vocabulary.domain_ids),
            item_vectors_VE=vectors,
        )
        if compressor is None
        else compressor.requires_grad_(requires_grad=False),
    )


def data_key(log: EventLog, config: TrainConfig) -> str:
    """Hex digits that change with the events and with what the model is made of."""
    digest = hashlib.blake2b(digest_size=16)
    for column in (log.user_N, log.item_id_N, log.event_time_ms_N, log.ordinal_N):
        digest.update(column.tobytes())
    digest.update(repr(replace(config, loop=LoopConfig())).encode())
    return digest.hexdigest()
