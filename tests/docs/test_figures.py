"""No figure in the README is written by hand: each stands in a result a command wrote."""

from __future__ import annotations

from benchmarks.readme import BLOCK, ROOT, rendered


def test_the_readme_shows_the_results() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert BLOCK.search(readme)
    assert rendered(readme) == readme, "run `make figures` and commit README.md"
