"""Goal: the app gets what the settings say, and refuses what it cannot do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import typer
from typer.testing import CliRunner

from compose.cli import nearline
from features.sources import HALF_LIFE_H_DEFAULT
from streams.errors import NearlineConfigError
from streams.nearline import Hint, Work, decode_hint, encode_hint, hints_of_tick
from streams.nearline_config import NearlineConfig, from_environment
from streams.properties import KafkaConfig
from streams.topics import Topics

if TYPE_CHECKING:
    from collections.abc import Mapping


def test_the_environment_says_all_of_it() -> None:
    config = NearlineConfig(
        kafka=KafkaConfig("one:1,two:2", {"client.id": "me"}),
        topics=Topics("shop"),
        redis_url="redis://somewhere:1/2",
        generation=3,
        port=1,
        metrics_port=2,
        lateness_s=1.5,
        half_life_h=3,
    )
    assert from_environment(config.to_environment()) == config
    assert config.app_id == "shop-nearline-g3"


def test_an_empty_environment_is_the_local_stack() -> None:
    config = from_environment({})
    assert config.kafka.bootstrap == "127.0.0.1:9092"
    assert (config.generation, config.port, config.lateness_s) == (1, 6066, 60)
    assert config.half_life_h == HALF_LIFE_H_DEFAULT


@pytest.mark.parametrize(
    ("name", "value", "match"),
    [
        ("GENERATION", "first", "write g1"),
        ("NEARLINE__PORT", "70000", "allowed 0"),
        ("NEARLINE__LATENESS_S", "soon", "float"),
        ("SOURCES__HALF_LIFE_H", "day", "int"),
        ("KAFKA__PREFIX", "a b", "topic prefix"),
        ("KAFKA__PROPERTIES", '{"security.protocol":"SSL"}', "plaintext"),
        ("KAFKA__PROPERTIES", "{", "moveline nearline"),
    ],
)
def test_what_cannot_be_used_is_named(name: str, value: str, match: str) -> None:
    with pytest.raises(NearlineConfigError, match=match):
        from_environment({f"MOVELINE_{name}": value})


def test_the_command_becomes_faust_with_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[list[str], Mapping[str, str]]] = []

    def execve(path: str, command: list[str], environment: Mapping[str, str]) -> None:
        assert path == command[0]
        seen.append((command, environment))

    monkeypatch.setattr(os, "execve", execve)
    app = typer.Typer()
    nearline.register(app)
    options = ["--redis", "redis://r:1/0", "--kafka", "k:1", "--generation", "g4", "--port", "7"]
    result = CliRunner().invoke(app, options)
    assert result.exit_code == 0, result.output
    command, environment = seen[0]
    assert command[-2:] == ["--web-port", "7"]
    assert command[1:4] == ["-A", "streams.app", "worker"]
    config = from_environment(environment)
    assert (config.redis_url, config.kafka.bootstrap) == ("redis://r:1/0", "k:1")
    assert (config.generation, config.port) == (4, 7)


def test_hints_there_and_back_and_what_is_none() -> None:
    assert decode_hint(encode_hint(Hint(Work.TILES, 3))) == Hint(Work.TILES, 3)
    for raw in (None, b"", b"{", b'{"work":"rest"}', b"\xff"):
        assert decode_hint(raw) is None
    assert {hint.work for hint in hints_of_tick(0, 2)} == set(Work)
