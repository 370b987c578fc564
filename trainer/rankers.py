"""How a trained model becomes a ranking of the catalogue.

A model knows the items of its training; a ranking names them by their dense index in the catalogue
that the evaluation uses. Where items are not met twice, those already met are left out.

Legend: G labels, K places of a list, I dense items of the model (0 unknown).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from trainer.baselines import Scored, ScoredRanker, seen_items
from trainer.batches import BatchSource, Stream
from trainer.dataset import Int64s, LabelGroups
from trainer.models.beam import BEAM_WIDTH, generate
from trainer.models.gems import Gems
from trainer.models.reading import Reading
from trainer.models.sequence import SequenceModel
from trainer.streaming_evaluation import LIST_LENGTH
from trainer.vocabulary import UNKNOWN, Vocabulary


@dataclass(frozen=True, slots=True)
class Naming:
    """The catalogue's dense index of each item of a model, and whether items are met twice."""

    catalogue_I: Int64s
    repeats: bool

    @classmethod
    def of(cls, catalogue: Vocabulary, vocabulary: Vocabulary, *, repeats: bool) -> "Naming":
        """Look up each item of a model's vocabulary in the catalogue."""
        known = catalogue.index_items(vocabulary.item_ids_V)
        return cls(np.concatenate(([UNKNOWN], known)), repeats)

    def allowed(self, source: BatchSource, groups: LabelGroups) -> Tensor:
        """True where a label may be answered with an item [G, I]."""
        allowed_GI = torch.ones(len(groups), len(self.catalogue_I), dtype=torch.bool)
        allowed_GI[:, UNKNOWN] = False
        if not self.repeats:
            for number in range(len(groups)):
                allowed_GI[number, torch.from_numpy(seen_items(source, groups, number))] = False
        return allowed_GI


def sequence_ranker(model: SequenceModel, source: BatchSource, naming: Naming) -> ScoredRanker:
    """Rank by the scores of a single-stream model."""

    def rank(groups: LabelGroups) -> Scored:
        recent, mid = streams_of(source, groups)
        with torch.inference_mode():
            logit_GI = model.scores(recent, mid).log_softmax(dim=1)
            logit_GI = logit_GI.masked_fill(~naming.allowed(source, groups), -torch.inf)
            best = logit_GI.topk(min(LIST_LENGTH, logit_GI.shape[1]), dim=1)
        return _named(naming, best.indices, best.values)

    return rank


def gems_ranker(model: Gems, source: BatchSource, naming: Naming) -> ScoredRanker:
    """Rank by the model's own beam search."""

    def rank(groups: LabelGroups) -> Scored:
        with torch.inference_mode():
            item, score = generate(
                model,
                reading_of(model, source, groups),
                naming.allowed(source, groups),
                k_max=LIST_LENGTH,
                beam_width=BEAM_WIDTH,
            )
        return _named(naming, item, score)

    return rank


def reading_of(model: Gems, source: BatchSource, groups: LabelGroups) -> Reading:
    """What the model reads of the users at their labels."""
    recent, mid = streams_of(source, groups)
    return model.read(model.history(recent, mid, source.older(groups)))


def streams_of(source: BatchSource, groups: LabelGroups) -> tuple[Stream, Stream]:
    """Both streams, as short as the labels allow."""
    return source.streams(groups, num_events=int(source.history_lengths(groups).max(initial=0)))


def _named(naming: Naming, item_GK: Tensor, log_GK: Tensor) -> Scored:
    item_GK = item_GK.masked_fill(log_GK == -torch.inf, UNKNOWN)
    missing = max(0, LIST_LENGTH - item_GK.shape[1])
    item = functional.pad(item_GK, (0, missing), value=UNKNOWN).numpy()
    share = functional.pad(log_GK.exp().double(), (0, missing)).numpy()
    return naming.catalogue_I[item], share
