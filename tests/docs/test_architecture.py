"""Goal: ARCHITECTURE.md, the glossary and the changelog speak of what exists.

Paths, tests, limits, sizes, import contracts: each is looked up in the code.
"""

from __future__ import annotations

import ast
import operator
import re
import tomllib
from typing import TYPE_CHECKING, Any

import pytest

from features.config import StateConfig
from features.events import EVENT_VERSION
from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH, MEMORY_BYTES
from features.row import ROW_FORMAT, TRAILER_BYTES, newest_bytes
from features.schema import schema_hash
from features.state import RECORD_BYTES
from scoring.signature import NUM_EXCLUDED, USERS_MAX
from streams.chunk_cap import WAITING_CHUNKS_DEFAULT
from trainer.export import MANIFEST_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    Rows = list[list[str]]
    Table = Callable[..., Rows]

SECTIONS = (
    "Problem and non-goals",
    "Priorities",
    "One picture",
    "Life of an event, life of a request",
    "Ground truth and what is derived",
    "Invariants",
    "Time and lateness",
    "Effects, and a crash after each",
    "Limits",
    "Back of the envelope",
    "Decisions, and what was not chosen",
    "Import rules",
    "Known weaknesses",
)
PACKAGES = ("features", "streams", "trainer", "scoring", "compose")
FOLDERS = (*PACKAGES, "model_repo", "tests", "docs", "benchmarks")
# What these names say of themselves: a bound that something runs into.
LIMIT_NAME = re.compile(r"(^MAX_|_MAX(_|$)|TIMEOUT_(S|MS)$)")
OPERATORS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Pow: operator.pow,
    ast.LShift: operator.lshift,
}


def test_sections_stand_in_their_order(architecture: str) -> None:
    found = re.findall(r"^## (\d+)\. (.+)$", architecture, re.MULTILINE)
    assert found == [(str(i), name) for i, name in enumerate(SECTIONS, start=1)]


def paths_in(text: str) -> set[str]:
    """Return every path of the repository that a text names, `N` standing for a version."""
    folders = "|".join(FOLDERS)
    return set(
        re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*\w|[A-Z]+\.md|pyproject\.toml)", text)
    )


@pytest.mark.parametrize(
    "document",
    ["ARCHITECTURE.md", "docs/formats.md", "docs/glossary.md", "CHANGELOG.md", "README.md"],
)
def test_every_path_exists(document: str, repository: Path) -> None:
    named = paths_in((repository / document).read_text(encoding="utf-8"))
    # Versions are written by a publication and are in no clone.
    named = {re.sub(r"^(model_repo/\w+)/(N|VERSION)$", r"\1", path) for path in named}
    absent = {path for path in named if not (repository / path).exists()}
    # The picture and the texts name modules without their ending.
    assert {path for path in absent if not (repository / f"{path}.py").is_file()} == set()


def test_paths_are_found_at_all(architecture: str) -> None:
    assert len(paths_in(architecture)) > 50


def test_links_lead_somewhere(repository: Path) -> None:
    for page in (*repository.glob("*.md"), *repository.glob("docs/*.md")):
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_test_named_exists(architecture: str, repository: Path) -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", architecture)
    assert len(named) > 25
    for path, name in named:
        tree = ast.parse((repository / path).read_text(encoding="utf-8"))
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        found = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
        assert name in found, f"{path}::{name}"


def test_every_invariant_has_a_test(architecture: str, table: Table) -> None:
    for invariant, test in table(architecture, "what always holds", "held by"):
        assert "::" in test, invariant


def value_of(node: ast.expr) -> Any:  # noqa: ANN401 - a number
    """Return the number that an expression of literals stands for."""
    if isinstance(node, ast.Call):
        assert ast.unparse(node.func) == "float.fromhex"
        return float.fromhex(ast.literal_eval(node.args[0]))
    if isinstance(node, ast.BinOp):
        return OPERATORS[type(node.op)](value_of(node.left), value_of(node.right))
    return ast.literal_eval(node)


def constants(path: Path) -> Iterator[tuple[str, ast.expr]]:
    """Yield the constants at a module's top level, unevaluated."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.value:
            yield node.target.id, node.value
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            yield node.targets[0].id, node.value


def test_limits_have_the_values_named(architecture: str, table: Table, repository: Path) -> None:
    for name, value, where, at_it in table(architecture, "limit", "value", "where", "at it"):
        found = dict(constants(repository / where.strip("`")))
        assert value_of(found[name.strip("`")]) == ast.literal_eval(value), name
        assert at_it, name


def test_no_limit_is_missing(architecture: str, table: Table, repository: Path) -> None:
    rows = table(architecture, "limit", "value", "where", "at it")
    named = {row[0].strip("`") for row in rows}
    for package in PACKAGES:
        for path in (repository / package).rglob("*.py"):
            limits = {name for name, _ in constants(path) if LIMIT_NAME.search(name)}
            assert {name for name in limits if not name.startswith("_")} <= named, path


def test_sizes_are_those_of_the_formats(architecture: str, table: Table) -> None:
    rows = table(architecture, "what", "bytes", "how")
    described = {int(row[1].replace(",", "")) for row in rows if not row[1].endswith("GB")}
    small, large = StateConfig(), StateConfig(recent=256, mid=4744, chunk=256)
    streams = small.recent + small.mid
    after_chunk = streams * RECORD_BYTES + TRAILER_BYTES
    append, leave = RECORD_BYTES + TRAILER_BYTES, after_chunk + small.chunk * RECORD_BYTES
    assert described == {
        RECORD_BYTES,
        newest_bytes(10),
        newest_bytes(small.tail_max - 1),
        newest_bytes(large.tail_max - 1),
        (10_000 - streams) // small.chunk * small.chunk * RECORD_BYTES,
        WAITING_CHUNKS_DEFAULT * small.chunk * RECORD_BYTES,
        MEMORY_BYTES,
        newest_bytes(small.tail_max - 1) + MEMORY_BYTES + 3 * 4,
        append,
        leave,
        ((small.chunk - 1) * append + leave) // small.chunk,
        newest_bytes(streams),
        USERS_MAX * newest_bytes(streams),
        newest_bytes(small.recent),
        streams * 5 * 8 + LIFELONG_ROWS * LIFELONG_WIDTH * 4 + 8 + NUM_EXCLUDED * 8,
        10 * 12 + 7 * 8 + 3 * 4,
    }


def test_import_contracts_are_those_of_pyproject(architecture: str, repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))
    section = architecture.split("## 12. ")[1].split("## 13. ", maxsplit=1)[0]
    named = re.findall(r'^- "([^"]+)"', re.sub(r"\n  +", " ", section), re.MULTILINE)
    assert named == [one["name"] for one in project["tool"]["importlinter"]["contracts"]]


def test_the_doors_named_are_the_only_ones(repository: Path) -> None:
    """Who imports a client, anywhere in a file, is who section 12 says."""
    doors = {
        "redis": {"features/redis_client.py"},
        "confluent_kafka": {
            f"streams/kafka/{name}.py" for name in ("__init__", "admin", "clients")
        },
        "tritonclient": {"scoring/client.py", "scoring/triton.py"},
        "feast": {
            f"features/{name}.py"
            for name in (
                "definitions",
                "offline",
                "online_config",
                "online_response",
                "online_store",
                "online_values",
                "online_write",
            )
        },
    }
    importers: dict[str, set[str]] = {client: set() for client in doors}
    for package in PACKAGES:
        for path in (repository / package).rglob("*.py"):
            for name in running_imports(ast.parse(path.read_text(encoding="utf-8"))):
                if name in importers:
                    importers[name].add(str(path.relative_to(repository)))
    assert importers == doors


def running_imports(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level packages imported when the code runs: not those for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module.split(".")[0]
        yield from running_imports(node)


def test_the_changelog_names_what_is_readable(repository: Path, table: Table) -> None:
    text = (repository / "CHANGELOG.md").read_text(encoding="utf-8")
    rows = {row[0]: row[1].strip("`") for row in table(text, "what", "now", "when it changes")}
    assert rows["event version `v`"] == str(EVENT_VERSION)
    assert rows["row format"] == str(ROW_FORMAT)
    assert rows["manifest version"] == str(MANIFEST_VERSION)
    assert rows["feature schema hash (default rules)"] == schema_hash(StateConfig())


def test_the_glossary_is_sorted_and_says_each_word_once(repository: Path, table: Table) -> None:
    text = (repository / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = [row[0].lower() for row in table(text, "word", "meaning")]
    assert words == sorted(words)
    assert len(set(words)) == len(words)


def test_the_glossary_has_the_words_of_the_other_pages(repository: Path, table: Table) -> None:
    """The flags' page and the map use these without saying what they are."""
    text = (repository / "docs" / "glossary.md").read_text(encoding="utf-8")
    words = {word.strip() for row in table(text, "word", "meaning") for word in row[0].split(",")}
    needed = "bucket,chunk,departed id,generation,lake,micro-batch,ordinal,pointers,row,tail,zombie"
    assert set(needed.split(",")) <= words
