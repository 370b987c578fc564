"""Seeds of the simulation: everything at or below the checkpoints equals the oracle, always.

Each seed is a world of its own: users, workers, faults and a schedule (tests/sim/world.py). A seed
that fails prints its story; `make sim SEED=n` prints it again.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import pytest

from tests.sim.planted import PLANTED, Plant
from tests.sim.world import SeedFailedError, run_seed

if TYPE_CHECKING:
    from collections.abc import Iterator

NUM_SEEDS = 300
_PART = 50


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """What the workers log is in the story already."""
    log = logging.getLogger("moveline")
    before = log.level
    log.setLevel(logging.CRITICAL)
    yield
    log.setLevel(before)


@pytest.mark.parametrize("first", range(0, NUM_SEEDS, _PART))
def test_no_seed_breaks_a_law(first: int) -> None:
    for seed in range(first, first + _PART):
        run_seed(seed)


def test_a_seed_is_the_same_every_time() -> None:
    assert run_seed(7).trace == run_seed(7).trace


def test_seeds_reach_every_fault() -> None:
    """A simulation that never crashed, paused or restored anything would prove nothing."""
    told = "\n".join(line for seed in range(100) for line in run_seed(seed).trace)
    for what in (
        "CRASHES",
        "wakes up",
        "GROUP expires",
        "GROUP rebalances",
        "REDIS goes back",
        "connections broken: True",
        "connections broken: False",
        "away=True",
        "full=True",
        "does not get the reply",
        "is asked to stop",
        "exits: ",
        "LAKE has",
        "dead letter acknowledged",
        "items put",
    ):
        assert what in told, what


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_bug_is_caught(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    plant = PLANTED[name]
    seed, cause = first_catch(plant)
    with capsys.disabled():
        print(f"\n{name}: seed {seed}: {cause}")  # noqa: T201 - the table people want to see


def first_catch(plant: Plant) -> tuple[int, str]:
    """Return the first seed that tells, and what it says; without the bug that seed passes."""
    for seed in plant.seeds():
        try:
            with plant.planted():
                run_seed(seed)
        except SeedFailedError as error:
            run_seed(seed)
            return seed, error.cause
    pytest.fail(f"no seed caught it: {plant.story}")
