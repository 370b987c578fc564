"""Goal: the Faust agent that ingest is measured against does the worker's job.

Method: seeded events of one user, late ones, repeats and silences among them, redelivered now and
then; the agent's state against the oracle's.
"""

from __future__ import annotations

import random

import pytest

from benchmarks.against_faust import agent_facts, oracle_facts
from benchmarks.faust_agent import TAIL, User
from features.config import StateConfig
from features.events import Event, encode_event
from features.oracle import oracle_state
from streams.micro_batch import Record, sort_records

CONFIG = StateConfig()
USER_ID = 7
START_MS = 1_763_700_000_000


def seeded_events(seed: int, count: int) -> list[Event]:
    source = random.Random(seed)
    events: list[Event] = []
    now_ms = START_MS
    for number in range(count):
        if events and source.random() < 0.05:
            events.append(source.choice(events[-400:]))
            continue
        now_ms += source.choice([5, 1_000, 60_000, 3_600_000])
        late_ms = source.choice([0] * 9 + [2 * 3_600_000])
        events.append(
            Event(
                event_id=f"e{number}",
                user_id=USER_ID,
                item_id=number % 50,
                action=source.choice(["click", "purchase"]),
                event_time_ms=now_ms - late_ms,
                domain=source.choice([None, "home"]),
                dwell_ms=source.choice([None, 40]),
            )
        )
    return events


@pytest.mark.parametrize("count", [1, 40, TAIL + 200])
@pytest.mark.parametrize("seed", range(3))
def test_the_agent_says_what_the_oracle_says(seed: int, count: int) -> None:
    events = seeded_events(seed, count)
    key = b"%d" % USER_ID
    append_ms = events[-1].event_time_ms + 10 * 3_600_000
    records = [
        Record(2, offset, append_ms, key, encode_event(event), None)
        for offset, event in enumerate(events)
    ]
    accepted = sort_records(records, CONFIG).by_user[USER_ID]
    user = User()
    for offset, event in enumerate(events):
        user.apply(event, 2, offset)
        # At least once: what came before may come again.
        user.apply(events[offset // 2], 2, offset // 2)
    assert agent_facts(user) == oracle_facts(oracle_state(accepted, CONFIG))
