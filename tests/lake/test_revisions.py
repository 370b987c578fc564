"""Goal: whatever is rewritten, whenever it crashes, the lake reads as the same log.

Method: files of the sink's own writer; a plain list of rows is the model. Crashes are an error
raised at every call that touches the disk in turn.
"""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from features import lake_revisions
from features.errors import LakeBusyError, LakeError
from features.lake import BLOCK_OFFSETS, list_files, next_offset
from features.lake_compact import blocks, compact
from features.lake_lock import REVISION_LOCK_NAME, locked
from features.lake_manifest import MANIFEST_NAME, revision_name
from features.lake_revisions import (
    PENDING_REVISION_NAME,
    Place,
    files_on_disk,
    find_user,
    manifests,
    places,
    remove_old_revisions,
)
from tests.lake.writing import START_MS, TOPIC, append, drop_user, event, rows_of

if TYPE_CHECKING:
    from collections.abc import Callable

NOW_MS = START_MS + 10**9


@pytest.fixture
def place(place_in: Callable[[int], Place]) -> Place:
    """Twelve small files: users 1 to 3 in turn, a refused record now and then."""
    one = place_in(0)
    for start in range(0, 60, 5):
        append(one, [event(n, n % 3 + 1) if n % 7 else None for n in range(start, start + 5)])
    return one


def test_compaction_changes_no_row_and_few_files_remain(place: Place) -> None:
    before = rows_of(place.files())
    done = compact(place, now_ms=NOW_MS, growing_files_min=2)
    assert done == (1, 12, 1)
    assert [(file.start, file.end) for file in place.files()] == [(0, 59)]
    assert rows_of(place.files()) == before
    # Nothing left to merge: no empty revision.
    assert compact(place, now_ms=NOW_MS, growing_files_min=2) == (None, 1, 1)


def test_a_growing_block_waits_for_enough_files(place: Place) -> None:
    assert compact(place, now_ms=NOW_MS, growing_files_min=13).revision is None
    assert compact(place, now_ms=NOW_MS, growing_files_min=12).revision == 1


def test_files_are_merged_within_their_block_only(place_in: Callable[[int], Place]) -> None:
    place = place_in(0)
    # Offsets without events are cheap: the writer cuts at the block's end by itself.
    append(place, [None] * (BLOCK_OFFSETS - 4))
    append(place, [event(n, 1) for n in range(8)])
    append(place, [event(n, 1) for n in range(8, 12)])
    assert [len(block) for block in blocks(place.files())] == [2, 2]
    assert compact(place, now_ms=NOW_MS) == (1, 4, 3)
    assert [(file.start, file.end) for file in place.files()] == [
        (0, BLOCK_OFFSETS - 1),
        (BLOCK_OFFSETS, BLOCK_OFFSETS + 3),
        (BLOCK_OFFSETS + 4, BLOCK_OFFSETS + 7),
    ]


def test_the_sink_goes_on_behind_a_revision(place: Place) -> None:
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    remove_old_revisions(place, before_ms=NOW_MS)
    assert next_offset(place.root, TOPIC, 0) == 60
    append(place, [event(60, 1)])
    assert [(file.start, file.end) for file in place.files()] == [(0, 59), (60, 60)]
    assert rows_of(place.files())[-1] == (60, 1, "e-60")


def test_a_late_event_changes_no_published_file(place: Place) -> None:
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    before = {file.path: file.path.read_bytes() for file in files_on_disk(place)}
    append(place, [event(60, 1, event_time_ms=START_MS - 10**9)])
    assert {path: path.read_bytes() for path in before} == before


def test_a_reader_that_began_before_reads_on(place: Place) -> None:
    began = place.files()
    before = rows_of(began)
    drop_user(place.root, 2, now_ms=NOW_MS)
    compact(place, now_ms=NOW_MS + 1, growing_files_min=2)
    remove_old_revisions(place, before_ms=NOW_MS - 1)
    assert rows_of(began) == before
    assert remove_old_revisions(place, before_ms=NOW_MS + 1)
    with pytest.raises(LakeError, match="cannot be read"):
        rows_of(began)


def test_a_user_is_gone_from_what_counts_and_then_from_the_disk(place: Place) -> None:
    before = rows_of(place.files())
    assert sum(found.num_events for found in find_user(place.root, TOPIC, 2)) == 17
    (made,) = drop_user(place.root, 2, now_ms=NOW_MS)
    assert made.revision == 1
    found = find_user(place.root, TOPIC, 2)
    assert found
    assert not any(one.is_current for one in found)
    assert rows_of(place.files()) == [row for row in before if row[1] != 2]
    assert (place.files()[0].start, place.files()[-1].end) == (0, 59)
    remove_old_revisions(place, before_ms=NOW_MS)
    assert find_user(place.root, TOPIC, 2) == []
    # Nothing of the user in any byte on disk either, dictionaries included.
    assert not any(b"d-2" in path.read_bytes() for path in place.root.rglob("*.parquet"))
    assert drop_user(place.root, 2, now_ms=NOW_MS) == []


def test_a_log_that_goes_on_in_another_topic_is_one_log(place_in: Callable[[int], Place]) -> None:
    first = place_in(0)
    later = [Place(first.root, f"{TOPIC}-{source}", 0, source) for source in (1, 2)]
    for place in (first, *later):
        append(place, [event(n, 7) for n in range(4)])
    assert places(first.root, TOPIC) == [first, *later]
    assert [one.num_events for one in find_user(first.root, TOPIC, 7)] == [4, 4, 4]
    assert len(drop_user(first.root, 7, now_ms=NOW_MS)) == 3
    assert not any(one.is_current for one in find_user(first.root, TOPIC, 7))


def test_a_user_is_looked_for_in_every_partition(place_in: Callable[[int], Place]) -> None:
    for partition in (0, 1, 2):
        append(place_in(partition), [event(0, 7 if partition != 1 else 8)])
    assert [one.file.partition for one in find_user(place_in(0).root, TOPIC, 7)] == [0, 2]
    assert len(drop_user(place_in(0).root, 7, now_ms=NOW_MS)) == 2


def test_a_file_without_any_event_left_still_covers_its_offsets(
    place_in: Callable[[int], Place],
) -> None:
    place = place_in(0)
    append(place, [event(n, 7) for n in range(4)])
    drop_user(place.root, 7, now_ms=NOW_MS)
    assert [(file.start, file.end) for file in place.files()] == [(0, 3)]
    assert rows_of(place.files()) == []
    assert next_offset(place.root, TOPIC, 0) == 4


class Crash(Exception):  # noqa: N818 - it stands for a power cut, not for an error
    """Raised in the place of a call that touches the disk."""


def crash_at(patched: pytest.MonkeyPatch, step: int) -> list[str]:
    """The call number `step` that touches the disk crashes instead; return the calls seen."""
    seen: list[str] = []

    def wrap(owner: Any, name: str) -> None:  # noqa: ANN401 - a class or a module
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - passed on as received
            seen.append(name)
            if len(seen) == step:
                raise Crash(name)
            return real(*args, **kwargs)

        patched.setattr(owner, name, call)

    for owner, name in (
        (os, "fsync"),
        (Path, "rename"),
        (Path, "unlink"),
        (Path, "mkdir"),
        (Path, "rmdir"),
        (lake_revisions, "write_file"),
    ):
        wrap(owner, name)
    return seen


def forget_and_compact(place: Place) -> None:
    """Two revisions and the removal of what they replaced."""
    drop_user(place.root, 2, now_ms=NOW_MS)
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    remove_old_revisions(place, before_ms=NOW_MS)


def test_a_crash_at_any_step_leaves_the_old_lake_or_the_new_one(tmp_path: Path) -> None:
    num_steps, step = 1, 0
    while step < num_steps:
        step += 1
        place = Place(tmp_path / str(step), TOPIC, 0)
        for start in range(0, 12, 4):
            append(place, [event(n, n % 3 + 1) for n in range(start, start + 4)])
        before = rows_of(place.files())
        after = [row for row in before if row[1] != 2]
        with pytest.MonkeyPatch.context() as patched:
            seen = crash_at(patched, step)
            try:
                forget_and_compact(place)
            except Crash:
                num_steps = step + 1
        assert rows_of(place.files()) in (before, after), seen
        # Who calls again ends where an undisturbed call would have.
        forget_and_compact(place)
        assert rows_of(place.files()) == after
        assert find_user(place.root, TOPIC, 2) == []
        assert len(files_on_disk(place)) == 1
        assert not (place.folder / PENDING_REVISION_NAME).exists()
    assert num_steps > 15


@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_work_reads_as_the_model(tmp_path: Path, seed: int) -> None:
    source = random.Random(seed)
    place = Place(tmp_path, TOPIC, 0)
    model: list[tuple[int, int, str]] = []
    offset, clock_ms = 0, NOW_MS
    for _ in range(40):
        clock_ms += 1_000
        work = source.choice(["sink", "sink", "sink", "compact", "drop", "remove"])
        if work == "sink" or not model:
            events = [event(n, source.randrange(4)) for n in range(offset, offset + 3)]
            append(place, events)
            model += [(n, one.user_id, one.event_id) for n, one in enumerate(events, offset)]
            offset += 3
        elif work == "compact":
            compact(place, now_ms=clock_ms, growing_files_min=source.choice([2, 3, 5]))
        elif work == "drop":
            user = source.randrange(4)
            drop_user(tmp_path, user, now_ms=clock_ms)
            model = [row for row in model if row[1] != user]
        else:
            remove_old_revisions(place, before_ms=clock_ms - source.choice([0, 3_000]))
        assert rows_of(list_files(tmp_path, TOPIC)) == model
        assert next_offset(tmp_path, TOPIC, 0) == offset


def test_replaced_files_stay_for_as_long_as_said(place: Place) -> None:
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    assert remove_old_revisions(place, before_ms=NOW_MS - 1) == []
    assert [one.revision for one in manifests(place)] == [1]
    assert len(remove_old_revisions(place, before_ms=NOW_MS)) == 12
    drop_user(place.root, 1, now_ms=NOW_MS + 5)
    assert remove_old_revisions(place, before_ms=NOW_MS + 4) == []
    assert [one.revision for one in manifests(place)] == [1, 2]
    assert len(remove_old_revisions(place, before_ms=NOW_MS + 5)) == 1
    assert [one.revision for one in manifests(place)] == [2]
    assert not (place.folder / revision_name(1)).exists()


def test_a_lost_manifest_is_named_and_nothing_is_removed(place: Place) -> None:
    drop_user(place.root, 2, now_ms=NOW_MS)
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    (place.folder / revision_name(2) / MANIFEST_NAME).unlink()
    num_files = len(files_on_disk(place))
    for read in (place.files, lambda: remove_old_revisions(place, before_ms=NOW_MS)):
        with pytest.raises(LakeError, match=r"revision-00000002/manifest\.json cannot be read"):
            read()
    assert len(files_on_disk(place)) == num_files


@pytest.mark.parametrize("content", [b"", b"{", b'{"format": 2, "revision": 1}'])
def test_a_damaged_manifest_is_named(place: Place, content: bytes) -> None:
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    (place.folder / revision_name(1) / MANIFEST_NAME).write_bytes(content)
    with pytest.raises(LakeError, match=r"manifest\.json"):
        place.files()


def test_a_manifest_of_a_later_format_is_refused(place: Place) -> None:
    compact(place, now_ms=NOW_MS, growing_files_min=2)
    path = place.folder / revision_name(1) / MANIFEST_NAME
    path.write_text(path.read_text().replace('"format": 1', '"format": 9'))
    with pytest.raises(LakeError, match="format 9"):
        place.files()


def test_two_rewrites_wait_for_each_other(place: Place) -> None:
    with (
        locked(place.folder, name=REVISION_LOCK_NAME),
        pytest.raises(LakeBusyError, match=REVISION_LOCK_NAME),
        locked(place.folder, name=REVISION_LOCK_NAME, timeout_s=0.05),
    ):
        pass


def test_a_truncated_file_is_named_by_the_search(place: Place) -> None:
    path = place.files()[3].path
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(LakeError, match=path.name):
        find_user(place.root, TOPIC, 1)
