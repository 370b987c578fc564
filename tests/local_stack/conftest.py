"""Commands that no failing test leaves behind."""

from __future__ import annotations

from contextlib import ExitStack, closing
from typing import TYPE_CHECKING

import pytest

from tests.local_stack.marked import Marked

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Marked]]:
    """Start child.py on the test's folder with these arguments; it is stopped after the test."""
    with ExitStack() as commands:

        def begin(*arguments: str) -> Marked:
            return commands.enter_context(closing(Marked(tmp_path, *arguments)))

        yield begin
