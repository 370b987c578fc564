"""The quality results in one table, for the README: what is served beside the best of each kind."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from benchmarks.quality_data import DATA_SETS
from benchmarks.quality_figures import SERVED, Outcome, outcomes
from trainer.rivals import RIVALS, SINGLE_STREAM

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

BLOCK: Final = re.compile(r"<!-- quality -->\n.*?<!-- /quality -->", re.DOTALL)
# What needs no training, or none but a few weights.
COUNTED: Final = tuple(name for name, rival in RIVALS.items() if rival.kind in {"free", "blend"})
LONG: Final = tuple(f"{name}_long" for name in SINGLE_STREAM)
HEADS: Final = (
    "data",
    "`gems`, live",
    "`gems`, state of the split",
    "best of counting",
    "best of one stream, 64 events",
    "best of one stream, 512 events",
)


def table(heads: Collection[str], rows: Collection[Collection[str]]) -> str:
    """A table in Markdown."""
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def rendered(text: str, folder: Path, present: Collection[tuple[str, str]]) -> str:
    """A page whose block shows the results.

    Args:
        text: The page.
        folder: Of the result files.
        present: Every (set, protocol) that has some.
    """
    rows = []
    for set_name, protocol in present:
        found = outcomes(folder, set_name, protocol)
        if SERVED in found:
            link = f"docs/results/{set_name}-{protocol}.md"
            title = f"{DATA_SETS[set_name].title}, {protocol.replace('_', ' ')}"
            rows.append([f"[{title}]({link})", *_cells(found)])
    return BLOCK.sub(f"<!-- quality -->\n{table(HEADS, rows)}\n<!-- /quality -->", text)


def _cells(found: dict[str, Outcome]) -> list[str]:
    frozen = found[SERVED].frozen()
    return [
        f"{found[SERVED].live()['ndcg10']:.4f}",
        "" if frozen is None else f"{frozen['ndcg10']:.4f}",
        *(_best(found, names) for names in (COUNTED, SINGLE_STREAM, LONG)),
    ]


def _best(found: dict[str, Outcome], names: Collection[str]) -> str:
    ndcg10 = {name: found[name].live()["ndcg10"] for name in names if name in found}
    if not ndcg10:
        return ""
    name = max(ndcg10, key=lambda one: ndcg10[one])
    return f"{ndcg10[name]:.4f} ({name})"
