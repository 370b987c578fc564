"""A training that goes on, or has a second process, learns from the events it began with."""

from collections.abc import Callable
from pathlib import Path

import pytest

from compose.settings import Settings, load_settings
from compose.training_log import FILE, TrainingLog, remove_traces, training_log
from features.lake_revisions import Place
from tests.lake.writing import append, event
from tests.small import SMALL
from trainer.checkpoint import FILE as CHECKPOINT_FILE
from trainer.dataset import EventLog
from trainer.errors import CheckpointError
from trainer.ranks import Ranks, chosen_device

ALONE = Ranks(chosen_device("cpu"))


def read(settings: Settings, *, resume: bool) -> TrainingLog:
    return training_log(settings, SMALL, ALONE, resume=resume)


def rows(log: EventLog) -> list[tuple[int, int, int]]:
    user_id = log.user_ids_U[log.user_N]
    return list(zip(user_id.tolist(), log.item_id_N.tolist(), log.ordinal_N.tolist(), strict=True))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Settings over an empty lake, which `place_in` writes."""
    return load_settings(lake={"path": tmp_path}, kafka={"prefix": "t"}, run_dir=tmp_path / "run")


def test_a_lake_that_grew_is_cut_to_what_it_was(
    settings: Settings, place_in: Callable[[int], Place]
) -> None:
    append(place_in(0), [event(number, user_id=number % 3) for number in range(10)])
    begun = read(settings, resume=True)
    append(place_in(0), [event(number, user_id=number % 5) for number in range(10, 20)])
    resumed = read(settings, resume=True)
    assert rows(resumed.log) == rows(begun.log)
    assert (resumed.window_from, resumed.window_to) == (begun.window_from, begun.window_to)
    anew = read(settings, resume=False)
    assert len(rows(anew.log)) == 20
    assert anew.window_to != begun.window_to
    assert rows(read(settings, resume=True).log) == rows(anew.log)


def test_a_run_that_starts_anew_leaves_nothing_of_the_one_before(
    settings: Settings, place_in: Callable[[int], Place]
) -> None:
    append(place_in(0), [event(number, user_id=1) for number in range(10)])
    read(settings, resume=False)
    checkpoint = settings.training.checkpoints / CHECKPOINT_FILE
    checkpoint.write_bytes(b"of an earlier run")
    read(settings, resume=False)
    assert not checkpoint.exists()
    remove_traces(settings)
    assert list(settings.training.checkpoints.iterdir()) == []
    append(place_in(0), [event(number, user_id=1) for number in range(10, 20)])
    assert len(rows(read(settings, resume=True).log)) == 20


def test_what_was_kept_and_is_damaged_is_named(
    settings: Settings, place_in: Callable[[int], Place]
) -> None:
    append(place_in(0), [event(number, user_id=1) for number in range(10)])
    read(settings, resume=False)
    (settings.training.checkpoints / FILE).write_bytes(b"half")
    with pytest.raises(CheckpointError, match="without --resume"):
        read(settings, resume=True)
