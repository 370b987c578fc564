"""`moveline train --warm`: which package it goes on from, and what stays."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from compose.publishing import NoPackageError
from compose.settings import load_settings
from compose.training import TrainRequest, train_package
from compose.warm_base import PUBLISHED, warm_base
from features.redis import Pointers
from streams.control import write_pointers
from tests.cli.test_train import add_events
from trainer.errors import ExportError
from trainer.export import ITEM_IDS_FILE, MANIFEST_VERSION, MODEL_FILE, read_manifest

if TYPE_CHECKING:
    from pathlib import Path

    from compose.local.stack import LocalStack
    from compose.settings import Settings
    from features.redis import StateStore
    from streams.kafka import KafkaConfig
    from streams.topics import Topics


@pytest.fixture
def settings(stack: LocalStack, store: StateStore, topics: Topics, tmp_path: Path) -> Settings:
    """An installation of its own, nothing published."""
    store.claim_generation()
    return load_settings(
        kafka={"bootstrap": stack.addresses.kafka, "prefix": topics.prefix},
        redis={"url": stack.addresses.redis},
        generation=f"g{store.generation}",
        lake={"path": tmp_path / "lake"},
        model_repository=tmp_path / "model_repo",
        models=tmp_path / "models",
        training={"checkpoints": tmp_path / "checkpoints"},
        run_dir=tmp_path / "run",
    )


def write_manifest(folder: Path, graph_hash: str) -> None:
    folder.mkdir(parents=True)
    manifest = {
        "manifest_version": MANIFEST_VERSION,
        "files": {MODEL_FILE: graph_hash, ITEM_IDS_FILE: "1" * 64},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def test_the_published_package_is_found_by_its_graph(
    settings: Settings, kafka: KafkaConfig, topics: Topics
) -> None:
    assert warm_base(settings, "some/package").parts == ("some", "package")
    with pytest.raises(NoPackageError, match="moveline publish"):
        warm_base(settings, PUBLISHED)
    for name, graph_hash in (("a", "a" * 64), ("b", "b" * 64)):
        write_manifest(settings.models / name, graph_hash)
    write_manifest(settings.model_repository / "gems" / "7", "a" * 64)
    write_manifest(settings.model_repository / "gems" / "8", "c" * 64)
    write_pointers(kafka, topics, Pointers(7, 1))
    assert warm_base(settings, PUBLISHED) == settings.models / "a"
    write_pointers(kafka, topics, Pointers(8, 1))
    with pytest.raises(NoPackageError, match="version 8 is live"):
        warm_base(settings, PUBLISHED)


def test_a_training_goes_on_from_a_package(
    settings: Settings, topics: Topics, tmp_path: Path
) -> None:
    """Items that came into the lake since join, and the memories that were made stay valid."""
    lake = tmp_path / "lake"
    add_events(lake, seed=1, topic=topics.events)
    request = TrainRequest(budget_s=300.0, epochs=1.0, num_threads=1, out=tmp_path / "base")
    assert train_package(settings, request) is not None
    for seed in (2, 3):
        add_events(lake, seed=seed, topic=topics.events, first_item=5_000)
    request = TrainRequest(
        budget_s=300.0,
        epochs=1.0,
        num_threads=1,
        warm=tmp_path / "base",
        out=tmp_path / "warm",
    )
    assert train_package(settings, request) is not None
    base, warm = (read_manifest(tmp_path / one / "manifest.json") for one in ("base", "warm"))
    assert warm["memory_version"] == base["memory_version"]
    assert warm["num_items"] > base["num_items"]
    with pytest.raises(ExportError, match="cannot be read"):
        train_package(settings, TrainRequest(budget_s=1.0, epochs=1.0, warm=tmp_path / "none"))
