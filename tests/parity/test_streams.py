"""Law: the streams a model is trained on are those scoring reads, value by value.

Method: any users' logs, late events among them, are cut by the trainer at every label; its tensors
are compared with those scoring builds from the features at the ordinal before the label's first
event, seen at the label's time. Where no event known then is dated later, those are the features of
the state itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from features.as_of import features_at
from features.config import StateConfig
from features.state import EMPTY_STATE, Accepted, Position, step
from features.view import batch_streams, seen_clock_ms
from scoring.tensors import retrieval_inputs
from trainer.batches import BatchSource
from trainer.dataset import EventLog, label_groups
from trainer.package import raw_streams
from trainer.vocabulary import Vocabulary

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from features.view import UserView

CONFIG = StateConfig(recent=4, mid=6, chunk=3, dedup_window=5)
STREAMS = [
    f"{stream}_{field}"
    for stream in ("recent", "mid")
    for field in ("item", "age_ms", "domain", "action", "dwell_ms")
]

# Per user: (time step to the event before, item); a step of 0 joins the basket before it, one
# backwards is a late event.
users_logs = st.lists(
    st.lists(st.tuples(st.integers(-4, 3), st.integers(0, 5)), min_size=1, max_size=30),
    min_size=1,
    max_size=4,
)


def accepted(steps: list[tuple[int, int]]) -> list[Accepted]:
    times = (200 + np.cumsum([gap for gap, _ in steps])) * 86_400_000 + 1
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
        clock_ms = int(groups.time_ms_G[row])
        view = features_at(logs[user], ordinal=before, clock_ms=clock_ms, config=CONFIG)
        served = tensors_of(view, clock_ms)
        for name in STREAMS:
            assert torch.equal(trained[name][row], served[name][0]), (name, row)
        state = step(EMPTY_STATE, logs[user][:before], CONFIG).state
        if seen_clock_ms(clock_ms, state) == clock_ms:
            streams = batch_streams([state], clock_ms, CONFIG)
            of_state = retrieval_inputs(streams, [[]], frozenset())
            assert all(torch.equal(served[name], of_state[name]) for name in STREAMS)


def tensors_of(view: UserView, clock_ms: int) -> dict[str, torch.Tensor]:
    """Return the tensors scoring builds, from features instead of a state."""
    streams = batch_streams([EMPTY_STATE], clock_ms, CONFIG)
    for padded, records in ((streams.recent_BR, view.recent), (streams.mid_BM, view.mid)):
        padded[0, padded.shape[1] - records.size :] = records
    if view.newest_event_time_ms is not None:
        streams.newest_ms_B[0] = view.newest_event_time_ms
    return retrieval_inputs(streams, [[]], frozenset())
