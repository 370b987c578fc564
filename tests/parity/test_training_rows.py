"""Law: training rows are features at (user, ordinal, clock), as `features_at` says them.

Method: random logs go through the sink's file; for random triples the vectorised training rows are
compared with the slow walk through `step`, which `test_features_at.py` holds to online reads.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from features.as_of import Timeline, features_at, read_user_logs
from features.point_in_time import Entities, training_rows
from tests.parity.test_features_at import CONFIG, TOPIC, Drawn, records_of, steps, write_lake


@given(steps, st.data())
def test_training_rows_equal_features_at(drawn: list[Drawn], data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory(prefix="moveline-parity-") as folder:
        if not drawn:
            return
        write_lake(Path(folder), records_of(drawn))
        logs = read_user_logs(Path(folder), [TOPIC], range(3), CONFIG)
        triples = [
            (user, data.draw(st.integers(line.first, line.end)), data.draw(st.integers(900, 2_000)))
            for user, log in logs.items()
            for line in [Timeline(log, CONFIG)]
            for _ in range(4)
        ]
        if not triples:
            return
        users, ordinals, clocks = (np.array(column) for column in zip(*triples, strict=True))
        entities = Entities(users, clocks, ordinals)
        rows = [
            r
            for t in training_rows(Path(folder), TOPIC, CONFIG, entities=entities)
            for r in t.to_pylist()
        ]
    assert sorted(row["row"] for row in rows) == list(range(len(triples)))
    for row in rows:
        user, ordinal, clock_ms = triples[row["row"]]
        view = features_at(logs[user], ordinal=ordinal, clock_ms=clock_ms, config=CONFIG)
        assert row["newest_event_time_ms"] == view.newest_event_time_ms
        if view.newest_event_time_ms is None:
            continue
        session = view.user_session
        expected: dict[str, Any] = {
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
        for stream in ("recent", "mid"):
            records = getattr(view, stream)
            for column in ("item_id", "event_time_ms", "action", "domain", "dwell_ms", "value"):
                values = records[column]
                signed = values.view(np.int64) if values.dtype == np.uint64 else values
                expected[f"{stream}_{column}"] = signed.tolist()
        for name, value in expected.items():
            assert str(row[name]) == str(value), (name, triples[row["row"]])
