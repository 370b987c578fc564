"""The log of the shared small model, and what came after its training."""

import numpy as np

from tests.trainer.conftest import DAY_MS, made_up_columns
from trainer.dataset import EventLog

# Later than every event.
END_MS = 10**15
NEWER_FROM_MS = 120 * DAY_MS


def newer_log(*, new_share: float = 0.5) -> EventLog:
    """The log of the trained model, and then two months in which many events are of new items."""
    columns = made_up_columns(seed=3)
    later = made_up_columns(seed=4, num_baskets=10)
    later["event_time_ms"] = later["event_time_ms"] + NEWER_FROM_MS
    later["ordinal"] = later["ordinal"] + 1000
    is_new = np.random.default_rng(1).random(len(later["item_id"])) < new_share
    later["item_id"] = np.where(is_new, 10_001 + later["item_id"] % 20 * 3, later["item_id"])
    return EventLog.from_columns(
        {name: np.concatenate((columns[name], later[name])) for name in columns}
    )
