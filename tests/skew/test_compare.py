"""Goal: no difference between a read and the lake goes unseen, and equal ones are never accused.

Method: a user's events give the lake's side; the read is the same features with one thing changed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.as_of import features_at
from features.feature_log import Served
from features.schema import schema_hash
from features.skew import COLUMNS, FEATURES, GRACE_MS, UserHistory, edit_distance
from features.skew_report import EXPLAINED, SkewReport, Skipped
from tests.features.strategies import SMALL, event_lists
from tests.scoring.states import NOW_MS, make_event

if TYPE_CHECKING:
    from features.skew import ReadSkew
    from features.state import Accepted
    from features.view import UserView

EVENTS = [make_event(number, item_id=number % 7) for number in range(30)]
LATER_MS = NOW_MS + 3_600_000


def served(
    events: list[Accepted], *, ordinal: int | None = None, at_ms: int = LATER_MS, **changes: object
) -> Served:
    """Return the record of an honest read, with some fields changed afterwards."""
    known = len(events) if ordinal is None else ordinal
    view = features_at(events, ordinal=known, clock_ms=at_ms, config=SMALL)
    fields: dict[str, Any] = {
        "served_at_ms": at_ms,
        "user_id": 5,
        "generation": 1,
        "schema_hash": schema_hash(SMALL),
        "ordinal": known,
        "clock_ms": at_ms,
        "position": events[known - 1].position if known else None,
        "recent": view.recent.tobytes(),
        "mid": view.mid.tobytes(),
        "user_session": view.user_session,
        "item_ids": [],
        "scores": [],
        "contribution": (0.0, 0.0, 0.0),
        "live_version": 1,
        "model_version": 1,
        "degraded": 0,
    }
    return Served(**{**fields, **changes})


def compare(one: Served, events: list[Accepted] = EVENTS) -> ReadSkew:
    return UserHistory(events, SMALL).compare(one)


def differing(skew: ReadSkew) -> dict[str, tuple[int, int, int]]:
    return {
        one.feature: (one.num_mismatched, one.num_missing, one.num_extra)
        for one in skew.differences
        if not one.is_equal
    }


def view_of(one: Served) -> UserView:
    view = one.view()
    assert view is not None
    return view


@given(event_lists(), st.data())
def test_an_honest_read_is_equal(events: list[Accepted], data: st.DataObject) -> None:
    unique = list({event.event_hash: event for event in events}.values())
    kept = sorted(unique, key=lambda event: event.position.offset)
    ordinal = data.draw(st.integers(0, len(kept)))
    newest = max((event.event_time_ms for event in kept), default=0)
    one = served(kept, ordinal=ordinal, at_ms=newest + data.draw(st.integers(1, 50)))
    skew = compare(one, kept)
    assert skew.is_equal
    assert differing(skew) == {}
    assert set(skew.edit_distances.values()) == {0}
    assert [one.feature for one in skew.differences] == list(FEATURES)


@given(st.sampled_from(["recent", "mid"]), st.sampled_from(COLUMNS), st.data())
def test_any_value_changed_is_found(stream: str, column: str, data: st.DataObject) -> None:
    honest = served(EVENTS)
    records = getattr(view_of(honest), stream).copy()
    row = data.draw(st.integers(0, records.size - 1))
    old = records[column][row].copy()
    flipped = records[column].view(f"V{old.nbytes}").copy()
    raw = bytearray(flipped[row].tobytes())
    place = data.draw(st.integers(0, len(raw) - 1))
    raw[place] ^= data.draw(st.integers(1, 255))
    records[column][row] = np.frombuffer(bytes(raw), old.dtype)[0]
    skew = compare(served(EVENTS, **{stream: records.tobytes()}))
    assert differing(skew) == {f"{stream}_{column}": (1, 0, 0)}
    assert skew.edit_distances[stream] == (column == "item_id")


def test_a_read_that_left_the_mid_term_stream_out_is_held_to_the_rest() -> None:
    read = served(EVENTS, mid=b"", has_mid=False)
    assert compare(read).is_equal
    assert not compare(served(EVENTS, mid=b"")).is_equal
    assert not compare(msgspec.structs.replace(read, recent=read.recent[48:])).is_equal


def test_an_event_lost_at_the_front_is_one_missing_value_a_column() -> None:
    honest = view_of(served(EVENTS))
    skew = compare(served(EVENTS, mid=honest.mid[1:].tobytes()))
    assert differing(skew) == {f"mid_{column}": (0, 1, 0) for column in COLUMNS}
    assert skew.edit_distances == {"recent": 0, "mid": 1}
    (item,) = [one for one in skew.differences if one.feature == "mid_item_id"]
    assert item.expected == (f"{honest.mid['ordinal'][0]}: {honest.mid['item_id'][0]}",)


def test_an_event_that_is_not_in_the_log_is_extra() -> None:
    honest = view_of(served(EVENTS))
    strange = honest.recent[-1:].copy()
    strange["ordinal"] = 77
    skew = compare(served(EVENTS, recent=np.r_[honest.recent, strange].tobytes()))
    assert differing(skew) == {f"recent_{column}": (0, 0, 1) for column in COLUMNS}


def test_right_events_in_a_wrong_order_differ() -> None:
    honest = view_of(served(EVENTS))
    skew = compare(served(EVENTS, recent=honest.recent[::-1].tobytes()))
    assert differing(skew) == {}
    assert skew.is_reordered
    assert not skew.is_equal
    assert skew.edit_distances["recent"] > 0


def test_a_session_that_should_be_over_is_extra_and_one_not_seen_is_missing() -> None:
    at_ms = EVENTS[-1].event_time_ms + 1
    is_open = served(EVENTS, at_ms=at_ms)
    closed = served(EVENTS, at_ms=at_ms + SMALL.session_gap_ms)
    assert is_open.user_session is not None
    assert is_open.user_session.is_open
    extra = compare(served(EVENTS, at_ms=closed.clock_ms, user_session=is_open.user_session))
    missing = compare(served(EVENTS, at_ms=at_ms, user_session=closed.user_session))
    assert differing(extra)["session_is_open"] == (1, 0, 0)
    assert differing(extra)["session_num_events"] == (0, 0, 1)
    assert differing(missing)["session_num_events"] == (0, 1, 0)


def test_a_wrong_default_in_the_session_is_found() -> None:
    at_ms = EVENTS[-1].event_time_ms + 1
    right = served(EVENTS, at_ms=at_ms).user_session
    assert right is not None
    skew = compare(served(EVENTS, at_ms=at_ms, user_session=right._replace(dwell_ms=-1)))
    assert differing(skew) == {"session_dwell_ms": (1, 0, 0)}
    over = served(EVENTS).user_session
    assert over is not None
    assert not over.is_open
    skew = compare(served(EVENTS, user_session=over._replace(num_events=-1)))
    assert differing(skew) == {"session_num_events": (1, 0, 0)}


def test_a_position_elsewhere_is_found() -> None:
    skew = compare(served(EVENTS, position=EVENTS[3].position))
    assert differing(skew) == {"position": (1, 0, 0)}


def test_an_ordinal_the_log_does_not_have_is_found() -> None:
    one = msgspec.structs.replace(served(EVENTS), ordinal=99)
    assert differing(compare(one)) == {"position": (0, 0, 1)}


def test_a_row_that_redis_lost_is_missing_everything() -> None:
    lost = served(EVENTS, ordinal=0, position=None, user_session=None, recent=b"", mid=b"")
    skew = compare(lost)
    missing = differing(skew)
    assert missing["position"] == (0, 1, 0)
    assert missing["recent_item_id"] == (0, SMALL.recent, 0)
    assert missing["mid_item_id"] == (0, SMALL.mid, 0)


def test_a_user_nobody_knows_is_equal() -> None:
    unknown = served([], position=None, user_session=None)
    assert compare(unknown, []).is_equal


def test_events_still_on_their_way_are_no_difference() -> None:
    at_ms = EVENTS[-1].append_time_ms + GRACE_MS - 1
    skew = compare(served(EVENTS, ordinal=29, at_ms=at_ms))
    assert (skew.is_equal, skew.num_unseen) == (True, 0)
    later = compare(served(EVENTS, ordinal=20, at_ms=at_ms + 1))
    assert (later.is_equal, later.num_unseen) == (True, 10)


@given(st.lists(st.integers(0, 3), max_size=12), st.lists(st.integers(0, 3), max_size=12))
def test_edit_distance_equals_the_textbook(left: list[int], right: list[int]) -> None:
    table = [[i + j for j in range(len(right) + 1)] for i in range(len(left) + 1)]
    for i, a in enumerate(left, 1):
        for j, b in enumerate(right, 1):
            table[i][j] = min(
                table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a != b)
            )
    found = edit_distance(np.array(left, np.int64), np.array(right, np.int64))
    assert found == table[-1][-1]


def test_the_report_counts_what_it_is_given() -> None:
    report = SkewReport()
    right, wrong = served(EVENTS), served(EVENTS, position=EVENTS[3].position)
    for one in (right, right, wrong):
        report.add(one, compare(one))
    report.skip(Skipped.NOT_READ)
    assert (report.num_records, report.reads.num_compared, report.reads.num_differing) == (4, 3, 1)
    assert report.reads.rate == pytest.approx(1 / 3)
    assert report.by_feature["position"].rates() == (pytest.approx(1 / 3), 0.0, 0.0)
    assert report.by_user == {5: 1}
    assert report.edit_distances["recent"] == {0: 3}
    assert [example.served for example in report.examples] == [wrong]
    assert report.to_json()["skipped"] == {"not_read": 1}


def test_every_reason_is_explained() -> None:
    assert set(EXPLAINED) == set(Skipped)
