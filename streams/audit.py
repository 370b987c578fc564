"""`moveline audit`: a generation's rows against the oracle, which reads the log from nothing.

The oracle (features/oracle.py) shares no arithmetic with the worker: a list of events per user,
every question answered from the whole list.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from features.generations import Generations
from features.keys import bucket_of
from features.oracle import OracleState, oracle_state
from features.row import decode_row
from features.state import RECORD, Accepted
from streams.compare import SHOWN_MAX, Held, read_applied, read_held
from streams.event_log import num_missing, some_buckets
from streams.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from features.generations import Built
    from features.redis import StateStore
    from features.state import Position, UserState
    from streams.event_log import EventLog, Keep

_FIELDS: Final = ("item_id", "event_time_ms", "domain", "event_hash", "dwell_ms", "action")


@dataclass(kw_only=True)
class AuditReport:
    """What an audit found.

    Attributes:
        num_users: users looked at, those that Redis should have and has not included.
        num_events: events of theirs that the oracle was given.
        num_dropped: chunks marked as having left Redis for the lake, which are not compared.
        wrong: users whose state is not the oracle's, and in what.
    """

    num_users: int = 0
    num_events: int = 0
    num_dropped: int = 0
    num_wrong: int = 0
    wrong: dict[int, str] = field(default_factory=dict)


def audit(
    logs: Sequence[EventLog],
    store: StateStore,
    built: Built | None,
    *,
    num_users: int,
    shown: bool = False,
) -> AuditReport:
    """Return how a sample of a generation's users compares with the oracle over the log.

    The sample is whole buckets: also a user whom the log has and Redis has not is found. The
    generation may move on meanwhile.

    Args:
        logs: the log's topics from the generation's first offset on, in lake and Kafka.
        store: the generation.
        built: how a replay built it; None: by workers, from the first offset.
        num_users: about how many users.
        shown: progress bars on stderr.

    Raises:
        LogHoleError: the log's beginning is neither in Kafka nor in the lake.
    """
    total = Generations(store.client).count_users()[store.generation]
    keep = some_buckets(1.0 if total <= num_users else num_users / total)
    ends = [events.end_offsets() for events in logs]
    # Before the rows: every event before these must be in them.
    spans = list(zip(logs, ends, strict=True))
    applied = read_applied(store, {events.source: of for events, of in spans})
    held_users = Generations(store.client).users(store.generation, keep)
    if built is not None and built.users is not None:
        # Who else was chosen, only the replay knew.
        keep = frozenset(held_users).__contains__
    by_user: dict[int, list[Accepted]] = defaultdict(list)
    for events, of in spans:
        starts = {p: 0 if built is None else built.start_of(events.source, p) for p in of}
        _read(by_user, events, store, (starts, of), keep, shown=shown)
    users = sorted({*held_users, *by_user})
    held = read_held(store, users)
    report = AuditReport()
    with progress_bar("oracle", total=len(users), unit="users", shown=shown) as advance:
        for user in users:
            mine = _before(user, by_user.get(user, ()), held.get(user), applied)
            found = _difference(mine, held.get(user), store)
            report.num_users += 1
            report.num_events += len(mine)
            report.num_dropped += held[user].first if user in held else 0
            report.num_wrong += found is not None
            if found is not None and len(report.wrong) < SHOWN_MAX:
                report.wrong[user] = found
            advance(1)
    return report


def _read(
    by_user: dict[int, list[Accepted]],
    events: EventLog,
    store: StateStore,
    span: tuple[dict[int, int], Mapping[int, int]],
    keep: Keep,
    *,
    shown: bool,
) -> None:
    positions, ends = span
    left = num_missing(positions, ends)
    batches = events.batches(positions, ends, store.config, keep=keep)
    with progress_bar("log", total=left, shown=shown) as advance, closing(batches):
        for batch in batches:
            for user, accepted in batch.by_user.items():
                by_user[user] += accepted
            now = num_missing({**positions, **batch.ends}, ends)
            advance(left - now)
            left = now


def _before(
    user: int,
    events: Iterable[Accepted],
    held: Held | None,
    applied: Mapping[tuple[int, int], list[int]],
) -> list[Accepted]:
    """Return the events the row must hold: those applied, and those up to its own position."""
    row_at = (-1, -1) if held is None else _order_of(decode_row(held.row).position)
    bucket = bucket_of(user)
    return [
        event
        for event in events
        for at in [event.position]
        if at.offset < applied[at.source, at.partition][bucket] or _order_of(at) <= row_at
    ]


def _order_of(position: Position) -> tuple[int, int]:
    """Return where an event stands among all of its user, who has one partition in each topic."""
    return position.source, position.offset


def _difference(events: list[Accepted], held: Held | None, store: StateStore) -> str | None:
    if held is None:
        return f"{len(events)} events in the log, no row" if events else None
    row = decode_row(held.row)
    oracle = oracle_state(events, store.config)
    current = row.user_session
    facts: dict[str, tuple[Any, Any]] = {
        "events accepted": (row.next_ordinal, oracle.next_ordinal),
        "late events": (row.num_late, oracle.num_late),
        "session": (current and current._asdict(), oracle.session),
        "chunks": (row.num_chunks, len(oracle.chunks)),
        "position": (row.position, oracle.position),
    }
    for name, (ours, theirs) in facts.items():
        if ours != theirs:
            return f"{name}: {ours} in the row, {theirs} by the oracle"
    return _differing_events(row, held, oracle)


def _differing_events(row: UserState, held: Held, oracle: OracleState) -> str | None:
    lists = [("tail", row.tail, oracle.tail)]
    lists += [
        (f"chunk {number}", held.chunks.get(number, b""), chunk)
        for number, chunk in enumerate(oracle.chunks)
        if number >= held.first
    ]
    for name, packed, numbered in lists:
        records = np.frombuffer(packed, RECORD)
        if records["ordinal"].tolist() != [n.ordinal for n in numbered]:
            return f"{name}: other events than the oracle's"
        for column in _FIELDS:
            if records[column].tolist() != [getattr(n.event, column) for n in numbered]:
                return f"{name}: {column} of an event"
        values = np.array([n.event.value for n in numbered], "<f4")
        if not np.array_equal(records["value"], values, equal_nan=True):
            return f"{name}: value of an event"
    wrong = held.missing_chunks()
    return f"chunks {wrong[:5]}: there, and marked as dropped" if wrong else None
