"""No figure in a page is written by hand: each stands in a result a command wrote."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.readme import BLOCK, PAGES, RESULTS, rendered

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_shows_the_results(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert BLOCK.search(text)
    assert rendered(text) == text, f"run `make figures` and commit {page.name}"


def test_every_result_is_shown() -> None:
    shown = {name for page in PAGES for name in BLOCK.findall(page.read_text(encoding="utf-8"))}
    assert shown == {path.stem for path in RESULTS.glob("*.json")}
