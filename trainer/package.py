"""An exported package, judged as it would be served: raw features in, item ids out.

Legend: G groups, N events of both streams, K ranked items.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batches import BatchSource
from trainer.dataset import EventLog, Int64s, LabelGroups
from trainer.evaluate import Ranker
from trainer.export import COMPRESSOR_FILE, ITEM_IDS_FILE, MODEL_FILE, verify
from trainer.vocabulary import Vocabulary

_PADDING_ITEM = -1


@dataclass(frozen=True, slots=True)
class Package:
    """A verified package with its graphs loaded; one without lifelong stream has no compressor."""

    manifest: dict[str, Any]
    item_ids_V: Int64s
    graph: torch.nn.Module
    compressor: torch.nn.Module | None

    @classmethod
    def load(cls, directory: Path) -> "Package":
        """Read a package.

        Raises:
            ExportError: A file is missing or differs from its hash.
        """
        manifest = verify(directory)
        item_ids = np.fromfile(directory / ITEM_IDS_FILE, "<i8")
        graph = torch.export.load(directory / MODEL_FILE).module()
        compressor = None
        if manifest["memory_version"] is not None:
            compressor = torch.export.load(directory / COMPRESSOR_FILE).module()
        return cls(manifest, item_ids, graph, compressor)

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

    def ranker(self, source: BatchSource) -> Ranker:
        """Rank by the exported graph itself."""

        def rank(groups: LabelGroups) -> Int64s:
            with torch.inference_mode():
                item_id, _, _ = self.graph(*self._inputs(source, groups))
            return source_index(self.item_ids_V, item_id)

        return rank

    def _inputs(self, source: BatchSource, groups: LabelGroups) -> list[Tensor]:
        raw = raw_streams(source, groups)
        older = source.older(groups)
        if self.compressor is not None and older is not None:
            raw["lifelong"], raw["lifelong_count"] = self.compressor(*older)
        inputs = []
        for spec in self.manifest["inputs"]:
            name, dtype = spec["name"], getattr(torch, spec["dtype"])
            shape = (len(groups), *spec["shape"]) if spec["batched"] else tuple(spec["shape"])
            fill = {"exclude_item": _PADDING_ITEM, "available": 1}.get(name, 0)
            inputs.append(raw[name] if name in raw else torch.full(shape, fill, dtype=dtype))
        return inputs


def source_index(item_ids_V: Int64s, item_id_GK: Tensor) -> Int64s:
    """Dense index of each returned id, 0 for padding."""
    ids = item_id_GK.numpy()
    return np.where(ids == _PADDING_ITEM, 0, np.searchsorted(item_ids_V, ids) + 1)


def raw_streams(source: BatchSource, groups: LabelGroups) -> dict[str, Tensor]:
    """The stream inputs of the served signature, as scoring builds them from a user's state."""
    rows, known = source.history_rows(groups)
    log = source.log
    time_ms = log.event_time_ms_N[rows]
    columns = {
        "item": np.where(known, log.item_id_N[rows], _PADDING_ITEM),
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
