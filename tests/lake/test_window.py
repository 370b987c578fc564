"""Goal: a window is the newest days by append time, in exact offsets, and reads as a lake does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from features.errors import LakeError
from features.lake import read_accepted
from features.lake_window import LakeWindow, lake_extent, newest_window, read_window
from tests.lake.writing import TOPIC, append, event
from tests.small import SMALL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from features.lake_revisions import Place


@pytest.fixture
def lake(tmp_path: Path, place_in: Callable[[int], Place]) -> Path:
    """Two partitions of several files; offset n of each was appended at START_MS + n."""
    for partition, lengths in ((0, (10, 10, 5)), (1, (7, 3))):
        number = 0
        for length in lengths:
            append(
                place_in(partition),
                [event(number + i, user_id=2 * (i % 3) + partition) for i in range(length)],
            )
            number += length
    return tmp_path


@pytest.mark.parametrize(
    ("window_ms", "first"),
    [
        (10**9, {"0": 0, "1": 0}),
        (24, {"0": 0, "1": 0}),
        (23, {"0": 1, "1": 1}),
        (15, {"0": 9, "1": 9}),
        (14, {"0": 10}),
        (4, {"0": 20}),
        (0, {"0": 24}),
    ],
)
def test_a_window_begins_at_the_first_event_that_is_new_enough(
    lake: Path, window_ms: int, first: dict[str, int]
) -> None:
    window = newest_window(lake, TOPIC, window_ms=window_ms)
    assert window.first == first
    assert window.last == {field: {"0": 24, "1": 9}[field] for field in first}


def test_the_extent_is_what_file_names_say(lake: Path) -> None:
    assert lake_extent(lake, TOPIC) == {"0": (0, 25), "1": (0, 10)}
    assert lake_extent(lake / "absent", TOPIC) == {}


def test_a_window_over_everything_reads_as_the_lake(lake: Path) -> None:
    window = newest_window(lake, TOPIC, window_ms=10**9)
    read, whole = read_window(lake, TOPIC, SMALL, window), read_accepted(lake, TOPIC, SMALL)
    assert read.keys() == whole.keys()
    for name, column in whole.items():
        np.testing.assert_array_equal(read[name], column)


def test_a_window_reads_its_offsets_and_no_others(
    lake: Path, place_in: Callable[[int], Place]
) -> None:
    window = LakeWindow({"0": 9, "1": 3}, {"0": 21, "1": 9})
    # What comes later is not in it.
    append(place_in(0), [event(number, user_id=0) for number in range(25, 40)])
    read = read_window(lake, TOPIC, SMALL, window)
    expected = [100 + number for number in [*range(9, 22), *range(3, 10)]]
    assert sorted(read["item_id"].tolist()) == sorted(expected)
    users, ordinals = read["user_id"], read["ordinal"]
    for user in np.unique(users):
        assert ordinals[users == user].tolist() == list(range((users == user).sum()))


def test_files_without_events_do_not_end_a_window(
    tmp_path: Path, place_in: Callable[[int], Place]
) -> None:
    append(place_in(0), [event(0, user_id=1)])
    append(place_in(0), [None, None])
    append(place_in(0), [event(3, user_id=1)])
    append(place_in(0), [None])
    assert newest_window(tmp_path, TOPIC, window_ms=3) == LakeWindow({"0": 0}, {"0": 4})
    assert newest_window(tmp_path, TOPIC, window_ms=2) == LakeWindow({"0": 3}, {"0": 4})


def test_an_empty_lake_has_an_empty_window_and_nothing_to_read(tmp_path: Path) -> None:
    window = newest_window(tmp_path, TOPIC, window_ms=1)
    assert window == LakeWindow({}, {})
    with pytest.raises(LakeError, match="has none of the window"):
        read_window(tmp_path, TOPIC, SMALL, window)
