"""What every test of the compose folder reads: the file itself, and YAML read strictly."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

REPOSITORY = Path(__file__).parents[2]


def read_yaml(path: Path) -> Any:  # noqa: ANN401 - any document may come out
    """The document in `path`; a key written twice is an error, which PyYAML would let pass."""
    return YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


@pytest.fixture(scope="session")
def yaml_reader() -> Callable[[Path], Any]:
    """Reads one YAML file strictly."""
    return read_yaml


@pytest.fixture
def compose_file(repository: Path) -> dict[str, Any]:
    """The compose file as read, aliases and merges resolved; a fresh copy for every test."""
    document: dict[str, Any] = read_yaml(repository / "compose" / "docker-compose.yml")
    return document


@pytest.fixture
def child_environment(repository: Path) -> dict[str, str]:
    """Environment in which a child python finds the project, installed or not."""
    return {**os.environ, "PYTHONPATH": str(repository)}
