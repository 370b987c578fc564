"""`moveline compact` on a lake in a folder, without any server."""

from __future__ import annotations

from typing import TYPE_CHECKING

from typer.testing import CliRunner

from compose.cli import app
from features.lake_revisions import Place, files_on_disk
from streams.topics import Topics
from tests.lake.writing import append, event, rows_of

if TYPE_CHECKING:
    from pathlib import Path


def test_compact_merges_and_removes_when_told(tmp_path: Path) -> None:
    place = Place(tmp_path, Topics().events, 0)
    for offset in range(20):
        append(place, [event(offset, 1)])
    before = rows_of(place.files())
    run = CliRunner().invoke(app, ["compact", "--lake", str(tmp_path)], catch_exceptions=False)
    assert run.exit_code == 0
    assert "20 files became 1; 0 replaced files removed" in run.stderr
    assert len(files_on_disk(place)) == 21
    run = CliRunner().invoke(app, ["compact", "--lake", str(tmp_path), "--keep-hours", "0"])
    assert "1 files became 1; 20 replaced files removed" in run.stderr
    assert len(files_on_disk(place)) == 1
    assert rows_of(place.files()) == before
