"""One progress bar for long reads and writes: how far, how fast, how much longer."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.progress import Task

# Moving the bar costs more than an event does, so that callers report this many at a time.
REPORT_EVERY: Final = 1_000


class _RateColumn(ProgressColumn):
    """Events per second, averaged by rich over its last seconds."""

    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        """Return the rate, of the whole run once it has ended."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s")


@contextmanager
def progress_bar(
    description: str, *, total: int | None, unit: str = "events", shown: bool = True
) -> Iterator[Callable[[int], None]]:
    """Yield what adds to the bar on stderr; without a terminal only the final state is printed."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _RateColumn(unit),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
