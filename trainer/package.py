"""An exported package, judged as it would be served: raw features in, item ids out.

Legend: G groups, N events of both streams, K ranked items.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batches import PADDING, BatchSource
from trainer.counted import LiveSources
from trainer.dataset import EventLog, Int64s, LabelGroups
from trainer.evaluate import Ranker
from trainer.export import COMPRESSOR_FILE, ITEM_IDS_FILE, verify
from trainer.triton_model.graph import machine_code, portable
from trainer.vocabulary import Vocabulary


@dataclass(frozen=True, slots=True)
class Package:
    """A verified package with its graphs loaded; one without lifelong stream has no compressor.

    Attributes:
        graph: As it answers here: machine code where that fits.
        portable: Interpreted, with the weights to look at.
    """

    manifest: dict[str, Any]
    item_ids_V: Int64s
    graph: Callable[..., Sequence[Tensor]]
    portable: torch.nn.Module
    compressor: torch.nn.Module | None

    @classmethod
    def load(cls, directory: Path) -> "Package":
        """Read a package.

        Raises:
            ExportError: A file is missing or differs from its hash.
        """
        manifest = verify(directory)
        item_ids = np.fromfile(directory / ITEM_IDS_FILE, "<i8")
        interpreted = portable(directory)
        graph = machine_code(directory, manifest) or interpreted
        compressor = None
        if manifest["memory_version"] is not None:
            compressor = torch.export.load(directory / COMPRESSOR_FILE).module()
        return cls(manifest, item_ids, graph, interpreted, compressor)

    def source(self, log: EventLog) -> BatchSource:
        """Cut batches out of a log with the package's vocabulary and stream lengths."""
        vocabulary = Vocabulary(self.item_ids_V, np.unique(log.domain_N))
        model = self.manifest["config"]["model"]
        return BatchSource.of(
            log,
            vocabulary,
            num_recent=model["num_recent"],
            num_mid=model["num_mid"],
            num_older=0 if self.compressor is None else model["num_older"],
        )

    def ranker(self, source: BatchSource, catalogue: Vocabulary | None = None) -> Ranker:
        """Rank by the exported graph itself, live sources counted from the source's log.

        Args:
            source: As `source` makes it.
            catalogue: What lists name items by; the package's own items, without those that only
                live sources know, if left out.
        """
        live = LiveSources.of(source.log, half_life_h=self.manifest["sources"]["half_life_h"])
        named = catalogue or Vocabulary(self.item_ids_V, np.zeros(0, np.int64))

        def rank(groups: LabelGroups) -> Int64s:
            with torch.inference_mode():
                item_id, _, _ = self.graph(*self._inputs(source, live, groups))
            return named.index_items(item_id.numpy())

        return rank

    def _inputs(self, source: BatchSource, live: LiveSources, groups: LabelGroups) -> list[Tensor]:
        raw = raw_streams(source, groups) | raw_sources(live, groups)
        older = source.older(groups)
        if self.compressor is not None and older is not None:
            raw["lifelong"], raw["lifelong_count"] = self.compressor(*older)
        inputs = []
        for spec in self.manifest["inputs"]:
            name, dtype = spec["name"], getattr(torch, spec["dtype"])
            shape = (len(groups), *spec["shape"]) if spec["batched"] else tuple(spec["shape"])
            fill = {"available": 1}.get(name, PADDING if name.endswith("_item") else 0)
            inputs.append(raw[name] if name in raw else torch.full(shape, fill, dtype=dtype))
        return inputs


def raw_sources(live: LiveSources, groups: LabelGroups) -> dict[str, Tensor]:
    """The inputs of the served signature that live sources fill."""
    counted = live.at(groups)
    return {
        "counted_item": torch.from_numpy(counted.item_BSK),
        "counted_share": torch.from_numpy(counted.share_BSK),
        "counted_domain": torch.from_numpy(counted.domain_BS),
    }


def raw_streams(source: BatchSource, groups: LabelGroups) -> dict[str, Tensor]:
    """The stream inputs of the served signature, as scoring builds them from a user's state."""
    rows, known = source.history_rows(groups)
    log = source.log
    time_ms = log.event_time_ms_N[rows]
    columns = {
        "item": np.where(known, log.item_id_N[rows], PADDING),
        "age_ms": np.where(known, time_ms[:, -1:] - time_ms, 0),
        "domain": np.where(known, log.domain_N[rows], 0),
        "action": np.where(known, log.action_N[rows], 0),
        "dwell_ms": np.where(known, log.dwell_ms_N[rows], 0),
    }
    raw = {}
    for name, column_GN in columns.items():
        both = torch.from_numpy(np.ascontiguousarray(column_GN))
        raw[f"mid_{name}"] = both[:, : source.num_mid].contiguous()
        raw[f"recent_{name}"] = both[:, source.num_mid :].contiguous()
    return raw
