"""The served mixture as a ranking of labels: the model's list and the live sources in one.

What is computed here is what the exported graph computes of the same label (models/serving.py).

Legend: G labels, E events of the labels, S sources, W = 1 + S parts, K places of a list, F facts.
"""

from dataclasses import dataclass
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from trainer.baselines import Scored, ScoredRanker
from trainer.batches import PADDING, BatchSource
from trainer.counted import LiveSources
from trainer.dataset import Int64s, LabelGroups
from trainer.models.beam import BEAM_WIDTH, K_MAX, generate
from trainer.models.gems import Gems
from trainer.models.sources import Mixed, SourceGate, facts, is_in, mixed, probabilities
from trainer.rankers import reading_of
from trainer.vocabulary import UNKNOWN, Vocabulary


class Told(NamedTuple):
    """What the model and the live sources say at labels, as raw ids with PADDING behind.

    Attributes:
        item_GK: The model's list.
        share_GK: Its probabilities.
        counted_item_GSK: The sources' lists, without what must not be returned.
        counted_share_GSK: Their shares.
        met_GSK: Whether the user met the item, in the recent or the mid-term stream.
        facts_GF: What the gate looks at.
    """

    item_GK: Tensor
    share_GK: Tensor
    counted_item_GSK: Tensor
    counted_share_GSK: Tensor
    met_GSK: Tensor
    facts_GF: Tensor

    @property
    def speaks_GS(self) -> Tensor:  # noqa: N802 - tensors carry their legend
        """Which sources say anything."""
        return (self.counted_share_GSK > 0).any(dim=2)

    def shares_of(self, group_E: Int64s, item_id_E: Int64s) -> Tensor:
        """What each part gave to the item of each event [E, W]."""
        wanted_E1 = torch.from_numpy(item_id_E).unsqueeze(1)
        group = torch.from_numpy(group_E)
        lists = [(self.item_GK, self.share_GK)]
        pairs = zip(self.counted_item_GSK.unbind(1), self.counted_share_GSK.unbind(1), strict=True)
        found = [
            ((item[group] == wanted_E1) * share[group]).sum(dim=1)
            for item, share in [*lists, *pairs]
        ]
        return torch.stack(found, dim=1)

    def mixed_by(self, gate: SourceGate) -> Mixed:
        """The mixture under a gate."""
        return mixed(
            self.item_GK,
            self.share_GK,
            self.counted_item_GSK,
            gate.lowered(self.counted_share_GSK, self.met_GSK),
            gate(self.facts_GF, self.speaks_GS),
        )

    @classmethod
    def joined(cls, parts: list[Self]) -> Self:
        """Those of several batches of labels, in their order."""
        return cls(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True, slots=True)
class Served:
    """A model with its live sources over one log.

    Attributes:
        source: Cuts the model's streams, with its vocabulary.
        repeats: Whether items that the user met may be returned.
    """

    model: Gems
    vocabulary: Vocabulary
    source: BatchSource
    live: LiveSources
    repeats: bool = True

    def told(self, groups: LabelGroups) -> Told:
        """Ask all parts about labels."""
        counted = self.live.at(groups)
        counted_item = torch.from_numpy(counted.item_BSK)
        streams_GN = torch.from_numpy(self._streams(groups))
        met_GSK = is_in(counted_item.flatten(1), streams_GN).view_as(counted_item)
        allowed_GI = torch.ones(len(groups), self.vocabulary.num_items + 1, dtype=torch.bool)
        allowed_GI[:, UNKNOWN] = False
        for number in range(0 if self.repeats else len(groups)):
            met = self._met(groups, number)
            allowed_GI[number, torch.from_numpy(self.vocabulary.index_items(met))] = False
            is_met = np.isin(counted.item_BSK[number], met)
            counted_item[number, torch.from_numpy(is_met)] = PADDING
        share_GSK = torch.from_numpy(counted.share_BSK)
        with torch.inference_mode():
            reading = reading_of(self.model, self.source, groups)
            item_GK, log_GK = generate(
                self.model, reading, allowed_GI, k_max=K_MAX, beam_width=BEAM_WIDTH
            )
            share_GK = probabilities(log_GK)
            history_G = torch.from_numpy(self.source.history_lengths(groups))
            facts_GF = facts(history_G, share_GK[:, 0], reading.copy_weight_B, share_GSK)
        ids = torch.from_numpy(np.concatenate(([PADDING], self.vocabulary.item_ids_V)))
        return Told(ids[item_GK], share_GK, counted_item, share_GSK, met_GSK, facts_GF)

    def ranker(self, gate: SourceGate, catalogue: Vocabulary) -> ScoredRanker:
        """Rank as it is served; lists name items by their dense index in a catalogue."""

        def rank(groups: LabelGroups) -> Scored:
            with torch.inference_mode():
                found = self.told(groups).mixed_by(gate)
            item_GK = catalogue.index_items(found.item_BK.numpy())
            return item_GK, found.share_BK.double().numpy()

        return rank

    def _streams(self, groups: LabelGroups) -> Int64s:
        """Raw ids of both streams at each label, PADDING where there is no event [G, N]."""
        rows, known = self.source.history_rows(groups)
        return np.where(known, self.source.log.item_id_N[rows], PADDING)

    def _met(self, groups: LabelGroups, number: int) -> Int64s:
        """Every item the user of one label had met before it."""
        log = self.source.log
        first = log.offsets[groups.user_G[number]]
        met: Int64s = np.unique(log.item_id_N[first : groups.first_row_G[number]])
        return met
