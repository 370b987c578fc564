"""After a forget the lake holds none of the user's earlier events, and rebuilds the same states."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.config import FORGET_ACTION
from features.errors import LakeError
from features.lake import read_accepted, read_file
from features.lake_forget import forget_user
from features.lake_revisions import Place, find_user
from features.row import encode_row
from features.state import EMPTY_STATE, step
from streams.lake_fill import lake_batches
from tests.features.strategies import SMALL
from tests.lake.writing import TOPIC, append, event

if TYPE_CHECKING:
    from collections.abc import Callable

    from features.events import Event

WHO, OTHER = 1, 2
FORGET = "forget"
# Of each record: whose it is, and its id among few, so that repeats are common.
RECORDS = st.lists(
    st.tuples(st.sampled_from([WHO, WHO, OTHER]), st.integers(0, 12) | st.just(FORGET)),
    min_size=1,
    max_size=60,
)


def record(offset: int, user: int, which: int | str) -> Event:
    if which == FORGET:
        return event(offset, user, action=FORGET_ACTION, item_id=0, event_time_ms=0, domain=None)
    return event(offset, user, event_id=f"{which}")


def write(place: Place, records: list[tuple[int, int | str]], file_rows: int) -> None:
    for start in range(0, len(records), file_rows):
        part = records[start : start + file_rows]
        append(place, [record(start + i, *one) for i, one in enumerate(part)])


def rows_by_user(place: Place) -> dict[int, bytes]:
    """Return each user's row, built from the lake."""
    end = place.files()[-1].end + 1
    states = dict[int, bytes]()
    held = {WHO: EMPTY_STATE, OTHER: EMPTY_STATE}
    for batch in lake_batches(place.files(), 0, end, SMALL):
        for user, events in batch.by_user.items():
            held[user] = step(held[user], events, SMALL).state
            states[user] = encode_row(held[user], len(SMALL.actions))
    return states


@given(RECORDS, RECORDS, st.integers(1, 9))
def test_states_are_the_same_without_the_events(
    before: list[tuple[int, int | str]], after: list[tuple[int, int | str]], file_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder), TOPIC, 0)
        write(place, [*before, (WHO, FORGET), *after], file_rows)
        rows, accepted = rows_by_user(place), read_accepted(Path(folder), TOPIC, SMALL)
        at = len(before)
        forget_user(place, WHO, at=at, config=SMALL, now_ms=1)
        assert rows_by_user(place) == rows
        again = read_accepted(Path(folder), TOPIC, SMALL)
        assert {name: column.tobytes() for name, column in again.items()} == {
            name: column.tobytes() for name, column in accepted.items()
        }
        left = [
            row["offset"]
            for file in place.files()
            for row in read_file(file).to_pylist()
            if row["user_id"] == WHO
        ]
        assert left == [at, *(at + 1 + i for i, one in enumerate(after) if one[0] == WHO)]
        assert forget_user(place, WHO, at=at, config=SMALL, now_ms=2) is None


def test_what_is_replaced_can_still_be_found(place_in: Callable[[int], Place]) -> None:
    place = place_in(0)
    write(place, [(WHO, 1), (OTHER, 2), (WHO, FORGET)], 2)
    forget_user(place, WHO, at=2, config=SMALL, now_ms=1)
    found = find_user(place.root, TOPIC, WHO)
    assert [(one.file.start, one.num_events, one.is_current) for one in found] == [
        (0, 1, False),
        (2, 1, False),
        (2, 1, True),
    ]


def test_a_lake_that_is_behind_is_refused(place_in: Callable[[int], Place]) -> None:
    place = place_in(0)
    write(place, [(WHO, 1), (OTHER, 2)], 2)
    with pytest.raises(LakeError, match=r"does not have offset 2 .* `moveline lake` catch up"):
        forget_user(place, WHO, at=2, config=SMALL, now_ms=1)
