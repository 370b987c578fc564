"""Goal: a publication that is broken anywhere changes no answer, and the next one heals.

Some cases of `make faults-publish`, the same way; the others are left to it: each takes two
publications.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.faults_publish import run_case
from benchmarks.publish_faults import CASES

if TYPE_CHECKING:
    from benchmarks.publish_bench import Installation

# The installation is counted with the first test; on a busy machine Triton's loads take a minute.
pytestmark = pytest.mark.timeout(900)


@pytest.mark.parametrize(
    "name",
    ["killed-renamed", "killed-recorded", "two-at-once"],
)
def test_the_old_version_answers_and_the_next_publication_heals(
    bench: Installation, name: str
) -> None:
    verdict = run_case(bench, CASES[name])
    assert verdict.is_healed, verdict
    assert verdict.num_answers > 0
    assert not verdict.wrong, verdict.wrong[:3]
    # On a busy machine Redis is late now and then; more would be a Redis that is away.
    assert verdict.num_store_away <= 1 + 0.05 * verdict.num_answers
