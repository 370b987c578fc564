"""From the lake to a package, and from a package to the live version: the trainer, put together."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from compose.cli.options import kafka_of, stores_of
from compose.errors import ComposeError
from compose.serving import flip
from compose.training_log import read_log, remove_traces, training_log
from features.clock import now_ms
from features.errors import SchemaMismatchError
from features.redis import CatalogueStore, Trending, connect
from features.schema import schema_hash
from scoring.signature import K_MAX, RETRIEVAL_MODEL
from scoring.triton import TritonServer
from trainer.baselines import lists_of, own_frequency, popularity, recency_weighted
from trainer.batches import BatchSource
from trainer.dataset import label_groups
from trainer.evaluate import held_out_groups, judge
from trainer.export import MANIFEST_FILE, Provenance, export, verify
from trainer.loop import LoopConfig, Outputs
from trainer.models.gems import GemsConfig
from trainer.package import Package
from trainer.publish import publish
from trainer.ranks import joined
from trainer.train import TrainConfig, served
from trainer.train import train as train_model
from trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compose.settings import Settings
    from features.config import StateConfig
    from trainer.dataset import EventLog
    from trainer.evaluate import Quality, Ranker


class NoPackageError(ComposeError):
    """Nothing was trained yet, or not in this folder."""


@dataclass(frozen=True, kw_only=True)
class TrainRequest:
    """What `moveline train` was asked for."""

    budget_s: float
    epochs: float
    seed: int = 1
    num_threads: int = 2
    resume: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class TrainResult:
    """A package and the figures in its manifest."""

    package: Path
    metrics: Mapping[str, float]
    seconds: float


@dataclass(frozen=True)
class Live:
    """A version that went live."""

    version: int
    parity: float
    ready_s: float
    live_s: float


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
        trained = train_model(
            events.log,
            _train_config(settings, request, config),
            _outputs(settings, resume=request.resume),
        )
    if not ranks.is_first:
        return None
    judged = Judged.of(events.log, config)
    ranker = lists_of(served(trained).ranker(trained.gate, judged.catalogue))
    metrics = measure(judged.source, ranker, split_ms=trained.split_ms, seed=request.seed)
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


def _train_config(settings: Settings, request: TrainRequest, config: StateConfig) -> TrainConfig:
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
    judged = Judged.of(log, config)
    ranker = loaded.ranker(loaded.source(log), judged.catalogue)
    split_ms = int(loaded.manifest["split_ms"])
    return measure(judged.source, ranker, split_ms=split_ms, seed=seed)


@dataclass(frozen=True)
class Judged:
    """A log in terms of all its items: a live source may name what no model knows."""

    catalogue: Vocabulary
    source: BatchSource

    @classmethod
    def of(cls, log: EventLog, config: StateConfig) -> Judged:
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


def newest_package(models: Path) -> Path:
    """Return the youngest package in the models folder.

    Raises:
        NoPackageError: there is none.
    """
    packages = sorted(path.parent for path in models.glob(f"*/{MANIFEST_FILE}"))
    if not packages:
        raise NoPackageError(f"no package under {models}: run `moveline train` first.")
    return packages[-1]


def publish_package(settings: Settings, package: Path) -> Live:
    """Return once the package is a version that every answer follows.

    Raises:
        SchemaMismatchError: the package was built for other features than the generation has.
        TrainerError: see trainer.publish.
        FlipNotSeenError: answers did not follow the pointers.
    """
    started = time.monotonic()
    refuse_other_schema(settings, verify(package))
    with TritonServer(settings.triton.grpc) as server:
        published = publish(package, settings.model_repository, server)
    ready_s = time.monotonic() - started
    catalogue = CatalogueStore(connect(settings.redis.url))
    catalogue.put_trending(read_trending(settings))
    kafka, topics = kafka_of(settings)
    flip(settings, kafka, topics, published.version)
    return Live(published.version, published.parity, ready_s, time.monotonic() - started)


def refuse_other_schema(settings: Settings, manifest: Mapping[str, object]) -> None:
    """Return if the package reads the features that the generation's state holds.

    Raises:
        SchemaMismatchError: it does not.
    """
    store, _ = stores_of(settings)
    held, wanted = schema_hash(store.config), manifest["feature_schema_hash"]
    if held != wanted:
        raise SchemaMismatchError(
            f"the package was trained on features {wanted}, generation g{store.generation} has "
            f"{held}: train on this generation with `moveline train`, or publish for another one "
            "with MOVELINE_GENERATION."
        )


# What counts as trending until the near-line windows take over: the newest week of the log.
_TRENDING_MS = 7 * 86_400_000


def read_trending(settings: Settings) -> Trending:
    """Return the items most used in the log's newest week, with their share of its events."""
    log = read_log(settings, stores_of(settings)[0].config)
    newest = log.event_time_ms_N >= log.event_time_ms_N.max() - _TRENDING_MS
    items, counts = np.unique(log.item_id_N[newest], return_counts=True)
    order = np.argsort(-counts, kind="stable")[:K_MAX]
    return Trending(
        tuple(items[order].tolist()),
        tuple((counts[order] / counts.sum()).round(6).tolist()),
        total=1.0,
    )
