"""Trains a GEMs retrieval model on an event log; how is in trainer/loop.py."""

import hashlib
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor

from trainer.batches import NUM_TARGETS, PADDING, Batch, BatchSource, LabelExamples
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
from trainer.errors import BudgetError
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
from trainer.semantic_ids import CODE_SIZES, learn_semantic_ids
from trainer.vocabulary import Vocabulary, item_counts

# Shares of a training after which its stages begin. The paper stops each when its loss has
# converged and calls the third short; shares end within a given budget.
STAGE_BEGINS = (0.0, 0.6, 0.85)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What to train, how long and how; stored with every export.

    Attributes:
        label_share: Share of the training labels that is learned from, the newest: they resemble
            what will be asked most, and have the fullest histories.
    """

    label_share: float = 0.4
    num_targets: int = NUM_TARGETS
    train_quantile: float = TRAIN_QUANTILE
    code_sizes: tuple[int, int, int] = CODE_SIZES
    model: GemsConfig = field(default_factory=GemsConfig)
    loop: LoopConfig = field(default_factory=LoopConfig)


@dataclass(frozen=True, slots=True)
class Trained:
    """A model, and what its evaluation and export need to know of its training.

    Attributes:
        count_V: Events of each item that the priors started from.
        domain_V: Dense domain of each item that its semantic id was made with.
    """

    model: Gems
    config: TrainConfig
    vocabulary: Vocabulary
    source: BatchSource
    groups: LabelGroups
    split_ms: int
    fitted: Fitted
    count_V: Int64s
    domain_V: Int64s


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
    learnable = newest(training_groups(log, groups, split_ms=split_ms), share=config.label_share)
    vocabulary = Vocabulary.of(log, split_ms=split_ms)
    source = gems_source(log, vocabulary, config.model)
    model = new_model(log, vocabulary, config, tables_ms=split_ms, compressor=compressor)
    fitted = fit(
        GemsLearner(model),
        LabelExamples(source, learnable, config.num_targets),
        config.loop,
        name="gems",
        outputs=replace(outputs, data_key=data_key(log, config)),
        stages=training_stages(model),
        spent_s=clock() - started,
    )
    refuse_no_step(fitted, config.loop)
    return Trained(
        model=model,
        config=config,
        vocabulary=vocabulary,
        source=source,
        groups=groups,
        split_ms=split_ms,
        fitted=fitted,
        count_V=item_counts(log, vocabulary, until_ms=split_ms),
        domain_V=domains_of(log, vocabulary),
    )


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

    Args:
        log: Events; those after `tables_ms` tell nothing but the domain of an item.
        vocabulary: The items to recommend.
        config: Sizes and seed.
        tables_ms: Vectors and counts come from events up to here.
        compressor: One to be used and frozen; a fresh one if left out.
    """
    vectors = co_occurrence_vectors(log, vocabulary, split_ms=tables_ms, seed=config.loop.seed)
    described = with_domains(vectors, log, vocabulary)
    semantic_ids = learn_semantic_ids(described, sizes=config.code_sizes, seed=config.loop.seed)
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
