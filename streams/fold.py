"""Folding chunks with the compressor that Triton serves: the model `lifelong`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH, Folded
from scoring.errors import SignatureError
from scoring.signature import LIFELONG_MODEL

if TYPE_CHECKING:
    from features.lifelong import Chunks
    from scoring.triton import TritonServer

# Events are counted by the compressor too: one that left some out must not pass for whole.
_OUTPUTS: Final = ("state", "count")


@dataclass(frozen=True)
class TritonFold:
    """Folds with a pinned version of the model `lifelong`."""

    server: TritonServer

    def __call__(self, model_version: int, records_NC: Chunks) -> Folded:
        """Return the state of each chunk by itself; see `features.lifelong.Fold`.

        Raises:
            ScoringError: Triton or the version is away.
            SignatureError: what came back is no state of these chunks.
        """
        inputs = {
            "item": records_NC["item_id"].astype(np.int64),
            "action": records_NC["action"].astype(np.int64),
            "domain": records_NC["domain"].view(np.int64).copy(),
            "dwell_ms": records_NC["dwell_ms"].astype(np.int64),
            "event_time_ms": records_NC["event_time_ms"].astype(np.int64),
        }
        answer = self.server.infer(LIFELONG_MODEL, model_version, inputs, _OUTPUTS)
        states, counts = answer["state"], answer["count"].reshape(-1)
        size, chunk = records_NC.shape
        wanted = (size, LIFELONG_ROWS, LIFELONG_WIDTH)
        if states.shape != wanted or not np.array_equal(counts, np.full(size, chunk)):
            raise SignatureError(
                f"{LIFELONG_MODEL}/{model_version} made states {states.shape} of {counts.tolist()} "
                f"events where {wanted} of {chunk} each were asked for: publish the model again."
            )
        if not np.isfinite(states).all():
            raise SignatureError(
                f"{LIFELONG_MODEL}/{model_version} made a state that is not finite: nothing was "
                "written. Train again, or take the memory version off the live ones."
            )
        return Folded(states.astype(np.float32), counts.astype(np.int64))
