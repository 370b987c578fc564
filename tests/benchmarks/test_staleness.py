"""The run over stale models: no arm knows the future, and a run that was stopped goes on.

Method: a made-up portal of four days in which articles live for hours; the functions of the
benchmark on it, with trainings that end by their epochs, so that equal input gives equal weights.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks import staleness
from benchmarks.bench_staleness import UnfinishedError, draw, summary
from benchmarks.staleness import Ground, run_arm, run_references
from benchmarks.staleness_protocol import ARMS, DAY_MS, HOUR_MS, Protocol
from tests.trainer.conftest import small_model
from trainer.dataset import EventLog
from trainer.training_state import WarmState

if TYPE_CHECKING:
    from pathlib import Path

SPLIT_MS, END_MS = 2 * DAY_MS, 3 * DAY_MS
# In the middle of the judged day, at a training of the six-hourly arm.
CHANGE_MS = SPLIT_MS + 12 * HOUR_MS
# Articles appear at an even pace, and are read for so long.
ARTICLE_EACH_MS, READ_FOR_MS = HOUR_MS, 10 * HOUR_MS


def portal_columns(*, seed: int) -> dict[str, np.ndarray[Any, Any]]:
    """Eighty readers who come several times and read what is fresh."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(80):
        for visit_ms in np.sort(rng.integers(HOUR_MS, END_MS, 9)).tolist():
            newest = visit_ms // ARTICLE_EACH_MS
            for click in range(int(rng.integers(1, 4))):
                item = max(0, newest - int(rng.integers(0, READ_FOR_MS // ARTICLE_EACH_MS)))
                rows.append((user, 1_000 + item, visit_ms + 60_000 * click, item % 2))
    user_id, item_id, time_ms, domain = (np.array(one) for one in zip(*rows, strict=True))
    order = np.lexsort((time_ms, user_id))
    first = np.searchsorted(user_id[order], user_id[order])
    return {
        "user_id": user_id[order],
        "item_id": item_id[order],
        "event_time_ms": time_ms[order],
        "ordinal": np.arange(len(order)) - first,
        "domain": domain[order].astype(np.uint64),
    }


def protocol(**changes: Any) -> Protocol:  # noqa: ANN401 - of any field
    settings: dict[str, Any] = {
        "one_user_in": 1,
        "begin_ms": 0,
        "split_ms": SPLIT_MS,
        "end_ms": END_MS,
        "test_users": 25,
        "first_s": 600.0,
        "day_s": 2_400.0,
        "epochs": 0.5,
        "served": "gems_no_sources",
        "model": small_model(),
        "code_sizes": (8, 8, 8),
    }
    return Protocol(**{**settings, **changes})


@pytest.fixture(scope="module")
def columns() -> dict[str, np.ndarray[Any, Any]]:
    return portal_columns(seed=1)


@pytest.fixture(scope="module")
def done(
    columns: dict[str, np.ndarray[Any, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Ground:
    """A run that ended."""
    folder = tmp_path_factory.mktemp("staleness")
    ground = Ground.of(EventLog.from_columns(columns), protocol(), folder)
    run_references(ground)
    for arm in ARMS:
        run_arm(ground, arm)
    return ground


def test_every_judged_event_has_a_place_in_every_arm(done: Ground) -> None:
    found = summary(done)
    assert {"once_frozen", "once_live", "daily_frozen", "daily_live"} <= set(found)
    assert set(found["by_day"]) == {"1970-01-03"}
    num_events = int(done.labels.num_rows_G.sum())
    assert all(one["events"] == num_events for one in found["overall"].values())
    assert max(len(done.labels.select(done.labels.user_G == user)) for user in range(80)) <= 12


def test_what_is_trained_again_names_new_articles(done: Ground) -> None:
    """Articles of the judged day: no arm that ended with the day before can be right about one."""
    found = summary(done)["overall"]
    assert found["sixhourly_live"]["recall100"] > found["once_live"]["recall100"] + 0.2
    assert found["once_live"]["recall100"] == pytest.approx(
        found["daily_live"]["recall100"], abs=1e-6
    )  # one judged day: both were trained at its beginning


def test_a_finished_run_does_nothing(done: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in done.folder.glob("*.json")}

    def refuse(*_: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(staleness, "trained_on", refuse)
    monkeypatch.setattr(staleness, "first_training", refuse)
    for arm in ARMS:
        run_arm(done, arm)
    run_references(done)
    assert {path: path.stat().st_mtime_ns for path in done.folder.glob("*.json")} == before


def test_a_stopped_run_ends_in_the_same_places(
    done: Ground,
    columns: dict[str, np.ndarray[Any, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It dies while it judges the second of four trainings, and again in the third training."""
    ground = Ground.of(EventLog.from_columns(columns), protocol(), tmp_path)
    moments = ground.protocol.moments("sixhourly")

    class KilledError(Exception):
        pass

    def killed_when(name: str, moment_ms: int) -> None:
        whole = getattr(staleness, name)

        def run(*arguments: Any) -> Any:  # noqa: ANN401 - whatever the function takes
            at = [one.split_ms + 1 for one in arguments if isinstance(one, WarmState)]
            if moment_ms in (arguments if name == "trained_on" else at):
                raise KilledError
            return whole(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(staleness, name, run)
            with pytest.raises(KilledError):
                run_arm(ground, "sixhourly")

    killed_when("entry_of", moments[1])
    with pytest.raises(UnfinishedError, match="run it again"):
        summary(ground)
    killed_when("trained_on", moments[2])
    run_arm(ground, "sixhourly")
    for moment_ms in moments:
        assert ground.found("sixhourly", moment_ms) == done.found("sixhourly", moment_ms)


@pytest.mark.parametrize("served", ["gems_no_sources", "gems"])
def test_the_future_changes_nothing(
    columns: dict[str, np.ndarray[Any, Any]], tmp_path: Path, served: str
) -> None:
    """From noon on everybody reads something else: until then all is as it was, weights too."""
    other = dict(columns)
    later = columns["event_time_ms"] >= CHANGE_MS
    other["item_id"] = np.where(later, 900 - columns["item_id"] % 100, columns["item_id"])
    moment_ms = CHANGE_MS - 6 * HOUR_MS
    lists, weights = [], []
    for name, one in (("one", columns), ("other", other)):
        ground = Ground.of(EventLog.from_columns(one), protocol(served=served), tmp_path / name)
        base = WarmState.of(staleness.first_training(ground))
        config = ground.protocol.training(600.0)
        state = WarmState.of(staleness.trained_on(ground, base, config, moment_ms))
        labels = ground.labels.select(
            (ground.labels.time_ms_G >= moment_ms) & (ground.labels.time_ms_G < CHANGE_MS)
        )
        assert len(labels) > 5
        entry = staleness.entry_of(ground, state)
        ids = np.concatenate(([0], ground.contest.catalogue.item_ids_V))
        lists.append(ids[entry.rank(labels)])
        references = [ids[ground.contest.enter(one).rank(labels)] for one in staleness.REFERENCES]
        lists[-1] = np.concatenate((lists[-1], *references), axis=1)
        weights.append(state.model.state_dict())
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (lists[0] == lists[1]).all()


def test_other_settings_are_another_result(done: Ground) -> None:
    other = dataclasses.replace(done, protocol=protocol(seed=2))
    assert other.found("once", SPLIT_MS) is None


def test_both_arms_get_the_same_seconds_a_day() -> None:
    one = protocol()
    assert one.seconds("sixhourly") * 4 == one.seconds("daily") == one.day_s


def test_the_picture_is_drawn(done: Ground, tmp_path: Path) -> None:
    draw(summary(done)["by_day"], tmp_path / "picture.png", served="gems")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
