"""The repository renders the schema whole, and Feast's own command line registers it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from feast import FeatureView
from feast.repo_config import load_repo_config
from feast.repo_operations import get_repo_files
from feast.types import Array, Bool, Float32, Int64, String
from pydantic import ValidationError

from features import definitions
from features.config import StateConfig
from features.offline import MovelineRegistryStore
from features.online_config import URL_DEFAULT
from features.online_store import MovelineOnlineStoreConfig
from features.redis_address import RedisAddress
from features.schema import SERVICES, View, views

FOLDER = Path(definitions.__file__).parent
TYPES = {"int64": Int64, "float32": Float32, "bool": Bool, "string": String}


def feast_command(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `feast -c features ...` from the repository root, as the documentation says."""
    return subprocess.run(
        [sys.executable, "-m", "feast.cli.cli", "-c", "features", *arguments],
        cwd=FOLDER.parent,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)} | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("view", views(StateConfig()), ids=lambda view: view.name)
def test_a_view_says_what_the_schema_says(view: View) -> None:
    rendered = getattr(definitions, view.name)
    assert isinstance(rendered, FeatureView)
    assert rendered.ttl.total_seconds() == view.ttl_s
    assert rendered.tags["owner"] == rendered.owner == view.owner
    assert rendered.entities == [view.entity]
    assert [(f.name, f.dtype, f.tags["unit"]) for f in rendered.features] == [
        (f.name, Array(TYPES[f.dtype]) if f.length else TYPES[f.dtype], f.unit)
        for f in view.features
    ]


def test_feast_imports_only_the_definitions() -> None:
    assert get_repo_files(FOLDER) == [FOLDER / "definitions.py"]


def test_the_command_line_applies_and_applies_again(tmp_path: Path) -> None:
    registry = tmp_path / "run" / "feast" / "registry.db"
    environment = {
        "MOVELINE_FEAST__REGISTRY": str(registry),
        "MOVELINE_LAKE__PATH": str(tmp_path / "empty-lake"),
    }
    for _ in range(2):
        applied = feast_command("apply", **environment)
        assert applied.returncode == 0, applied.stdout + applied.stderr
    names = [view.name for view in views(StateConfig())]
    store = definitions.open_store(redis_url=URL_DEFAULT, registry=registry)
    assert sorted(view.name for view in store.list_feature_views()) == sorted(names)
    assert {s.name for s in store.list_feature_services()} == set(SERVICES)
    assert {e.join_key for e in store.list_entities()} == {"user_id", "item_id"}


def test_the_file_and_open_store_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = tmp_path / "registry.db"
    monkeypatch.setenv("MOVELINE_FEAST__REGISTRY", str(registry))
    monkeypatch.setenv("MOVELINE_REDIS__URL", "redis://example:1/2")
    filed = load_repo_config(FOLDER, FOLDER / "feature_store.yaml")
    opened = definitions.open_store(redis_url="redis://example:1/2", registry=registry).config
    assert filed.online_store == opened.online_store
    assert filed.registry == opened.registry
    for name in (
        "project",
        "provider",
        "batch_engine_config",
        "offline_config",
        "entity_key_serialization_version",
    ):
        assert getattr(filed, name) == getattr(opened, name)


def test_unset_names_take_the_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOVELINE_FEAST__REGISTRY", "MOVELINE_REDIS__URL"):
        monkeypatch.delenv(name, raising=False)
    config = load_repo_config(FOLDER, FOLDER / "feature_store.yaml")
    assert config.online_store.connection_string == URL_DEFAULT
    assert config.online_store.generation is None
    registry = MovelineRegistryStore(config.registry, None)
    assert registry._filepath == FOLDER.parent / ".moveline/feast/registry.db"
    assert definitions.lake_folder({}) == FOLDER.parent / ".moveline/lake"


def test_relative_paths_start_beside_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOVELINE_FEAST__REGISTRY", "run/registry.db")
    config = load_repo_config(FOLDER, FOLDER / "feature_store.yaml")
    registry = MovelineRegistryStore(config.registry, Path("elsewhere"))
    assert registry._filepath == FOLDER.parent / "run/registry.db"
    assert definitions.lake_folder({"MOVELINE_LAKE__PATH": "l"}) == FOLDER.parent / "l"
    assert definitions.lake_folder({"MOVELINE_LAKE__PATH": "/l"}) == Path("/l")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"connection_string": "localhost:six"}, "no HOST:PORT"),
        ({"connection_string": "http://localhost"}, "no address of a Redis"),
        (
            {"redis_type": "redis_cluster", "connection_string": "redis://h:1/0"},
            "leads to another kind",
        ),
        ({"client": "glide"}, "client 'glide'"),
        ({"generation": "newest"}, "generation"),
    ],
)
def test_settings_that_cannot_work_are_refused(setting: dict[str, str], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MovelineOnlineStoreConfig(**setting)


@pytest.mark.parametrize(
    ("setting", "address"),
    [
        (
            {"connection_string": "h:1,db=2,password=secret"},
            RedisAddress(kind="single", nodes=(("h", 1),), options={"db": 2, "password": "secret"}),
        ),
        (
            {"redis_type": "redis_cluster", "connection_string": "a:1,b:2,ssl=true"},
            RedisAddress(kind="cluster", nodes=(("a", 1), ("b", 2)), options={"ssl": True}),
        ),
        (
            {
                "redis_type": "redis_sentinel",
                "sentinel_master": "main",
                "connection_string": "a:1,b",
            },
            RedisAddress(
                kind="sentinel", nodes=(("a", 1), ("b", 26379)), master="main", options={"db": 0}
            ),
        ),
        (
            {"connection_string": "redis+cluster://a:1"},
            RedisAddress(kind="cluster", nodes=(("a", 1),)),
        ),
    ],
)
def test_an_address_is_spelled_as_feast_or_as_we_do(
    setting: dict[str, str], address: RedisAddress
) -> None:
    assert MovelineOnlineStoreConfig(**setting).address() == address


def test_no_other_module_of_features_imports_feast() -> None:
    code = (
        "import sys, pkgutil, importlib, features\n"
        "own = ('definitions', 'offline', 'online_')\n"
        "for found in pkgutil.iter_modules(features.__path__):\n"
        "    if not found.name.startswith(own):\n"
        "        importlib.import_module('features.' + found.name)\n"
        "assert 'feast' not in sys.modules\n"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        check=True,
        env=os.environ | {"PYTHONPATH": str(FOLDER.parent)},
        timeout=60,
    )
