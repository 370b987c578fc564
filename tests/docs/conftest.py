"""The documents' texts, and a reader for the one table form they use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable

REPOSITORY = Path(__file__).parents[2]

Rows = list[list[str]]


@pytest.fixture(scope="session")
def repository() -> Path:
    """The repository's root."""
    return REPOSITORY


def read(name: str) -> str:
    """Return a document's text."""
    return (REPOSITORY / name).read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def formats() -> str:
    """docs/formats.md."""
    return read("docs/formats.md")


@pytest.fixture(scope="session")
def architecture() -> str:
    """ARCHITECTURE.md."""
    return read("ARCHITECTURE.md")


@pytest.fixture(scope="session")
def handbook() -> str:
    """What a user reads: README, formats and bring_your_own as one text."""
    return "\n".join(read(name) for name in ("README.md", "docs/formats.md", DOCS_BYO))


DOCS_BYO = "docs/bring_your_own.md"


def read_tables(text: str) -> list[Rows]:
    """Return every table's rows, cells stripped; the first row of each is its header."""
    tables: list[Rows] = []
    inside = False
    for line in text.splitlines():
        if not line.startswith("|"):
            inside = False
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not inside:
            tables.append([cells])
        elif not set("".join(cells)) <= set("-: "):
            tables[-1].append(cells)
        inside = True
    return tables


@pytest.fixture(scope="session")
def table() -> Callable[..., Rows]:
    """Returns the rows, header apart, of the only table of a text whose header is the one given."""

    def find(text: str, *header: str) -> Rows:
        found = [rows[1:] for rows in read_tables(text) if tuple(rows[0]) == header]
        assert len(found) == 1, f"{len(found)} tables are headed {header}"
        return found[0]

    return find
