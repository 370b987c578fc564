"""Goal: the records of runs are whole whatever ends their writer, and few whatever repeats."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from compose.trainer_service import records
from compose.trainer_service.records import Gate, RunRecord, RunRecordError, Runs, run_name

if TYPE_CHECKING:
    from pathlib import Path

NOW_MS = 1_763_700_000_000


def begun(number: int, **fields: object) -> RunRecord:
    at_ms = NOW_MS + number
    given = {"run": run_name(at_ms), "state": "running", "why": "time", "started_ms": at_ms}
    return msgspec.convert({**given, **fields}, RunRecord)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    runs = Runs(tmp_path / "runs")
    assert runs.all() == []
    assert runs.newest() is None
    whole = begun(
        1, gates=[Gate("a", 1.0, 2.0), Gate("b", "x", "y", "says")], window_to={"1:0": 7}, loss=0.5
    )
    for one in (begun(2), whole, begun(10)):
        runs.write(one)
    assert runs.all() == [whole, begun(2), begun(10)]
    assert runs.newest() == begun(10)
    assert runs.find(whole.run) == whole
    ended = msgspec.structs.replace(whole, state="published")
    runs.write(ended)
    assert runs.find(whole.run) == ended
    assert {path.suffix for path in runs.path.iterdir()} == {".json"}


def test_a_half_written_record_is_not_seen(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.write(begun(1))
    (tmp_path / f"{begun(2).run}.new").write_bytes(b'{"run"')
    assert runs.all() == [begun(1)]


def test_what_is_missing_or_damaged_is_named(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    with pytest.raises(RunRecordError, match="moveline trainer runs"):
        runs.find("../runs")
    (tmp_path / "20250101-000000-000.json").write_bytes(b"{}")
    with pytest.raises(RunRecordError, match="20250101-000000-000"):
        runs.all()


def test_the_same_reason_again_takes_no_room(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    for number in range(5):
        runs.write_again(begun(number, state="skipped", says="lag", ended_ms=NOW_MS + number))
    assert [(one.times, one.started_ms, one.ended_ms) for one in runs.all()] == [
        (5, NOW_MS, NOW_MS + 4)
    ]
    runs.write_again(begun(6, state="skipped", says="few"))
    runs.write_again(begun(7, state="skipped", says="lag"))
    assert [(one.says, one.times) for one in runs.all()] == [("lag", 5), ("few", 1), ("lag", 1)]


def test_a_run_that_failed_is_never_written_over(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.write(begun(1, state="failed", says="x", kind="full"))
    runs.write_again(begun(2, state="failed", says="x"))
    assert len(runs.all()) == 2


def test_old_runs_leave_with_their_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "RUNS_KEPT_MAX", 2)
    runs = Runs(tmp_path)
    for number in range(4):
        runs.write(begun(number))
        (runs.folder(begun(number).run) / "checkpoint").mkdir(parents=True)
    runs.remove_old()
    kept = [begun(2), begun(3)]
    assert runs.all() == kept
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {one.run for one in kept}
