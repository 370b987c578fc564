"""`--help` teaches, is quick, and loads none of the heavy libraries."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import typer

from compose.cli import app
from tests.small import REPOSITORY

if TYPE_CHECKING:
    from collections.abc import Iterator

# Processor time, which a busy machine does not stretch as it does wall time.
CPU_S_MAX = 2.0
HEAVY = (
    "torch", "feast", "pandas", "tritonclient", "confluent_kafka", "pyarrow", "faust", "matplotlib",
)  # fmt: skip
# Runs one command line and says what it imported.
PROBE = """
import json, sys
from compose.cli import app
try:
    app(sys.argv[1:])
except SystemExit as end:
    assert not end.code, end.code
print("\\n" + json.dumps(sorted({name.split(".")[0] for name in sys.modules})))
"""


def every_command() -> Iterator[tuple[str, ...]]:
    """Yield the words of every command and group of commands."""

    def under(command: object, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from under(child, (*words, name))

    return under(typer.main.get_command(app), ())


COMMANDS = list(every_command())


def test_the_commands_are_those_promised() -> None:
    promised = {
        "up", "down", "status", "produce", "worker", "lake", "features", "train", "evaluate",
        "publish", "recommend", "demo", "items", "topics", "dlq", "replay", "generations",
        "audit", "promote", "demote", "drop", "nearline", "compact", "skew", "forget",
        "repartition", "lifelong", "trainer", "models", "rollback", "gc", "canary",
    }  # fmt: skip
    assert {words[0] for words in COMMANDS if len(words) == 1} == promised
    assert ("items", "load") in COMMANDS


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_help_is_quick_and_light(words: tuple[str, ...]) -> None:
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", PROBE, *words, "--help"],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=True,
    )
    after = os.times()
    spent_s = (after.children_user - before.children_user) + (
        after.children_system - before.children_system
    )
    text, _, imported = done.stdout.rstrip().rpartition("\n")
    assert "Usage:" in text
    assert spent_s < CPU_S_MAX
    assert not set(HEAVY) & set(json.loads(imported))


def test_every_command_says_what_it_does() -> None:
    for words in COMMANDS:
        command: Any = typer.main.get_command(app)
        for word in words:
            command = command.commands[word]
        assert command.help, words
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert parameter.help, (words, parameter.name)
