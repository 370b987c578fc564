"""One installation for all tests of publishing: each goes on from where the one before ended."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.publish_bench import installation, train_packages
from tests.once import made_once

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.publish_bench import Installation


@pytest.fixture(scope="package")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """Real servers in which a version is live and another was before."""
    models = made_once(tmp_path_factory, "published-packages", train_packages)
    with installation(sorted(models.iterdir())) as one:
        for package in one.packages:
            one.publish(package)
        yield one
