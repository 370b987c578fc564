"""How many events a second does training read, and how much of the machine does it use?

Workload: GEMs at its default sizes on a year of grocery shopping (complete_journey), STEPS_MEASURED
batches (100) of 32 baskets drawn by seed from those before the split, each with
up to 512 events before it. A token is such an event; padding does not count. Whole training steps
are timed, cutting the batches and updating the weights included, after WARM_UP_STEPS that are not.
The three take turns, ROUNDS times, and the medians count:

- ours: the loop of `moveline train`.
- stock: the same loop, batches and weights, each attention a torch.nn.MultiheadAttention.
- padded: ours, without batches of similar length: every example padded to 512 events.

MFU is the share of the peak that the model's own arithmetic (torch's flop counter, forward and
backward) makes use of. The peak is PEAK_TFLOPS of the environment, or that of a square matrix
product measured here, in the precision of the training. On a GPU if torch sees one, in bfloat16;
else on the CPU in float32, THREADS threads (all cores). Not measured: the making of tables, ids and
the vocabulary before the first step. `--record` keeps the figures.
"""

from __future__ import annotations

import os
import statistics
import time
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.common import CONSOLE, is_recording
from benchmarks.stock_gems import stock_gems
from compose.figures import report
from compose.groceries import load_groceries
from features.config import StateConfig
from features.events import domain_hash
from trainer.batches import Batch, BatchSource, LabelExamples
from trainer.dataset import EventLog, label_groups, split_time_ms, training_groups
from trainer.loop import LoopConfig, fit, prepare_torch
from trainer.ranks import chosen_device
from trainer.train import GemsLearner, TrainConfig, new_model
from trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from trainer.dataset import Int64s
    from trainer.models.gems import Gems

STEPS: Final = int(os.environ.get("STEPS_MEASURED", "100"))
LINES: Final = int(os.environ.get("LINES_MEASURED", "330000"))
THREADS: Final = int(os.environ.get("THREADS", str(os.cpu_count() or 1)))
PEAK_TFLOPS: Final = os.environ.get("PEAK_TFLOPS")
WARM_UP_STEPS: Final = 5
ROUNDS: Final = 3
_SEED: Final = 1
_NOW_MS: Final = 1_763_700_000_000
# Side of the square matrices whose product is the peak, and how often it is taken.
_GEMM_SIDE: Final = {"cpu": 2_048, "cuda": 8_192}
_GEMM_ROUNDS: Final = 20


@dataclass(frozen=True)
class Workload:
    """What all of them are trained on."""

    model: Gems
    examples: LabelExamples
    config: LoopConfig


@dataclass(frozen=True)
class Padded:
    """The same examples, as if all had the longest history."""

    examples: LabelExamples

    def lengths(self) -> Int64s:
        """One length for all: batches in any order."""
        return np.ones_like(self.examples.lengths())

    def batch(self, chosen: Int64s, rng: np.random.Generator) -> Batch:
        """The batch of the chosen groups, as long as a batch can be."""
        source, groups = self.examples.source, self.examples.groups.select(chosen)
        batch = self.examples.batch(chosen, rng)
        recent, mid = source.streams(groups)
        return batch._replace(recent=recent, mid=mid)


def grocery_log() -> EventLog:
    """The transaction lines, as the lake would give them."""
    table = load_groceries(num_lines_min=LINES, seed=_SEED, now_ms=_NOW_MS).table
    departments = table["department"].to_pylist()
    hashes = {name: domain_hash(name) for name in set(departments)}
    user_id = table["household_id"].to_numpy()
    order = np.argsort(user_id, kind="stable")
    ordinal = np.empty(len(user_id), np.int64)
    ordinal[order] = np.arange(len(user_id)) - np.searchsorted(user_id[order], user_id[order])
    return EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": table["product_id"].to_numpy(),
            "event_time_ms": table["time_ms"].to_numpy(),
            "ordinal": ordinal,
            "action": np.full(len(user_id), StateConfig().codes["purchase"], np.uint8),
            "domain": np.array([hashes[name] for name in departments], np.uint64),
        }
    )


def workload() -> Workload:
    """A fresh model and the examples, alike in every run."""
    on_cuda = torch.cuda.is_available()
    loop = LoopConfig(
        budget_s=1e9,
        seed=_SEED,
        num_threads=THREADS,
        device="cuda" if on_cuda else "cpu",
        precision="bf16" if on_cuda else "fp32",
    )
    config = TrainConfig(loop=loop)
    prepare_torch(loop)
    log = grocery_log()
    split_ms = split_time_ms(log)
    groups = training_groups(log, label_groups(log), split_ms=split_ms)
    vocabulary = Vocabulary.of(log, split_ms=split_ms)
    source = BatchSource.of(log, vocabulary)
    drawn = np.random.default_rng(_SEED).permutation(len(groups))
    size = STEPS * loop.examples_per_batch
    examples = LabelExamples(source, groups.select(np.sort(drawn[:size])), config.num_targets)
    return Workload(new_model(log, vocabulary, config, tables_ms=split_ms), examples, loop)


def arms(work: Workload) -> dict[str, tuple[GemsLearner, Any]]:
    """What is compared: a learner and its examples."""
    return {
        "ours": (GemsLearner(deepcopy(work.model)), work.examples),
        "stock": (GemsLearner(stock_gems(work.model)), work.examples),
        "padded": (GemsLearner(deepcopy(work.model)), Padded(work.examples)),
    }


def tokens_per_s(learner: GemsLearner, examples: Any, config: LoopConfig, name: str) -> float:  # noqa: ANN401 - either kind of examples
    """Train for one pass; events read a second."""
    done = fit(learner, examples, config, name=name)
    return done.num_tokens / done.seconds


def flops_per_token(work: Workload, config: LoopConfig) -> float:
    """Floating-point operations of forward and backward passes, an event."""
    learner = GemsLearner(deepcopy(work.model))
    # The counter knows matrix products and not the CPU's fused attention.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        done = fit(learner, work.examples, config, name="flops")
    return float(counter.get_total_flops()) / done.num_tokens


def peak_flops(config: LoopConfig) -> float:
    """Floating-point operations a second of a large square matrix product."""
    device = chosen_device(config.device)
    kind = torch.bfloat16 if config.precision == "bf16" else torch.float32
    side = _GEMM_SIDE[device.type]
    one, other = (torch.randn(side, side, device=device, dtype=kind) for _ in range(2))
    seconds = []
    for _ in range(_GEMM_ROUNDS):
        started = time.perf_counter()
        product = one @ other
        product[0, 0].item()  # waits for a GPU
        seconds.append(time.perf_counter() - started)
    return float(2 * side**3 / min(seconds))


def device_name(config: LoopConfig) -> str:
    """What the figures were taken on."""
    if chosen_device(config.device).type == "cuda":
        return f"{torch.cuda.get_device_name()}, {config.precision}"
    return f"cpu, {config.num_threads} threads, {config.precision}"


def measure(work: Workload) -> dict[str, Any]:
    """The figures."""
    some = replace(work.config, epochs=WARM_UP_STEPS / STEPS)
    compared = arms(work)
    for name, (learner, examples) in compared.items():
        tokens_per_s(learner, examples, some, f"{name}, warm-up")
    taken: dict[str, list[float]] = {name: [] for name in compared}
    for _ in range(ROUNDS):
        for name, (learner, examples) in compared.items():
            taken[name].append(tokens_per_s(learner, examples, work.config, name))
            CONSOLE.print(f"{name}: {taken[name][-1]:,.0f} tokens/s")
    speed = {name: statistics.median(values) for name, values in taken.items()}
    per_token = flops_per_token(work, some)
    peak = float(PEAK_TFLOPS) * 1e12 if PEAK_TFLOPS else peak_flops(work.config)
    return {
        "tokens_per_s": round(speed["ours"]),
        "stock_tokens_per_s": round(speed["stock"]),
        "padded_tokens_per_s": round(speed["padded"]),
        "device": device_name(work.config),
        "mfu": round(speed["ours"] * per_token / peak, 4),
        "flops_per_token": round(per_token),
        "peak_tflops": round(peak / 1e12, 3),
        "peak_source": "given" if PEAK_TFLOPS else "matrix product",
        "steps": STEPS,
    }


def main() -> None:
    """Measure and report."""
    keep = is_recording(__doc__)
    report(
        "bench-train",
        measure(workload()),
        command="make bench-train RECORD=1",
        caveats={
            "mfu": "the model is small: much of a step is cutting batches and element-wise work, "
            "and the flop counter counts matrix products only",
        },
        keep=keep,
    )


if __name__ == "__main__":
    main()
