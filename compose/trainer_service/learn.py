"""What a run computes: a model from the window, a draft of its package, and its judgement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from compose.cli.options import kafka_of, stores_of
from compose.trainer_service.look import find_served
from compose.training import AllItems, TrainRequest, train_config
from features.clock import now_ms
from features.lake_window import read_window
from features.schema import schema_hash
from scoring.signature import RETRIEVAL_MODEL
from trainer.baselines import own_frequency, popularity, recency_weighted
from trainer.dataset import EventLog
from trainer.errors import ExportError, VocabularyError, WarmStartError
from trainer.evaluate import held_out_groups
from trainer.export import Provenance, export
from trainer.gates import OWN_FREQUENCY, POPULARITY, Judged, Rival, judge_ranking
from trainer.loop import Outputs
from trainer.manifest import MANIFEST_FILE, manifest_bytes, read_manifest
from trainer.package import Package
from trainer.train import train
from trainer.warm_start import load_state, warm_train

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from compose.settings import Settings
    from compose.trainer_service.look import Served
    from compose.trainer_service.records import Kind
    from features.lake_window import LakeWindow
    from trainer.dataset import LabelGroups
    from trainer.gates import Quality
    from trainer.train import TrainConfig, Trained

# Of the users whose labels are judged, and of the training.
SEED = 1


@dataclass(frozen=True)
class Learned:
    """A trained model.

    Attributes:
        because: why it was trained from scratch after all; empty where all went as decided.
        base_version: whose weights it began with; None: from scratch.
    """

    trained: Trained
    kind: Kind
    because: str
    base_version: int | None


@dataclass(frozen=True)
class Draft:
    """An exported package that nobody serves yet."""

    folder: Path
    created_ms: int


def learn(
    settings: Settings,
    window: LakeWindow,
    *,
    kind: Kind,
    checkpoint: Path,
    tensorboard: Path,
    resume: bool,
) -> Learned:
    """Return a model of the window's events, within the budget.

    Raises:
        LakeError: the window's files are gone or unreadable.
        TrainerError: see trainer.train.
    """
    config = stores_of(settings)[0].config
    _, topics = kafka_of(settings)
    log = EventLog.from_columns(read_window(settings.lake.path, topics.events, config, window))
    training = settings.training
    request = TrainRequest(
        budget_s=training.budget_s, epochs=training.epochs, seed=SEED, num_threads=training.threads
    )
    how = replace(
        train_config(settings, request, config), train_quantile=1.0 - training.held_out_share
    )
    outputs = Outputs(
        checkpoints=checkpoint,
        checkpoint_every_steps=training.checkpoint_every_steps,
        resume=resume,
        tensorboard=tensorboard,
    )
    because = ""
    if kind == "warm":
        found = _warm(settings, log, how, outputs)
        if isinstance(found, Learned):
            return found
        because = found
        outputs = replace(outputs, resume=False)
    return Learned(train(log, how, outputs), "full", because, None)


def _warm(settings: Settings, log: EventLog, how: TrainConfig, outputs: Outputs) -> Learned | str:
    """Return a model that goes on from the served one, or why that cannot be."""
    served = find_served(settings)
    if served is None or served.package is None:
        return "the package of the served version is not in the models folder any more"
    try:
        state = load_state(served.package)
        trained = warm_train(log, state, how, outputs)
    except (ExportError, WarmStartError, VocabularyError) as error:
        return f"version {served.version} cannot be gone on from: {error}"
    return Learned(trained, "warm", "", served.version)


def draft(settings: Settings, learned: Learned, window: LakeWindow, folder: Path) -> Draft:
    """Return the exported package, not judged yet.

    Raises:
        ExportError: see trainer.export.
    """
    created_ms = now_ms()
    export(
        learned.trained,
        folder,
        Provenance(
            name=RETRIEVAL_MODEL,
            created_ms=created_ms,
            window_from=window.first,
            window_to=window.last,
            feature_schema_hash=schema_hash(stores_of(settings)[0].config),
            metrics={},
        ),
        machine_code=settings.training.machine_code,
    )
    return Draft(folder, created_ms)


def judge(settings: Settings, learned: Learned, made: Draft, served: Served | None) -> Judged:
    """Return what the package's gates look at; its figures are in its manifest then.

    The package is judged as it would be served, by its exported graph, and the served version by
    its own on the same labels.

    Raises:
        EmptyWindowError: nothing came after the split.
        ExportError: a package is damaged.
    """
    trained = learned.trained
    package = Package.load(made.folder)
    groups = held_out_groups(
        trained.source.log, trained.groups, split_ms=trained.split_ms, seed=SEED
    )
    store, catalogue = stores_of(settings)
    whole = AllItems.of(trained.source.log, store.config)
    rankers = {
        "model": package.ranker(package.source(whole.source.log), whole.catalogue),
        POPULARITY: popularity(whole.source),
        OWN_FREQUENCY: own_frequency(whole.source),
        "own_decayed": recency_weighted(whole.source),
    }
    quality = {
        name: judge_ranking(whole.source, groups, rank, name=name) for name, rank in rankers.items()
    }
    manifest = read_manifest(made.folder / MANIFEST_FILE)
    manifest["metrics"] = figures_of(quality)
    (made.folder / MANIFEST_FILE).write_bytes(manifest_bytes(manifest))
    live = catalogue.get_pointers()
    live_config = (catalogue.recorded_config(live.generation) if live else None) or store.config
    return Judged(
        package=package,
        losses=trained.fitted.losses,
        live_schema=schema_hash(live_config),
        withdrawn=catalogue.withdrawn(),
        quality=quality,
        served=_judge_served(served, whole, groups) if served else None,
    )


def _judge_served(served: Served, whole: AllItems, groups: LabelGroups) -> Rival:
    """Judge the served version; one that cannot be read does not keep its successor away."""
    try:
        package = Package.load(served.package or served.folder)
    except ExportError as error:
        return Rival(served.version, None, f"not compared: {error}")
    rank = package.ranker(package.source(whole.source.log), whole.catalogue)
    quality = judge_ranking(whole.source, groups, rank, name=f"version {served.version}")
    return Rival(served.version, quality)


def figures_of(quality: Mapping[str, Quality]) -> dict[str, float]:
    """Return the figures of rankings as a manifest has them."""
    return {
        f"{figure}_{name}": getattr(one, figure)
        for name, one in quality.items()
        for figure in ("hr10", "ndcg10")
    }
