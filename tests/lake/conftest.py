"""A lake in a folder of its own, written by the sink's writer without a broker."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from features.lake_revisions import Place
from tests.lake.writing import TOPIC

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def place_in(tmp_path: Path) -> Callable[[int], Place]:
    """Returns a partition of an empty lake."""
    return lambda partition: Place(tmp_path, TOPIC, partition)
