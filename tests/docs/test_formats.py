"""Goal: docs/formats.md names everything that exists, with the values it has."""

from __future__ import annotations

import ast
import inspect
import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
import typer
from google.protobuf import text_format
from pydantic import BaseModel
from tritonclient.grpc import model_config_pb2

from compose.cli import app
from compose.settings import Settings
from compose.trainer_service.metrics import TrainerMetrics
from features import followers, keys, nearline
from features.catalogue import Item
from features.config import DEFAULT_ACTIONS
from features.errors import Reason
from features.events import Event
from features.feature_log import Served
from features.lake import LAKE_SCHEMA
from features.lake_manifest import Manifest
from features.row import TRAILER_BYTES
from features.state import RECORD, RECORD_BYTES
from scoring.counts import METRICS
from scoring.ladder import LADDER
from scoring.signature import PROVENANCE, Degraded
from streams.metrics import WorkerMetrics
from streams.micro_batch import DeadLetter, Record, dead_letter_headers
from streams.nearline_metrics import NearlineMetrics
from streams.topics import Topics
from trainer import export

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Rows = list[list[str]]
    Table = Callable[..., Rows]

BYTES_OF = {"int32": 4, "int64": 8, "uint8": 1, "uint16": 2, "uint32": 4, "uint64": 8, "float32": 4}


def quoted(cells: list[str]) -> set[str]:
    """Return what stands in backticks in some cells."""
    return set(re.findall(r"`([^`]+)`", " ".join(cells)))


def first_names(rows: Rows) -> list[str]:
    """Return the names in backticks of the first column, in order."""
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row[0])]


def test_event_fields(formats: str, table: Table) -> None:
    rows = table(formats, "field", "type", "range", "absent means", "kept in")
    fields = {field.name: field for field in msgspec.structs.fields(Event)}
    assert set(first_names(rows)) == set(fields)
    for name, row in zip(first_names(rows), rows, strict=True):
        assert (row[3] == "refused") is fields[name].required, name


def test_feature_log_record(formats: str, table: Table) -> None:
    rows = table(formats, "field of the record", "type", "what")
    assert first_names(rows) == list(Served.__struct_fields__)


def test_item_fields_and_actions(formats: str) -> None:
    for name in Item.__struct_fields__:
        assert f"`{name}`" in formats
    for code, action in enumerate(DEFAULT_ACTIONS):
        assert re.search(rf"`{action}`\s+{code}\b", formats), action


def test_dead_letter_reasons(formats: str, table: Table) -> None:
    rows = table(formats, "reason", "when", "judged by")
    assert sorted(first_names(rows)) == sorted(reason.value for reason in Reason)


def test_dead_letter_headers(formats: str, table: Table) -> None:
    letter = DeadLetter(Record(0, 0, 0, None, None, None), Reason.MALFORMED, "")
    sent = [name for name, _ in dead_letter_headers(letter, "t")]
    assert first_names(table(formats, "header", "value")) == sent


def test_topics(formats: str, table: Table) -> None:
    rows = table(formats, "topic", "default name", "key", "value", "partitions", "settings")
    described = {row[1].strip("`"): row for row in rows}
    specs = {spec.name: spec for spec in Topics().specs()}
    assert set(described) == set(specs)
    for name, spec in specs.items():
        settings = described[name][5]
        if settings == "as for events":
            settings = described[Topics().events][5]
        assert quoted([settings]) == {f"{key}={value}" for key, value in spec.settings.items()}


def key_makers() -> Iterator[tuple[str, str]]:
    """Yield each maker of a Redis key, and its key as the page writes it."""
    for name, value in (vars(keys) | vars(nearline) | vars(followers)).items():
        if name.endswith("_KEY"):
            yield name, value
        elif name.endswith("_key") and inspect.isfunction(value):
            names = list(inspect.signature(value).parameters)
            made = value(**dict.fromkeys(names, 7)).replace("g7", "gN")
            for tag, meant in {
                f"{{b{keys.bucket_of(7)}}}": "{bBUCKET}",
                f"{{i{keys.bucket_of(7)}}}": "{iBUCKET}",
                "{b7}": "{bBUCKET}",
                "{t7}": "{tPARTITION}",
            }.items():
                made = made.replace(tag, meant)
            yield name, re.sub(r":7$", f":{names[-1].removesuffix('_id').upper()}", made)


def test_redis_keys(formats: str, table: Table) -> None:
    rows = table(formats, "key", "made by", "type", "holds", "written by")
    described = {(row[1].strip("`"), row[0].strip("`")) for row in rows}
    assert described == set(key_makers())


def test_a_record(formats: str, table: Table) -> None:
    rows = table(formats, "offset", "bytes", "type", "field")
    assert RECORD.fields is not None
    names = [name for row in rows for name in re.findall(r"^`(\w+)`|^(reserved)", row[3])]
    described = {
        a or b: (int(row[0]), int(row[1])) for (a, b), row in zip(names, rows, strict=True)
    }
    # Every byte of a record is accounted for.
    assert described == {
        name: (at, kind.itemsize) for name, (kind, at, *_) in RECORD.fields.items()
    }
    assert sum(size for _, size in described.values()) == RECORD_BYTES


def test_the_trailer(formats: str, table: Table) -> None:
    """Its parts follow each other and have the sizes of their types."""
    rows = table(formats, "offset", "from the end", "bytes", "type", "field")
    at = 0
    for offset, from_end, size, kind, name in rows:
        assert (int(offset), int(from_end)) == (at, at - TRAILER_BYTES), name
        times, _, base = kind.rpartition(" x ")
        if base in BYTES_OF:
            assert int(size) == BYTES_OF[base] * int(times or 1), name
        at += int(size)
    assert at == TRAILER_BYTES


def test_the_lake(formats: str, table: Table) -> None:
    rows = table(formats, "column", "type", "null")
    described = [(row[0].strip("`"), row[1], row[2]) for row in rows]
    assert described == [
        (
            field.name,
            "dictionary of string" if "dictionary" in str(field.type) else _arrow(str(field.type)),
            "yes" if field.nullable else "no",
        )
        for field in LAKE_SCHEMA
    ]


def _arrow(name: str) -> str:
    """Return Arrow's name of a type as Parquet's tools write it."""
    return {"float": "float32"}.get(name, name)


def test_manifest_keys(formats: str, table: Table) -> None:
    tree = ast.parse(inspect.getsource(export._manifest))
    literal = next(node.value for node in ast.walk(tree) if isinstance(node, ast.Return))
    assert isinstance(literal, ast.Dict)
    written = {ast.literal_eval(key) for key in literal.keys if key is not None}
    written |= set(export.Provenance.__dataclass_fields__) | {"files", "training_files"}
    assert set(first_names(table(formats, "key of the manifest", "what"))) == written


@pytest.mark.parametrize("model", ["recommend", "gems", "lifelong"])
def test_tensors(model: str, formats: str, repository: Path) -> None:
    text = (repository / "model_repo" / model / "config.pbtxt").read_text(encoding="utf-8")
    config: Any = text_format.Parse(text, model_config_pb2.ModelConfig())
    after = formats.split(f"### `{model}`")[1]
    section = re.split(r"\n##+ ", after)[0]
    for side, tensors in (("input", config.input), ("output", config.output)):
        block = section.split(f"| {side} | type |")[1].split("\n\n")[0]
        rows = [line.strip("|").split("|") for line in block.splitlines() if line.startswith("| `")]
        described = {name: row[1].strip() for row in rows for name in quoted([row[0]])}
        kinds = {
            tensor.name: model_config_pb2.DataType.Name(tensor.data_type).removeprefix("TYPE_")
            for tensor in tensors
        }
        assert described == kinds


def test_provenance_and_degraded_flags(formats: str, table: Table) -> None:
    assert first_names(table(formats, "column of `provenance`", "meaning")) == list(PROVENANCE)
    rows = table(formats, "flag", "value", "what happened", "what the answer holds")
    described = {row[0].strip("`"): int(row[1]) for row in rows}
    assert described == {flag.name: flag.value for flag in Degraded}


def commands(group: Any, prefix: str = "moveline ") -> Iterator[str]:  # noqa: ANN401 - click's
    """Yield every command that can be typed."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{prefix}{name} ")
        else:
            yield prefix + name


@pytest.mark.parametrize("command", list(commands(typer.main.get_command(app))))
def test_commands(command: str, handbook: str) -> None:
    assert f"`{command}" in handbook


def test_no_command_is_described_that_does_not_exist(formats: str, table: Table) -> None:
    rows = table(formats, "command", "reads", "writes")
    existing = set(commands(typer.main.get_command(app)))
    assert set(first_names([[row[0]] for row in rows])) == existing


def settings_keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield every key of moveline.toml, sections joined by a dot."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if inspect.isclass(kind) and issubclass(kind, BaseModel):
            yield from settings_keys(kind, f"{prefix}{name}.")
        else:
            yield prefix + name


def test_settings(formats: str, table: Table) -> None:
    assert first_names(table(formats, "key", "default", "decides")) == list(settings_keys(Settings))


@pytest.mark.parametrize("key", list(settings_keys(Settings)))
def test_settings_are_in_the_handbook(key: str, handbook: str) -> None:
    assert f"`{key}`" in handbook


def test_metrics(formats: str, table: Table) -> None:
    described = first_names(table(formats, "scoring metric", "counts"))
    assert described == [metric.name for metric in METRICS]
    for header, metrics in (
        ("metric", WorkerMetrics()),
        ("near-line metric", NearlineMetrics()),
        ("trainer metric", TrainerMetrics()),
    ):
        exported = {family.name for family in metrics.registry.collect()}
        named = first_names(table(formats, header, "counts or measures"))
        assert set(named) == exported
        described += named
    assert set(re.findall(r"`(moveline_\w+)`", formats)) == set(described)


def test_the_ladder(repository: Path, table: Table) -> None:
    page = (repository / "docs" / "serving.md").read_text(encoding="utf-8")
    rows = table(page, "step", "flag", "when", "the answer")
    assert rows == [
        [
            f"`{step.name}`",
            f"`{step.flag.name}`" if step.flag else "none",
            step.condition,
            step.answer,
        ]
        for step in LADDER
    ]


def test_the_lakes_revisions(formats: str, table: Table) -> None:
    named = first_names(table(formats, "key of a revision", "what"))
    assert named == list(Manifest.__struct_fields__)
