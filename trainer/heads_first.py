"""Heads that learn first and alone, before the common steps of all parts.

Belongs to the extensions `copy` and `dense`. A step of a head alone costs a small part of a step of
the model. What people repeat, by count and recency, does not depend on the encoders; left to the
common steps, a short training ends before the copy head knows more than counting. Where nobody
repeats anything the dense head learns instead, and the recent encoder with it: each event is a
target there, and a label is one in the common steps.

Legend: B labels, T targets, G places for distinct items, D width, I dense items (0 unknown).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from trainer.batches import Batch, LabelExamples
from trainer.dataset import EventLog
from trainer.loop import Fitted, Learner, LoopConfig, fit
from trainer.models.gems import Gems
from trainer.models.reading import SMALLEST_SHARE, copied_from

if TYPE_CHECKING:
    from trainer.models.copying import CopyShares

# Of the seconds of a training, what the copy head may take at most.
COPY_BUDGET_SHARE = 0.2
# Labels of its pass at most: on groceries twelve thousand rank as well as seventy.
COPY_LABELS_MAX = 16_384
# The same for the dense head, whose steps run the recent encoder. On films thirty thousand labels,
# a target for each of their events, rank as well as twice as many.
DENSE_BUDGET_SHARE = 0.6
DENSE_LABELS_MAX = 32_768
# Share of the events that must repeat an item for people to be said to repeat themselves: a log of
# once-only acts may hold one twice for other reasons.
REPEAT_SHARE = 0.001


class CopyLearner(Learner[Batch]):
    """The copy head as the training loop sees it, before a decoder tells it anything."""

    vector_IE: Tensor

    def __init__(self, model: Gems) -> None:
        super().__init__()
        self.copy = model.copy
        self._config = model.config
        self.register_buffer("vector_IE", model.item.weight.detach(), persistent=False)

    def loss(self, batch: Batch) -> Tensor:
        """Mean negative log-share of the targets, in which one that is no repeat counts nothing."""
        seen = self.copy.occurrences(*copied_from(self._config, batch.recent, batch.mid))
        state_BD = self.vector_IE.new_zeros(len(batch.targets_BT), self._config.width)
        shares: CopyShares = self.copy(seen, self.vector_IE[seen.item_BG], state_BD)
        share_BT = shares.of(batch.targets_BT)
        known_BT = batch.targets_BT > 0
        log_BT = share_BT.clamp(min=SMALLEST_SHARE).log()
        loss: Tensor = -(log_BT * (known_BT & (share_BT > 0))).sum()
        return loss / known_BT.sum().clamp(min=1)

    def num_targets(self, batch: Batch) -> int:
        """See `Learner`."""
        return int((batch.targets_BT > 0).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See `Learner`."""
        return int(batch.recent.mask.sum()) + int(batch.mid.mask.sum())


class DenseLearner(Learner[Batch]):
    """The dense head and the recent encoder as the training loop sees them."""

    def __init__(self, model: Gems) -> None:
        super().__init__()
        self.model = model

    def loss(self, batch: Batch) -> Tensor:
        """See `Gems.dense_loss`."""
        return self.model.dense_loss(batch)

    def num_targets(self, batch: Batch) -> int:
        """See `Learner`; every event has a target, but for those of the newest time."""
        return self.num_tokens(batch) + int((batch.targets_BT > 0).sum())

    def num_tokens(self, batch: Batch) -> int:
        """See `Learner`."""
        return int(batch.recent.mask.sum())


def learn_heads(model: Gems, examples: LabelExamples, loop: LoopConfig) -> list[Fitted]:
    """Train in place the heads that learn first, those that the model and the log have a use for.

    Args:
        model: Freshly made.
        examples: What all of it will learn from.
        loop: Of the whole training.

    Raises:
        EmptyWindowError: No label has a target that the model knows.
        DivergedError: The loss is not finite.
        DeviceError: There is no such device.
    """
    fitted = []
    if model.config.copies and has_repeats(examples.source.log):
        fitted.append(_learn_to_copy(model, examples, loop))
    if model.config.dense == "on":
        fitted.append(_learn_nearness(model, examples, loop))
    return fitted


def _learn_to_copy(model: Gems, examples: LabelExamples, loop: LoopConfig) -> Fitted:
    # Without the old events, which the head does not read.
    read = replace(examples, source=replace(examples.source, num_older=0))
    own = _part_of(loop, examples, labels_max=COPY_LABELS_MAX, budget_share=COPY_BUDGET_SHARE)
    return fit(CopyLearner(model), read, own, name="copy head")


def _learn_nearness(model: Gems, examples: LabelExamples, loop: LoopConfig) -> Fitted:
    # Of the mid-term stream, which the head does not read, no more than a source must have.
    read = replace(examples, source=replace(examples.source, num_older=0, num_mid=1))
    own = _part_of(loop, examples, labels_max=DENSE_LABELS_MAX, budget_share=DENSE_BUDGET_SHARE)
    return fit(DenseLearner(model), read, own, name="dense head")


def _part_of(
    loop: LoopConfig, examples: LabelExamples, *, labels_max: int, budget_share: float
) -> LoopConfig:
    """One pass at most, of so many labels and seconds at most."""
    epochs = min(1.0, labels_max / max(1, len(examples.groups)))
    return replace(loop, epochs=epochs, budget_s=budget_share * loop.budget_s)


def has_repeats(log: EventLog) -> bool:
    """Whether people meet an item twice, in more than `REPEAT_SHARE` of the events."""
    order = np.lexsort((log.item_id_N, log.user_N))
    same_user_N = np.diff(log.user_N[order]) == 0
    repeated_N = same_user_N & (np.diff(log.item_id_N[order]) == 0)
    return bool(repeated_N.sum() > REPEAT_SHARE * log.num_events)
