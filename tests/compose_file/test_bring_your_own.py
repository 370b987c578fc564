"""Goal: docs/bring_your_own.md describes the settings that exist, and its examples can be read."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

KEYS = (
    "kafka.bootstrap",
    "kafka.properties",
    "redis.url",
    "triton.grpc",
    "triton.http",
    "lake.path",
    "feature_log.share",
    "model_repository",
    "generation",
)
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.fixture
def page(repository: Path) -> str:
    """The page's text."""
    return (repository / "docs" / "bring_your_own.md").read_text(encoding="utf-8")


def environment_name(key: str) -> str:
    """The variable that stands for a key of moveline.toml."""
    return "MOVELINE_" + key.upper().replace(".", "__")


def keys_of(document: dict[str, Any]) -> set[str]:
    """Keys of a moveline.toml, tables joined by a dot; a table of properties is one key."""
    keys = set()
    for name, value in document.items():
        if isinstance(value, dict):
            keys |= {f"{name}.{inner}" for inner in value}
        else:
            keys.add(name)
    return keys


def test_each_key_stands_beside_its_variable(page: str) -> None:
    rows = [line for line in page.splitlines() if line.startswith("| `")]
    for key in KEYS:
        assert any(f"`{key}`" in row and f"`{environment_name(key)}`" in row for row in rows), key


def test_no_other_variable_is_named(page: str) -> None:
    named = set(re.findall(r"\bMOVELINE_[A-Z_]+\b", page))
    # MOVELINE_CONFIG names the file the others may stand in.
    assert named == {environment_name(key) for key in KEYS} | {"MOVELINE_CONFIG"}


def test_toml_examples_have_known_keys_and_one_has_all(page: str) -> None:
    examples = [tomllib.loads(text) for kind, text in FENCE.findall(page) if kind == "toml"]
    assert examples
    assert all(keys_of(example) <= set(KEYS) for example in examples)
    assert any(keys_of(example) == set(KEYS) for example in examples)


def test_properties_are_flat_names_of_librdkafka(page: str) -> None:
    examples = [tomllib.loads(text) for kind, text in FENCE.findall(page) if kind == "toml"]
    for example in examples:
        for name, value in example["kafka"]["properties"].items():
            assert isinstance(value, str), f"{name}: an unquoted dot makes a table"


def test_page_says_what_was_not_done(page: str) -> None:
    assert "validated, never run" in page


def test_files_that_the_page_names_exist(page: str, repository: Path) -> None:
    named = set(re.findall(r"\bcompose/[\w./-]+\.(?:yml|Dockerfile)\b", page))
    assert named
    assert [name for name in sorted(named) if not (repository / name).is_file()] == []


def test_host_addresses_are_published_ports(page: str, compose_file: dict[str, Any]) -> None:
    published = {
        port.split(":")[1]
        for service in compose_file["services"].values()
        for port in service.get("ports", [])
    }
    assert set(re.findall(r"`localhost:(\d+)`", page)) == published
