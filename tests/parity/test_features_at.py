"""Law: features are a function of (user, ordinal, clock), equal online and from the lake.

Method: random users' events, late, repeated, dated ahead, outside the streams and refused ones
among them, go two ways. Online: records are judged and stepped in random micro-batches, each state
becomes a row's bytes, and the end of the row is read back as scoring reads it. Lake: the sink's own
file is written and read, and `features_at` answers for the ordinal and the clock of each read. With
a clock in the past, which no online reader has, the lake is held to a naive reading instead.
"""

from __future__ import annotations

import itertools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from features.as_of import Timeline, features_at, read_user_logs
from features.config import FORGET_ACTION, StateConfig
from features.errors import LakeError, NoSuchOrdinalError
from features.events import Event, decode_event, encode_event
from features.oracle import Numbered, accept, sessions
from features.row import decode_newest, encode_row, newest_bytes
from features.state import EMPTY_STATE, RECORD, UserSession, step
from features.view import UserView, batch_streams, seen_clock_ms, view_session, view_user
from streams.lake_file import LakeRow, Partition
from streams.micro_batch import Record, sort_records

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from features.state import Accepted

CONFIG = StateConfig(recent=4, mid=6, chunk=3, dedup_window=5, session_gap_ms=10, session_max_ms=40)
TOPIC = "events"
START_MS = 1_000

Drawn = tuple[int, int, int, str, str | None, int | None, float | None, int]
steps = st.lists(
    st.tuples(
        st.integers(0, 2),  # user
        st.integers(-60, 30),  # time step: negative is a late event
        st.integers(0, 12),  # event id: few, so repeats are common
        st.sampled_from([*["impression", "click", "purchase", "teleport"] * 5, FORGET_ACTION]),
        st.sampled_from([None, "home", "search"]),
        st.sampled_from([None, 0, 100]),
        st.sampled_from([None, 0.0, 4.5]),
        st.sampled_from([0, 0, 0, 400_000]),  # how far the record is dated ahead of its append
    ),
    max_size=80,
)


def records_of(drawn: Sequence[Drawn]) -> list[Record]:
    now_ms, records = START_MS, []
    for offset, (user, hop, number, action, domain, dwell_ms, value, ahead_ms) in enumerate(drawn):
        time_ms = max(0, now_ms + hop)
        now_ms = max(now_ms, time_ms)
        event = Event(
            event_id=str(number),
            user_id=user,
            item_id=0 if action == FORGET_ACTION else number % 5,
            action=action,
            event_time_ms=time_ms + ahead_ms,
            domain=domain,
            dwell_ms=dwell_ms,
            value=value,
        )
        records.append(Record(0, offset, now_ms, b"%d" % user, encode_event(event), None))
    return records


def write_lake(root: Path, records: Sequence[Record]) -> None:
    rows = [LakeRow(r.offset, r.append_time_ms, decode_event(r.value)) for r in records]
    end = len(rows)
    Partition(root, TOPIC, 0, 0, end, rows=rows).publish(end)


def online_reads(
    records: Sequence[Record], cuts: Sequence[int], clock_ms: int
) -> Iterator[tuple[int, int, int, UserView]]:
    """Yield (user, clock, last offset, features) as scoring reads them after every micro-batch."""
    states = dict.fromkeys(range(3), EMPTY_STATE)
    edges = sorted({0, *(cut for cut in cuts if cut < len(records)), len(records)})
    for start, stop in itertools.pairwise(edges):
        for user, events in sort_records(records[start:stop], CONFIG).by_user.items():
            states[user] = step(states[user], events, CONFIG).state
        for user, state in states.items():
            if state is EMPTY_STATE:
                continue
            row = encode_row(state, len(CONFIG.actions))
            newest = CONFIG.recent + CONFIG.mid
            read, missing = decode_newest(row[-newest_bytes(newest) :])
            if missing and read.records.size < newest:
                read, _ = decode_newest(row)
            seen_ms = seen_clock_ms(clock_ms, read)
            view = view_user(read, seen_ms, CONFIG)
            batch = batch_streams([read], clock_ms, CONFIG)
            for padded, stream in ((batch.recent_BR[0], view.recent), (batch.mid_BM[0], view.mid)):
                assert padded[padded["item_id"] >= 0].tobytes() == stream.tobytes()
            yield user, seen_ms, state.position.offset, view


@given(steps, st.lists(st.integers(1, 79), max_size=8), st.integers(0, 3_000))
def test_what_online_reads_is_what_the_lake_gives(
    drawn: list[Drawn],
    cuts: list[int],
    clock_ms: int,
) -> None:
    records = records_of(drawn)
    with tempfile.TemporaryDirectory(prefix="moveline-parity-") as folder:
        if not records:
            return
        write_lake(Path(folder), records)
        logs = read_user_logs(Path(folder), [TOPIC], range(3), CONFIG)
    for user, seen_ms, offset, online in online_reads(records, cuts, clock_ms):
        log = logs[user]
        if log[0].is_forget and offset < log[0].position.offset:
            continue  # what it saw is forgotten
        given_back = features_at(log, ordinal=online.ordinal, clock_ms=seen_ms, config=CONFIG)
        assert_equal_views(given_back, online)


def assert_equal_views(left: UserView, right: UserView) -> None:
    assert left.ordinal == right.ordinal
    assert left.newest_event_time_ms == right.newest_event_time_ms
    assert left.recent.tobytes() == right.recent.tobytes()
    assert left.mid.tobytes() == right.mid.tobytes()
    assert left.user_session == right.user_session


@given(steps, st.data())
def test_past_clocks_equal_a_naive_reading(drawn: list[Drawn], data: st.DataObject) -> None:
    for events in sort_records(records_of(drawn), CONFIG).by_user.values():
        log = [numbered.event for numbered in accept(past_forgets(events), CONFIG)]
        ordinal = data.draw(st.integers(0, len(log)))
        clock_ms = data.draw(st.integers(900, 2_000))
        view = features_at(log, ordinal=ordinal, clock_ms=clock_ms, config=CONFIG)
        assert_equal_views(view, naive(log, ordinal, clock_ms))


def past_forgets(events: Sequence[Accepted]) -> list[Accepted]:
    return [event for event in events if not event.is_forget]


def naive(log: Sequence[Accepted], ordinal: int, clock_ms: int) -> UserView:
    """Return the features by sorting a list: nothing of the state machine is used."""
    seen = [Numbered(i, log[i]) for i in range(ordinal) if log[i].event_time_ms < clock_ms]
    ordered = sorted(seen, key=lambda one: (one.event.event_time_ms, one.ordinal))
    rows = [
        (e.item_id, e.event_time_ms, e.domain, e.event_hash, i, e.dwell_ms, e.value, e.action, b"")
        for i, e in ordered
    ]
    records = np.array(rows, RECORD)
    recent = records[-CONFIG.recent :]
    mid = records[: -CONFIG.recent][-CONFIG.mid :]
    session, _ = sessions(seen, CONFIG)
    current = None if session is None else UserSession(**session)  # type: ignore[arg-type]
    newest = int(records["event_time_ms"][-1]) if rows else None
    return UserView(ordinal, newest, recent, mid, view_session(current, recent, clock_ms, CONFIG))


def test_an_ordinal_beyond_the_log_is_refused() -> None:
    with pytest.raises(NoSuchOrdinalError, match=r"ordinal 1 asked.* from 0 to 0.*moveline lake"):
        features_at([], ordinal=1, clock_ms=0, config=CONFIG)


def test_ordinals_may_be_asked_for_in_any_order(tmp_path: Path) -> None:
    drawn: list[Drawn] = [(0, 3, number, "click", None, None, None, 0) for number in range(60)]
    write_lake(tmp_path, records_of(drawn))
    log = read_user_logs(tmp_path, [TOPIC], [0], CONFIG)[0]
    timeline = Timeline(log, CONFIG)
    for ordinal in (0, 41, 7, 60, 60, 1):
        alone = features_at(log, ordinal=ordinal, clock_ms=10**9, config=CONFIG)
        assert_equal_views(timeline.at(ordinal, 10**9), alone)
        assert alone.ordinal == ordinal


def test_a_truncated_lake_file_is_named(tmp_path: Path) -> None:
    write_lake(tmp_path, records_of([(0, 3, 1, "click", None, None, None, 0)]))
    (file,) = tmp_path.glob("*/*/*.parquet")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(LakeError, match=file.name):
        read_user_logs(tmp_path, [TOPIC], [0], CONFIG)


def test_users_nobody_asked_for_are_left_out(tmp_path: Path) -> None:
    drawn: list[Drawn] = [(user, 3, user, "click", None, None, None, 0) for user in (0, 1, 2)]
    write_lake(tmp_path, records_of(drawn))
    logs = read_user_logs(tmp_path, [TOPIC], [2, 7], CONFIG)
    assert list(logs) == [2]
