"""Users' logs as a lake on disk, and what the oracle says was known at a label."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from features import oracle
from features.config import FORGET_ACTION
from features.events import domain_hash
from features.lake import LAKE_SCHEMA, file_name, partition_folder
from features.view import LAST_ITEMS
from tests.features.strategies import SMALL, event_lists
from tests.lake.writing import TOPIC

if TYPE_CHECKING:
    from pathlib import Path

    from features.config import StateConfig
    from features.state import Accepted

# By user, in order of arrival; also events of actions that no stream takes.
Logs = dict[int, list["Accepted"]]
NUM_PARTITIONS = 2
FILE_ROWS = 16


@st.composite
def users_logs(draw: st.DrawFn, *, max_size: int = 40) -> Logs:
    """Return the logs of up to four users."""
    # Most logs without a forget: it leaves little of what stands before it.
    lists = draw(
        st.lists(
            st.sampled_from([False, False, False, True]).flatmap(
                lambda forgets: event_lists(max_size=max_size, forgets=forgets)
            ),
            min_size=1,
            max_size=4,
        )
    )
    return {10 * (user + 1): events for user, events in enumerate(lists)}


def write_logs(root: Path, logs: Logs, *, topic: str = TOPIC, file_rows: int = FILE_ROWS) -> None:
    """The logs lie in the lake: users in turn, each in a partition of its own kind, small files."""
    rows: dict[int, list[dict[str, Any]]] = {number: [] for number in range(NUM_PARTITIONS)}
    for turn in range(max(map(len, logs.values()), default=0)):
        for user, events in logs.items():
            if turn < len(events):
                log = rows[user // 10 % NUM_PARTITIONS]
                log.append(_row(len(log), user, events[turn]))
    for partition, log in rows.items():
        folder = partition_folder(root, topic, partition)
        folder.mkdir(parents=True)
        for start in range(0, max(1, len(log)), file_rows):
            part = log[start : start + file_rows]
            path = folder / file_name(start, start + max(1, len(part)) - 1)
            pq.write_table(pa.Table.from_pylist(part, schema=LAKE_SCHEMA), path)


def _row(offset: int, user: int, event: Accepted) -> dict[str, Any]:
    return {
        "offset": offset,
        "append_time_ms": event.append_time_ms,
        "user_id": user,
        "item_id": event.item_id,
        "action": FORGET_ACTION if event.is_forget else SMALL.actions[event.action],
        "event_time_ms": event.event_time_ms,
        "event_hash": event.event_hash,
        "event_id": str(event.event_hash),
        "domain": f"d{event.domain}",
        "dwell_ms": None if event.dwell_ms < 0 else event.dwell_ms,
        "value": event.value,
        "request_id": None,
        "position": None,
    }


def accepted(events: list[Accepted], config: StateConfig) -> list[oracle.Numbered]:
    """Return the events that count, numbered."""
    codes = {config.codes[action] for action in config.entering}
    return oracle.accept([event for event in events if event.action in codes], config)


class Known(NamedTuple):
    """What the oracle says of a label: the ordinal not known any more, and the events known."""

    ordinal: int
    events: list[oracle.Numbered]


def known_at(numbered: list[oracle.Numbered], time_ms: int, ordinal: int | None) -> Known:
    """Return it by looking at every event."""
    end = max((one.ordinal + 1 for one in numbered), default=0)
    if ordinal is None:
        at = [one.ordinal for one in numbered if one.event.event_time_ms == time_ms]
        later = [one.ordinal for one in numbered if one.event.event_time_ms > time_ms]
        ordinal = min(at or later or [end])
    events = [
        one for one in numbered if one.ordinal < ordinal and one.event.event_time_ms < time_ms
    ]
    return Known(min(ordinal, end), events)


def oracle_features(known: Known, time_ms: int, config: StateConfig) -> dict[str, Any]:
    """Return every feature of a label, None where nothing was known."""
    ordered = sorted(known.events, key=lambda one: (one.event.event_time_ms, one.ordinal))
    recent, mid = ordered[-config.recent :], ordered[: -config.recent][-config.mid :]
    found = {
        **_stream("recent", recent),
        **_stream("mid", mid),
        **_session(known.events, recent, time_ms, config),
    }
    return found if known.events else dict.fromkeys(found)


def _stream(prefix: str, numbered: list[oracle.Numbered]) -> dict[str, Any]:
    events = [one.event for one in numbered]
    return {
        f"{prefix}_item_id": [event.item_id for event in events],
        f"{prefix}_event_time_ms": [event.event_time_ms for event in events],
        f"{prefix}_action": [event.action for event in events],
        f"{prefix}_domain": [
            int(np.uint64(domain_hash(f"d{event.domain}")).view(np.int64)) for event in events
        ],
        f"{prefix}_dwell_ms": [event.dwell_ms for event in events],
        f"{prefix}_value": [event.value for event in events],
    }


def _session(
    events: list[oracle.Numbered],
    recent: list[oracle.Numbered],
    time_ms: int,
    config: StateConfig,
) -> dict[str, Any]:
    session: dict[str, Any] | None = oracle.sessions(events, config)[0]
    is_open = session is not None and time_ms - session["last_ms"] <= config.session_gap_ms
    if session is None or not is_open:
        session = dict.fromkeys(
            ("session_id", "start_ms", "last_ms", "num_events", "dwell_ms"), 0
        ) | {"action_counts": (0,) * len(config.actions)}
        recent = []
    items = [o.event.item_id for o in recent if o.event.event_time_ms >= session["start_ms"]]
    return {
        "session_is_open": is_open,
        "session_id": session["session_id"],
        "session_start_ms": session["start_ms"],
        "session_last_ms": session["last_ms"],
        "session_num_events": session["num_events"],
        "session_dwell_ms": session["dwell_ms"],
        "session_distinct_items": len(set(items)),
        "session_action_counts": list(session["action_counts"]),
        "session_last_items": items[::-1][:LAST_ITEMS],
    }
