"""Where a setting comes from: option, environment, moveline.toml, addresses.toml, default."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from compose.cli.options import settings_of
from compose.settings import ADDRESSES_FILE, SettingsError, load_settings
from features.config import StateConfig
from tests.cli.conftest import assert_one_sentence

if TYPE_CHECKING:
    from tests.cli.conftest import Moveline

DEFAULT = "127.0.0.1:9092"


@pytest.fixture(autouse=True)
def _clean_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test in an empty folder, without variables of whoever runs it."""
    for name in [name for name in os.environ if name.startswith("MOVELINE_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def bootstrap() -> str:
    return load_settings().kafka.bootstrap


def test_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each source is added on top of those before it and wins."""
    assert bootstrap() == DEFAULT
    Path(".moveline").mkdir()
    (Path(".moveline") / ADDRESSES_FILE).write_text('[kafka]\nbootstrap = "from-up:1"\n')
    assert bootstrap() == "from-up:1"
    Path("moveline.toml").write_text('[kafka]\nbootstrap = "from-file:1"\n')
    assert bootstrap() == "from-file:1"
    Path("other.toml").write_text('[kafka]\nbootstrap = "from-other:1"\n')
    assert load_settings(Path("other.toml")).kafka.bootstrap == "from-other:1"
    monkeypatch.setenv("MOVELINE_CONFIG", "other.toml")
    assert bootstrap() == "from-other:1"
    monkeypatch.setenv("MOVELINE_KAFKA__BOOTSTRAP", "from-environment:1")
    assert bootstrap() == "from-environment:1"
    assert settings_of(kafka="from-option:1").kafka.bootstrap == "from-option:1"


def test_sources_are_merged_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("moveline.toml").write_text(
        '[kafka]\nbootstrap = "b:1"\nprefix = "p"\n[kafka.properties]\n"sasl.username" = "u"\n'
    )
    monkeypatch.setenv("MOVELINE_KAFKA__PROPERTIES", '{"sasl.password": "secret"}')
    kafka = settings_of(kafka="o:1").kafka
    assert (kafka.bootstrap, kafka.prefix) == ("o:1", "p")
    assert kafka.properties == {"sasl.username": "u", "sasl.password": "secret"}


def test_the_run_folder_moves_what_lies_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOVELINE_RUN_DIR", "elsewhere")
    Path("elsewhere").mkdir()
    (Path("elsewhere") / ADDRESSES_FILE).write_text('[redis]\nurl = "redis://there:1/0"\n')
    settings = load_settings()
    assert settings.redis.url == "redis://there:1/0"
    assert settings.lake.path == Path("elsewhere/lake")
    assert settings.models == Path("elsewhere/models")
    assert load_settings(run_dir=Path("third")).lake.path == Path("third/lake")
    monkeypatch.setenv("MOVELINE_LAKE__PATH", "given")
    assert load_settings().lake.path == Path("given")


@pytest.mark.parametrize("written", ['"g3"', '"3"', "3"])
def test_a_generation_is_a_name_or_a_number(written: str) -> None:
    Path("moveline.toml").write_text(f"generation = {written}\n")
    assert load_settings().generation_number == 3


def test_defaults_are_the_rules_of_a_new_generation() -> None:
    assert load_settings().state_config() == StateConfig()


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[kafka]\nbootstap = 'a:1'\n", "kafka.bootstap"),
        ("[kafak]\nbootstrap = 'a:1'\n", "kafak"),
        ("[kafka]\npartitions = 0\n", "kafka.partitions"),
        ("[worker]\nbatch_wait_s = 'soon'\n", "worker.batch_wait_s"),
        ("generation = 'green'\n", "generation"),
        ("generation = 0\n", "generation"),
        ("[kafka\n", "settings"),
        ("kafka = 3\n", "kafka"),
    ],
)
def test_a_bad_file_is_refused_by_name(text: str, word: str) -> None:
    Path("moveline.toml").write_text(text)
    with pytest.raises(SettingsError, match=word):
        load_settings()


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("MOVELINE_KAFKA__PARTITIONS", "many", "kafka.partitions"),
        ("MOVELINE_WORKER__METRICS_PORT", "70000", "worker.metrics_port"),
        ("MOVELINE_KAFKA__PROPERTIES", "{", "kafka"),
    ],
)
def test_a_bad_variable_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, word: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError, match=word):
        load_settings()


@pytest.mark.parametrize(
    "state", ["recent = 0", "actions = []", "actions = ['a']", "stream_actions = ['nap']"]
)
def test_rules_that_no_row_can_hold_are_refused(state: str) -> None:
    Path("moveline.toml").write_text(f"[state]\n{state}\n")
    with pytest.raises(SettingsError, match=r"state|action"):
        load_settings()


def test_commands_say_it_in_one_sentence(moveline: Moveline, tmp_path: Path) -> None:
    assert_one_sentence(moveline("features", "1", "--config", "absent.toml"), "absent.toml")
    (tmp_path / "moveline.toml").write_text("[kafka]\nbootstap = 'a:1'\n")
    assert_one_sentence(moveline("worker"), "kafka.bootstap")
    (tmp_path / "moveline.toml").write_text("[state]\nstream_actions = ['nap']\n")
    assert_one_sentence(moveline("features", "1"), "nap")
