"""The same events through benchmarks/faust_agent.py: its rate, and that it did the same job."""

from __future__ import annotations

import json
import sys
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any, Final

from benchmarks.common import CONSOLE, publish
from benchmarks.faust_agent import TAIL, summary_key, tail_key, user_from
from features.config import StateConfig
from features.events import domain_hash, event_hash
from features.oracle import oracle_state
from features.redis import connect, execute
from features.state import NO_DWELL, Accepted
from streams.event_log import EventLog
from streams.kafka import end_offsets, ensure_topics
from streams.topics import Topics

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.faust_agent import User
    from compose.local.stack import LocalStack
    from features.oracle import OracleState
    from streams.kafka import KafkaConfig

# Events before the measured ones: joining the group, first fetches, code that is run first.
WARM_UP_SHARE: Final = 10
SAMPLE: Final = 200
# The oracle's time grows with the square of a user's events.
ORACLE_EVENTS_MAX: Final = 2_000
# What an agent that takes events in batches takes at once.
BATCH_MAX: Final = 1_000
_CONFIG: Final = StateConfig()
_FINISH_TIMEOUT_S: Final = 300.0
_POLL_S: Final = 0.1


class UnequalError(Exception):
    """The agent's state is not the oracle's: its rate would say nothing."""


def faust_rate(
    stack: LocalStack, kafka: KafkaConfig, users: Sequence[int], *, batch_max: int = 1
) -> float:
    """Return the events/s of a Faust agent over one event of each entry of `users`.

    It takes an event at a time, or up to `batch_max`.

    Raises:
        UnequalError: a sampled user's state is not what the oracle says.
        TimeoutError: it did not get to the end.
    """
    topics = Topics(f"bench-faust-{batch_max}")
    execute(connect(stack.addresses.redis), "FLUSHALL")
    ensure_topics(kafka, topics.specs(partitions=4, replication=1))
    publish(kafka, users, topic=topics.events)
    command = [sys.executable, "-m", "benchmarks.faust_agent", "--topic", topics.events]
    command += ["--batch-max", str(batch_max)]
    command += ["--kafka", stack.addresses.kafka, "--redis", stack.addresses.redis]
    command += ["--events", str(len(users)), "--warm-up", str(len(users) // WARM_UP_SHARE)]
    log = stack.spawn("faust", command).log
    deadline = time.monotonic() + _FINISH_TIMEOUT_S
    while not (lines := [text for text in log.read_text("utf-8").splitlines() if _is_line(text)]):
        if time.monotonic() > deadline or "faust" not in _alive(stack):
            raise TimeoutError(
                f"the Faust agent did not get to the end: {log.read_text('utf-8')[-2_000:]}"
            )
        time.sleep(_POLL_S)
    stack.stop("faust")
    _compare(stack, _events_by_user(kafka, topics))
    return float(json.loads(lines[-1])["events_per_s"])


def _alive(stack: LocalStack) -> set[str]:
    return {process.name for process in stack.running() if process.alive}


def _is_line(text: str) -> bool:
    return text.startswith('{"num_events"')


def _events_by_user(kafka: KafkaConfig, topics: Topics) -> dict[int, list[Accepted]]:
    ends = end_offsets(kafka, topics.events)
    events = EventLog(kafka=kafka, topic=topics.events)
    by_user: dict[int, list[Accepted]] = {}
    with closing(events.batches(dict.fromkeys(ends, 0), ends, _CONFIG)) as batches:
        for batch in batches:
            for user, accepted in batch.by_user.items():
                by_user.setdefault(user, []).extend(accepted)
    return by_user


def _compare(stack: LocalStack, by_user: Mapping[int, Sequence[Accepted]]) -> None:
    """Raise unless the agent's state of the busiest and of some other users is the oracle's."""
    few = [user for user, events in by_user.items() if len(events) <= ORACLE_EVENTS_MAX]
    few.sort(key=lambda user: -len(by_user[user]))
    sample = {*few[: SAMPLE // 10], *few[:: max(1, len(few) // SAMPLE)]}
    client = connect(stack.addresses.redis)
    for user_id in sample:
        summary = execute(client, "GET", summary_key(user_id))
        entries = execute(client, "LRANGE", tail_key(user_id), 0, -1)
        expected = oracle_state(by_user[user_id], _CONFIG)
        found, wanted = agent_facts(user_from(summary, entries)), oracle_facts(expected)
        if found != wanted:
            raise UnequalError(f"user {user_id}: {found}; the oracle says {wanted}")
    CONSOLE.print(f"Faust: {len(sample)} of {len(by_user):,} users are as the oracle says")


def agent_facts(user: User) -> dict[str, Any]:
    """Return what the agent says of a user."""
    summary = user.summary
    codes = {action: code for code, action in enumerate(_CONFIG.actions)}
    return {
        "position": (summary.partition, summary.offset),
        "next_ordinal": summary.next_ordinal,
        "num_late": summary.num_late,
        "session": {
            "session_id": summary.session_id,
            "start_ms": summary.start_ms,
            "last_ms": summary.last_ms,
            "num_events": summary.num_events,
            "dwell_ms": summary.dwell_ms,
            "action_counts": tuple(summary.action_counts.get(name, 0) for name in codes),
        },
        "tail": [
            (
                ordinal,
                time_ms,
                event_hash(event_id),
                item_id,
                domain_hash(domain),
                NO_DWELL if dwell_ms is None else dwell_ms,
                codes[action],
            )
            for time_ms, ordinal, event_id, item_id, domain, dwell_ms, action in user.tail
        ],
    }


def oracle_facts(oracle: OracleState) -> dict[str, Any]:
    """Return what the oracle says of a user."""
    last = oracle.accepted[-1].event.position
    newest = sorted(oracle.accepted, key=lambda n: (n.event.event_time_ms, n.ordinal))[-TAIL:]
    return {
        "position": (last.partition, last.offset),
        "next_ordinal": len(oracle.accepted),
        "num_late": oracle.num_late,
        "session": oracle.session,
        "tail": [
            (
                ordinal,
                event.event_time_ms,
                event.event_hash,
                event.item_id,
                event.domain,
                event.dwell_ms,
                event.action,
            )
            for ordinal, event in newest
        ],
    }
