"""From a batch of streams to the retrieval model's input tensors. Pure; online and in tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH
from features.sources import Counted
from scoring.signature import ANY_DOMAIN, CANDIDATES_MAX, NO_ITEM, NUM_EXCLUDED

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.view import StreamBatch


def retrieval_inputs(
    streams: StreamBatch,
    excluded: Sequence[Sequence[int]],
    withdrawn: frozenset[int],
    *,
    counted: Counted | None = None,
    candidates: Sequence[Sequence[int]] = (),
    in_domain: Sequence[int] = (),
) -> dict[str, torch.Tensor]:
    """Return the `gems` inputs of docs/formats.md, in its order.

    Args:
        streams: of B users.
        excluded: per user, items that must not be returned; the first NUM_EXCLUDED count.
        withdrawn: items that nobody may be given.
        counted: what live sources say for each user; nothing if left out.
        candidates: per user, items to choose from, none for all; the first CANDIDATES_MAX count.
            Left out, nobody names any.
        in_domain: per user, the signed hash of the domain to stay in, ANY_DOMAIN for none.

    Ages count back from the newest event seen, not from the request: with no event in between,
    the same request gets the same answer a day later.
    """
    inputs: dict[str, torch.Tensor] = {}
    for name, records in (("recent", streams.recent_BR), ("mid", streams.mid_BM)):
        held = records["item_id"] != NO_ITEM
        ages = np.where(held, streams.newest_ms_B[:, None] - records["event_time_ms"], 0)
        inputs[f"{name}_item"] = _int64(records["item_id"])
        inputs[f"{name}_age_ms"] = _int64(ages)
        inputs[f"{name}_domain"] = _int64(records["domain"].view(np.int64))
        inputs[f"{name}_action"] = _int64(records["action"])
        inputs[f"{name}_dwell_ms"] = _int64(records["dwell_ms"])
    size = len(streams.newest_ms_B)
    inputs["lifelong"] = torch.zeros(size, LIFELONG_ROWS, LIFELONG_WIDTH)
    inputs["lifelong_count"] = torch.zeros(size, 1, dtype=torch.int64)
    if streams.memory_BLW is not None and streams.memory_events_B is not None:
        inputs["lifelong"] = torch.from_numpy(streams.memory_BLW)
        inputs["lifelong_count"] = torch.from_numpy(streams.memory_events_B)[:, None]
    inputs["exclude_item"] = _named(excluded, size, NUM_EXCLUDED)
    inputs["candidate_item"] = _named(candidates, size, CANDIDATES_MAX)
    inputs["in_domain"] = torch.full((size, 1), ANY_DOMAIN, dtype=torch.int64)
    if in_domain:
        inputs["in_domain"][:, 0] = torch.tensor(in_domain, dtype=torch.int64)
    item_BSK, share_BSK, domain_BS = Counted.nothing(size) if counted is None else counted
    inputs["counted_item"] = torch.from_numpy(item_BSK)
    inputs["counted_share"] = torch.from_numpy(share_BSK)
    inputs["counted_domain"] = torch.from_numpy(domain_BS)
    # Never empty: a tensor without elements has no memory to hand over.
    inputs["withdrawn"] = torch.tensor(sorted(withdrawn | {NO_ITEM}), dtype=torch.int64)
    return inputs


def _named(lists: Sequence[Sequence[int]], size: int, length: int) -> torch.Tensor:
    named = torch.full((size, length), NO_ITEM, dtype=torch.int64)
    for row, items in enumerate(lists):
        kept = torch.tensor(items[:length], dtype=torch.int64)
        named[row, : len(kept)] = kept
    return named


def _int64(column: np.ndarray[tuple[int, ...], np.dtype[Any]]) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(column.astype(np.int64)))
