"""When the arms of bench_staleness.py train, on whom, and which labels are judged.

Legend: N events, U users.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from trainer.baselines import NEWS_HALF_LIFE_MS
from trainer.dataset import label_groups
from trainer.evaluate import held_out_groups
from trainer.loop import LoopConfig
from trainer.models.config import GemsConfig
from trainer.protocols import rows_of
from trainer.train import TrainConfig

if TYPE_CHECKING:
    from trainer.dataset import Bools, EventLog, LabelGroups

HOUR_MS: Final = 3_600_000
DAY_MS: Final = 24 * HOUR_MS
# Raise it where a change of the code makes older files incomparable.
REVISION: Final = 4
# Hours between two trainings of an arm; None is never again.
ARMS: Final[dict[str, int | None]] = {"once": None, "daily": 24, "sixhourly": 6}
# What is ranked: the model mixed with what others did, or the model alone.
SERVED: Final = ("gems", "gems_no_sources")
# Users are put into this many parts by hash before every n-th part is taken.
_MIX: Final = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """Everything that decides a result.

    Attributes:
        one_user_in: Users whose hash falls into one of so many parts are kept, with all they did.
        begin_ms, split_ms, end_ms: Events before `begin_ms` or from `end_ms` on are left out;
            labels from `split_ms` on are judged.
        test_users: Users with labels after the split that are judged, drawn by seed.
        labels_per_day: Labels of such a user that are judged on each day at most, drawn by seed.
        first_s: Processor seconds of the first training, which all arms share.
        day_s: Those of the later trainings of a day: one takes all of it, four a quarter each.
        window_ms: A later training learns from the labels of so long before it.
        half_life_ms: What recent popularity counts is worth half after so long.
        prior_half_life_ms: Likewise what the priors of a model count when it is trained. An hour
            was better than three on 8 October, which is not judged.
        served: What is ranked; see SERVED.
        examples_per_batch: Labels of a step. Their histories are short, so that many together cost
            little more than a few.
        epochs: Passes of a training at most; a test ends by them, so that it repeats.
    """

    one_user_in: int = 6
    begin_ms: int
    split_ms: int
    end_ms: int
    test_users: int = 1_200
    labels_per_day: int = 12
    first_s: float = 240.0
    day_s: float = 160.0
    window_ms: int = DAY_MS
    half_life_ms: int = NEWS_HALF_LIFE_MS
    prior_half_life_ms: int = HOUR_MS
    served: str = "gems"
    seed: int = 1
    epochs: float = 100.0
    examples_per_batch: int = 128
    model: GemsConfig = dataclasses.field(default_factory=GemsConfig)
    code_sizes: tuple[int, int, int] = (64, 64, 32)
    revision: int = REVISION

    @property
    def key(self) -> str:
        """16 hex digits that change with any of it."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    def moments(self, arm: str) -> list[int]:
        """When an arm trains; the first is the split."""
        hours = ARMS[arm]
        if hours is None:
            return [self.split_ms]
        return list(range(self.split_ms, self.end_ms, hours * HOUR_MS))

    def seconds(self, arm: str) -> float:
        """Processor seconds of each later training of an arm: a day's worth is the same for all."""
        return self.day_s * (ARMS[arm] or 24) / 24

    def loop(self, seconds: float) -> LoopConfig:
        """How a training goes: until its seconds are spent."""
        return LoopConfig(
            epochs=self.epochs,
            budget_s=seconds,
            budget_clock="processor",
            examples_per_batch=self.examples_per_batch,
            seed=self.seed,
            num_threads=1,
        )

    def training(self, seconds: float) -> TrainConfig:
        """What is trained: all events of the log it is given."""
        return TrainConfig(
            train_quantile=1.0,
            half_life_h=self.half_life_ms // HOUR_MS,
            code_sizes=self.code_sizes,
            model=self.model,
            loop=self.loop(seconds),
        )


def sampled(log: EventLog, protocol: Protocol) -> EventLog:
    """The events of the protocol's time and users."""
    # Fibonacci hashing (Knuth, TAOCP 3, 6.4): the upper bits of the product are well mixed.
    mixed_U = (log.user_ids_U.astype(np.uint64) * _MIX) >> np.uint64(40)
    kept_U = mixed_U % np.uint64(protocol.one_user_in) == 0
    inside_N = (log.event_time_ms_N >= protocol.begin_ms) & (log.event_time_ms_N < protocol.end_ms)
    return rows_of(log, inside_N & kept_U[log.user_N])


def judged_labels(log: EventLog, protocol: Protocol) -> LabelGroups:
    """The sample of labels that every arm is asked about, in the order of time."""
    groups = label_groups(log)
    after = groups.select(groups.time_ms_G >= protocol.split_ms)
    rng = np.random.default_rng(protocol.seed)
    chosen = rng.permutation(np.unique(after.user_G))[: protocol.test_users]
    after = after.select(np.isin(after.user_G, chosen))
    first_rows = []
    for day_ms in range(protocol.split_ms, protocol.end_ms, DAY_MS):
        of_day = after.select(between(after, day_ms, day_ms + DAY_MS))
        if len(of_day):
            kept = held_out_groups(
                log,
                of_day,
                split_ms=day_ms - 1,
                seed=protocol.seed,
                max_users=protocol.test_users,
                max_groups_per_user=protocol.labels_per_day,
            )
            first_rows.append(kept.first_row_G)
    kept = after.select(np.isin(after.first_row_G, np.concatenate(first_rows)))
    return kept.select(np.argsort(kept.time_ms_G, kind="stable"))


def between(groups: LabelGroups, begin_ms: int, end_ms: int) -> Bools:
    """Which labels are of a time."""
    return (groups.time_ms_G >= begin_ms) & (groups.time_ms_G < end_ms)
