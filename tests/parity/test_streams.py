"""Law: the streams a model is trained on are those scoring reads, value by value.

Method: any users' logs go through the real step into states; at every label the trainer's tensors
are compared with the tensors scoring builds from the state right before the label's first event,
seen at the label's time. Events are in time order here: late ones are the subject of the lake's
own point-in-time work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.config import StateConfig
from features.state import EMPTY_STATE, Accepted, Position, UserState, step
from features.view import batch_streams
from scoring.tensors import retrieval_inputs
from trainer.batches import BatchSource
from trainer.dataset import EventLog, label_groups
from trainer.package import raw_streams
from trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

CONFIG = StateConfig(recent=4, mid=6, chunk=3, dedup_window=5)
STREAMS = [
    f"{stream}_{field}"
    for stream in ("recent", "mid")
    for field in ("item", "age_ms", "domain", "action", "dwell_ms")
]

# Per user: (time step to the event before, item); a step of 0 joins the basket before it.
users_logs = st.lists(
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), min_size=1, max_size=30),
    min_size=1,
    max_size=4,
)


def accepted(steps: list[tuple[int, int]]) -> list[Accepted]:
    times = np.cumsum([gap for gap, _ in steps]) * 86_400_000 + 1
    return [
        Accepted(
            Position(0, 0, offset),
            int(time_ms),
            item,
            int(time_ms),
            item % 3 + 1,
            1_000 + offset,
            item * 10 - 1,
            float(item),
            1 + item % 4,
        )
        for offset, (time_ms, (_, item)) in enumerate(zip(times, steps, strict=True))
    ]


def columns(logs: list[list[Accepted]]) -> dict[str, NDArray[np.generic]]:
    rows = [(user, i, event) for user, log in enumerate(logs) for i, event in enumerate(log)]
    return {
        "user_id": np.array([user for user, _, _ in rows]),
        "ordinal": np.array([i for _, i, _ in rows]),
        "item_id": np.array([event.item_id for _, _, event in rows]),
        "event_time_ms": np.array([event.event_time_ms for _, _, event in rows]),
        "domain": np.array([event.domain for _, _, event in rows], np.uint64),
        "action": np.array([event.action for _, _, event in rows], np.uint8),
        "dwell_ms": np.array([event.dwell_ms for _, _, event in rows]),
    }


@given(users_logs)
def test_training_streams_equal_scoring_streams(steps: list[list[tuple[int, int]]]) -> None:
    logs = [accepted(one) for one in steps]
    log = EventLog.from_columns(columns(logs))
    vocabulary = Vocabulary.of(log, split_ms=int(log.event_time_ms_N.max()))
    source = BatchSource.of(log, vocabulary, num_recent=CONFIG.recent, num_mid=CONFIG.mid)
    groups = label_groups(log)
    trained = raw_streams(source, groups)
    for row in range(len(groups)):
        user, before = int(groups.user_G[row]), int(groups.first_ordinal_G[row])
        state = step(EMPTY_STATE, logs[user][:before], CONFIG).state
        served = served_streams(state, clock_ms=int(groups.time_ms_G[row]))
        for name in STREAMS:
            assert torch.equal(trained[name][row], served[name][0]), (name, row)


def served_streams(state: UserState, *, clock_ms: int) -> dict[str, torch.Tensor]:
    streams = batch_streams([state], clock_ms, CONFIG)
    return retrieval_inputs(streams, [[]], frozenset())
