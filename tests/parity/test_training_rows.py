"""Law: a training row is what a reader would have been given at its ordinal and clock.

Method: `features.as_of` answers for one user, ordinal and clock by the online step and the online
view; `features.point_in_time` answers for all of them at once, in columns. They share the files and
the rules that judge, nothing else, and have to agree value by value: late events, repeats, forgets,
and clocks before events that had arrived.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from features.as_of import Timeline, read_user_logs
from features.point_in_time import Entities, training_rows
from tests.features.strategies import SMALL
from tests.lake.logs import users_logs, write_logs
from tests.lake.writing import TOPIC

if TYPE_CHECKING:
    from features.view import UserView
    from tests.lake.logs import Logs

STREAM_COLUMNS = ("item_id", "event_time_ms", "action", "dwell_ms", "value")


def as_row(view: UserView) -> dict[str, Any]:
    """Return a reader's view as a training row has it."""
    session = view.user_session
    row = {
        f"{stream}_{name}": records[name].tolist()
        for stream, records in (("recent", view.recent), ("mid", view.mid))
        for name in STREAM_COLUMNS
    }
    row |= {
        f"{stream}_domain": records["domain"].view(np.int64).tolist()
        for stream, records in (("recent", view.recent), ("mid", view.mid))
    }
    row |= {
        "session_is_open": session.is_open,
        "session_id": session.session_id,
        "session_start_ms": session.start_ms,
        "session_last_ms": session.last_ms,
        "session_num_events": session.num_events,
        "session_dwell_ms": session.dwell_ms,
        "session_distinct_items": session.distinct_items,
        "session_action_counts": list(session.action_counts),
        "session_last_items": list(session.last_items),
    }
    return row if view.newest_event_time_ms is not None else dict.fromkeys(row)


@given(users_logs(), st.data())
@settings(max_examples=60, deadline=None)
def test_a_training_row_is_what_a_reader_was_given(logs: Logs, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_logs(root, logs)
        users = {
            user: Timeline(events, SMALL)
            for user, events in read_user_logs(root, TOPIC, logs.keys(), SMALL).items()
            if events
        }
        frame = []
        for user, line in users.items():
            ordinals = st.integers(line.first, line.end)
            reads = st.lists(st.tuples(st.integers(950, 1_400), ordinals), min_size=1, max_size=8)
            frame += [(user, clock_ms, ordinal) for clock_ms, ordinal in data.draw(reads)]
        if not frame:
            return
        entities = Entities(*(np.array(column, np.int64) for column in zip(*frame, strict=True)))
        tables = list(training_rows(root, TOPIC, SMALL, entities=entities))
        rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == len(frame)
    for row in rows:
        user, clock_ms, ordinal = frame[row["row"]]
        expected = as_row(users[user].at(ordinal, clock_ms))
        assert {name: row[name] for name in expected} == expected
        # Who was forgotten and has done nothing since is in no row of the lake.
        assert row["ordinal"] in (ordinal, 0)
        assert row["newest_event_time_ms"] is None or row["newest_event_time_ms"] < clock_ms
