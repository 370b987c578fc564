"""From the lake to a package, and from a package to the live version: the trainer, put together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from compose.cli.options import stores_of
from compose.publishing import newest_package, publish_package
from compose.training_log import read_log, remove_traces, training_log
from features.clock import now_ms
from features.schema import schema_hash
from scoring.signature import RETRIEVAL_MODEL
from trainer.baselines import lists_of, own_frequency, popularity, recency_weighted
from trainer.batches import BatchSource
from trainer.dataset import label_groups
from trainer.evaluate import held_out_groups, judge
from trainer.export import Provenance, export
from trainer.loop import LoopConfig, Outputs
from trainer.models.gems import GemsConfig
from trainer.package import Package
from trainer.ranks import joined
from trainer.train import TrainConfig, served
from trainer.train import train as train_model
from trainer.vocabulary import Vocabulary
from trainer.warm_start import load_state, warm_train

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compose.settings import Settings
    from features.config import StateConfig
    from trainer.dataset import EventLog
    from trainer.evaluate import Quality, Ranker


# Publishing needs no torch and has a module of its own; who trains finds it here too.
__all__ = [
    "TrainRequest",
    "TrainResult",
    "evaluate_package",
    "measure",
    "newest_package",
    "publish_package",
    "train_package",
]


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What `moveline train` was asked for; `warm` is a package to go on from."""

    budget_s: float
    epochs: float
    seed: int = 1
    num_threads: int = 2
    resume: bool = False
    warm: Path | None = None
    out: Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """A package and the figures in its manifest."""

    package: Path
    metrics: Mapping[str, float]
    seconds: float


def train_package(settings: Settings, request: TrainRequest) -> TrainResult | None:
    """Return a judged and exported package; None on all but the first process of torchrun.

    Raises:
        LakeError: no event log, or an unreadable one.
        TrainerError: too little to learn from, or training failed.
    """
    started = time.monotonic()
    config = stores_of(settings)[0].config
    with joined(settings.training.device) as ranks:
        events = training_log(settings, config, ranks, resume=request.resume)
        how = train_config(settings, request, config), _outputs(settings, resume=request.resume)
        if request.warm is None:
            trained = train_model(events.log, *how)
        else:
            trained = warm_train(events.log, load_state(request.warm), *how)
    if not ranks.is_first:
        return None
    whole = AllItems.of(events.log, config)
    ranker = lists_of(served(trained).ranker(trained.gate, whole.catalogue))
    metrics = measure(whole.source, ranker, split_ms=trained.split_ms, seed=request.seed)
    created_ms = now_ms()
    package = request.out or settings.models / f"{RETRIEVAL_MODEL}-{created_ms}"
    export(
        trained,
        package,
        Provenance(
            name=RETRIEVAL_MODEL,
            created_ms=created_ms,
            window_from=events.window_from,
            window_to=events.window_to,
            feature_schema_hash=schema_hash(config),
            metrics=metrics,
        ),
        machine_code=settings.training.machine_code,
    )
    remove_traces(settings)
    return TrainResult(package, metrics, time.monotonic() - started)


def _outputs(settings: Settings, *, resume: bool) -> Outputs:
    return Outputs(
        checkpoints=settings.training.checkpoints,
        checkpoint_every_steps=settings.training.checkpoint_every_steps,
        resume=resume,
        tensorboard=settings.training.tensorboard,
    )


def train_config(settings: Settings, request: TrainRequest, config: StateConfig) -> TrainConfig:
    """Return what to train for a generation's rules, how long and how."""
    return TrainConfig(
        half_life_h=settings.sources.half_life_h,
        model=GemsConfig(num_recent=config.recent, num_mid=config.mid),
        loop=LoopConfig(
            budget_s=request.budget_s,
            epochs=request.epochs,
            seed=request.seed,
            num_threads=request.num_threads,
            device=settings.training.device,
            precision=settings.training.precision,
        ),
    )


def evaluate_package(settings: Settings, package: Path, *, seed: int) -> dict[str, float]:
    """Return the figures of a package on the lake's events after its split.

    Raises:
        LakeError: no event log, or an unreadable one.
        TrainerError: the package is damaged, or nothing came after its split.
    """
    loaded = Package.load(package)
    config = stores_of(settings)[0].config
    log = read_log(settings, config)
    whole = AllItems.of(log, config)
    ranker = loaded.ranker(loaded.source(log), whole.catalogue)
    split_ms = int(loaded.manifest["split_ms"])
    return measure(whole.source, ranker, split_ms=split_ms, seed=seed)


@dataclass(frozen=True)
class AllItems:
    """A log in terms of all its items: a live source may name what no model knows."""

    catalogue: Vocabulary
    source: BatchSource

    @classmethod
    def of(cls, log: EventLog, config: StateConfig) -> AllItems:
        """Number all items of the log."""
        catalogue = Vocabulary.of(log, split_ms=int(log.event_time_ms_N.max()))
        source = BatchSource.of(log, catalogue, num_recent=config.recent, num_mid=config.mid)
        return cls(catalogue, source)


def measure(source: BatchSource, model: Ranker, *, split_ms: int, seed: int) -> dict[str, float]:
    """Return HR@10 and NDCG@10 of the model and of rankings that need none."""
    groups = held_out_groups(source.log, label_groups(source.log), split_ms=split_ms, seed=seed)
    rankers = {
        "model": model,
        "popularity": popularity(source),
        "own_frequency": own_frequency(source),
        "own_decayed": recency_weighted(source),
    }
    metrics: dict[str, float] = {}
    for name, ranker in rankers.items():
        quality: Quality = judge(source, groups, ranker, name=name)
        metrics[f"hr10_{name}"] = quality.hr10
        metrics[f"ndcg10_{name}"] = quality.ndcg10
    return metrics
