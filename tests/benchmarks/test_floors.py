"""The model-free rivals reach the floors that were measured for these data sets elsewhere.

Other users were drawn there, so that a figure may differ by a quarter.
"""

from __future__ import annotations

import pytest

from benchmarks.quality_data import DATA, DATA_SETS, load_log
from trainer.contest import Budget, Contest
from trainer.protocols import Sample, global_split
from trainer.streaming_evaluation import judge_task

# HR@10 of one year of groceries, live and frozen at the split: popularity, own items by count.
FLOORS = {"popularity": (0.046, None), "own_frequency": (0.120, 0.108)}


@pytest.mark.skipif(
    not (DATA / "complete_journey.parquet").is_file(),
    reason=f"NOT CHECKED: no complete_journey.parquet in {DATA}; name its folder in DATA",
)
def test_the_floors_of_groceries_are_reached() -> None:
    data = DATA_SETS["complete_journey"]
    log, _ = load_log(data)
    task = global_split(log, Sample(test_users=200, test_times_per_user=20))
    contest = Contest.of(
        task, repeats=True, half_life_ms=data.half_life_ms, budget=Budget(), seed=1
    )
    for name, (live, frozen) in FLOORS.items():
        judged = judge_task(contest.source, task, contest.enter(name).rank, name=name)
        assert judged.live["hr10"] == pytest.approx(live, rel=0.25), name
        assert judged.frozen is not None
        if frozen is not None:
            assert judged.frozen["hr10"] == pytest.approx(frozen, rel=0.25), name
            assert judged.live["hr10"] > judged.frozen["hr10"]
