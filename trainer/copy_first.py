"""The copy head learns first and alone: what people repeat takes seconds to learn, not minutes.

Belongs to the extension `copy`. A step of the head alone costs a small part of a step of the model,
and what it learns of counts and recency does not depend on the encoders. Left to the common steps,
a short training ends before it knows more than counting.

Legend: B labels, T targets, G places for distinct items, D width, I dense items (0 unknown).
"""

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from trainer.batches import Batch, LabelExamples
from trainer.dataset import EventLog
from trainer.loop import Fitted, Learner, LoopConfig, fit
from trainer.models.gems import SMALLEST_SHARE, Gems, copied_from

if TYPE_CHECKING:
    from trainer.models.copying import CopyShares

# Of the seconds of a training, what the head may take at most.
BUDGET_SHARE = 0.2
# Labels of its pass at most: on groceries twelve thousand rank as well as seventy.
LABELS_MAX = 16_384


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


def learn_to_copy(model: Gems, examples: LabelExamples, loop: LoopConfig) -> Fitted | None:
    """Train the copy head in place, one pass at most; None where nobody repeats.

    Args:
        model: Freshly made.
        examples: What all of it will learn from.
        loop: Of the whole training.

    Raises:
        EmptyWindowError: No label has a target that the model knows.
        DivergedError: The loss is not finite.
        DeviceError: There is no such device.
    """
    if not model.config.copies or not has_repeats(examples.source.log):
        return None
    # Without the old events, which the head does not read.
    read = replace(examples, source=replace(examples.source, num_older=0))
    epochs = min(1.0, LABELS_MAX / max(1, len(examples.groups)))
    own = replace(loop, epochs=epochs, budget_s=BUDGET_SHARE * loop.budget_s)
    return fit(CopyLearner(model), read, own, name="copy head")


def has_repeats(log: EventLog) -> bool:
    """Whether any user met an item twice."""
    order = np.lexsort((log.item_id_N, log.user_N))
    same_user_N = np.diff(log.user_N[order]) == 0
    return bool((same_user_N & (np.diff(log.item_id_N[order]) == 0)).any())
