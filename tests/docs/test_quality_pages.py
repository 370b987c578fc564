"""Every quality result has a page that says what it says, and no page stands without results."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.bench_quality import QUALITY
from benchmarks.quality_overview import BLOCK, rendered
from benchmarks.quality_pages import OVERVIEW, PAGES, page, present

if TYPE_CHECKING:
    from pathlib import Path


def test_pages_show_the_results(repository: Path) -> None:
    folder = repository / QUALITY
    expected = {
        f"{set_name}-{protocol}": page(folder, set_name, protocol)
        for set_name, protocol in present(folder)
    }
    found = {
        path.stem: path.read_text(encoding="utf-8") for path in (repository / PAGES).glob("*-*.md")
    }
    protocols = ("-global", "-leave_one_out")
    shown = {name: text for name, text in found.items() if name.endswith(protocols)}
    assert shown == expected, "run `make quality-pages` and commit docs/results"


def test_the_readme_has_all_sets(repository: Path) -> None:
    text = (repository / OVERVIEW).read_text(encoding="utf-8")
    folder = repository / QUALITY
    assert BLOCK.search(text)
    assert rendered(text, folder, present(folder)) == text, "run `make quality-pages`"
