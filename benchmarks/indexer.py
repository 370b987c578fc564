"""Mid-term attention with the indexer against full attention, over 5,000 events: time and recall.

Time: one branch of the decoder answers the queries of a beam search, one for the first code and as
many as there are beams for each of the other two; keys and values are there already, as they are in
every step. Once with the sizes that are served and once with the paper's (width 1,024, 8 heads, 512
beams, K 256), on the GPU if there is one, else on one CPU thread. The ratio for one query alone
stands beside it: full attention over the same keys is one matrix product for all beams.
Recall: a model with the paper's streams (256 and 4,744) is trained through the three stages on
made-up users with a few interests each; then the same weights rank the next items with full and
with top-K attention. Not measured: training with more than this machine does in minutes.

On a machine with a GPU: python -m benchmarks.indexer
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
import torch

from trainer.models.indexer import FULL, TOP_K, IndexedBranch, IndexerConfig
from trainer.models.layers import StreamTokens

if TYPE_CHECKING:
    from trainer.models.indexer import Stage
    from trainer.train import Trained

NUM_KEYS: Final = 4_744
NUM_RECENT: Final = 256
# Seconds that training may take; its stages are shares of what there is.
TRAIN_S: Final = float(os.environ.get("TRAIN_S", "240"))
_CALLS: Final = 30
_CALLS_WARM: Final = 5
_USERS: Final = 60
_EVENTS: Final = 6_000
_CLUSTERS: Final = 60
_CLUSTER_ITEMS: Final = 40
_INTERESTS: Final = 4
_DAY_MS: Final = 86_400_000


@dataclass(frozen=True)
class Sizes:
    """Of one branch and what it is asked."""

    width: int
    num_heads: int
    num_beams: int
    top_k: int
    key_width: int


SERVED: Final = Sizes(width=64, num_heads=4, num_beams=48, top_k=64, key_width=16)
PAPER: Final = Sizes(width=1024, num_heads=8, num_beams=512, top_k=256, key_width=32)


def search_ms(sizes: Sizes, stage: Stage, device: torch.device) -> float:
    """Return the median milliseconds that a beam search spends in one branch."""
    first, later = (branch_ms(sizes, stage, device, queries) for queries in (1, sizes.num_beams))
    return first + 2 * later


def branch_ms(sizes: Sizes, stage: Stage, device: torch.device, num_queries: int) -> float:
    """Return the median milliseconds of one answer."""
    torch.manual_seed(0)
    config = IndexerConfig(key_width=sizes.key_width, top_k=sizes.top_k)
    branch = IndexedBranch(sizes.width, sizes.num_heads, config).to(device).eval()
    branch.stage = stage
    tokens = torch.randn(1, NUM_KEYS, sizes.width, device=device)
    mask = torch.ones(1, NUM_KEYS, dtype=torch.bool, device=device)
    query = torch.randn(1, num_queries, sizes.width, device=device)
    taken = []
    with torch.inference_mode():
        memory = branch.remember(StreamTokens(tokens, mask))
        for call in range(_CALLS_WARM + _CALLS):
            _wait(device)
            started = time.perf_counter()
            branch.read(query, memory)
            _wait(device)
            if call >= _CALLS_WARM:
                taken.append(1000 * (time.perf_counter() - started))
    return statistics.median(taken)


def latencies(device: torch.device) -> dict[str, float]:
    """Return the times of both ways at both sizes, and their ratios."""
    found = {}
    for name, sizes in (("served", SERVED), ("paper", PAPER)):
        full, top_k = (search_ms(sizes, stage, device) for stage in (FULL, TOP_K))
        first, first_k = (branch_ms(sizes, stage, device, 1) for stage in (FULL, TOP_K))
        found[f"full_{name}_ms"] = round(full, 3)
        found[f"indexer_{name}_ms"] = round(top_k, 3)
        found[f"ratio_{name}"] = round(top_k / full, 3)
        found[f"ratio_{name}_one_query"] = round(first_k / first, 3)
    return found


def recalls(*, train_s: float = TRAIN_S) -> dict[str, float]:
    """Return Recall@100 of the next items with full and with top-K attention, and their ratio."""
    trained = train_model(train_s)
    found = {stage: recall_at_100(trained, stage) for stage in (FULL, TOP_K)}
    return {
        "recall100_full": round(found[FULL], 4),
        "recall100_indexer": round(found[TOP_K], 4),
        "recall_ratio": round(found[TOP_K] / max(found[FULL], 1e-9), 4),
    }


def train_model(train_s: float) -> Trained:
    """Return a model of the paper's stream lengths, through all three stages."""
    from trainer.loop import LoopConfig  # noqa: PLC0415 - a GPU machine may lack what it imports
    from trainer.models.config import GemsConfig  # noqa: PLC0415 - likewise
    from trainer.train import TrainConfig, train  # noqa: PLC0415 - likewise

    config = TrainConfig(
        label_share=0.1,
        code_sizes=(16, 16, 16),
        model=GemsConfig(
            num_recent=NUM_RECENT,
            num_mid=NUM_KEYS,
            num_older=256,
            num_recent_layers=1,
            mid_attention="indexer",
            indexer=IndexerConfig(top_k=256),
            # Copying reads all events whatever attention does, and would hide the difference.
            copy="off",
        ),
        loop=LoopConfig(epochs=1.0, budget_s=train_s, examples_per_batch=16, num_threads=1),
    )
    return train(made_up_log(), config)


def made_up_log():  # noqa: ANN201 - EventLog, imported late
    """Return users who move between a few interests of their own, some of them long ago."""
    from trainer.dataset import EventLog  # noqa: PLC0415 - see train_model

    rng = np.random.default_rng(11)
    cluster = np.empty((_USERS, _EVENTS), np.int64)
    for user in range(_USERS):
        own = rng.choice(_CLUSTERS, _INTERESTS, replace=False)
        # Visits of 40 events on one interest each.
        visits = rng.choice(own, -(-_EVENTS // 40))
        cluster[user] = np.repeat(visits, 40)[:_EVENTS]
    rank = np.minimum(rng.geometric(0.12, cluster.shape) - 1, _CLUSTER_ITEMS - 1)
    user = np.repeat(np.arange(_USERS), _EVENTS)
    number = np.tile(np.arange(_EVENTS), _USERS)
    return EventLog.from_columns(
        {
            "user_id": user,
            "item_id": (cluster * _CLUSTER_ITEMS + rank).ravel(),
            "event_time_ms": number * (_DAY_MS // 40),
            "ordinal": number,
            "domain": (cluster.ravel() % 10).astype(np.uint64),
            "action": np.ones(len(user), np.uint8),
        }
    )


def recall_at_100(trained: Trained, stage: Stage) -> float:
    """Return the share of held-out events whose item is among the hundred best."""
    from trainer.evaluate import held_out_groups  # noqa: PLC0415 - see train_model
    from trainer.models.beam import generate  # noqa: PLC0415 - likewise

    trained.model.eval().set_stage(stage)
    source = trained.source
    groups = held_out_groups(
        source.log,
        trained.groups,
        split_ms=trained.split_ms,
        seed=1,
        max_users=_USERS,
        max_groups_per_user=8,
    )
    hits, total = 0, 0
    for begin in range(0, len(groups), 8):
        part = groups.select(np.arange(begin, min(begin + 8, len(groups))))
        recent, mid = source.streams(part)
        allowed = torch.ones(len(part), trained.vocabulary.num_items + 1, dtype=torch.bool)
        with torch.inference_mode():
            reading = trained.model.read(trained.model.history(recent, mid, source.older(part)))
            item, _ = generate(trained.model, reading, allowed, k_max=100)
        wanted = torch.from_numpy(source.item_N[part.first_row_G])[:, None]
        hits += int(((item == wanted) & (wanted > 0)).any(dim=1).sum())
        total += len(part)
    return hits / total


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Print the times on the best device there is."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu, one thread"
    print(f"mid-term attention over {NUM_KEYS} events on {name}", file=sys.stderr)
    print(json.dumps({"device": name, **latencies(device)}))


if __name__ == "__main__":
    main()
