"""The tensors of the `recommend` and `gems` models: names shared by server and clients.

Every tensor is INT64 or FP32: the python backend hands those over by DLPack without a copy, and
its NumPy path is wrong under NumPy 2 (docs/formats.md).
"""

from __future__ import annotations

from enum import IntFlag
from typing import Final

from features.sources import SOURCES

RECOMMEND_MODEL: Final = "recommend"
RETRIEVAL_MODEL: Final = "gems"
# Folds chunks of old events into the memory that a retrieval model reads.
LIFELONG_MODEL: Final = "lifelong"

# Beam width of the exported retrieval model: no answer can be longer.
K_MAX: Final = 100
K_DEFAULT: Final = 10
# What min_position waits at most on the server, whatever the caller asks: it holds a slot.
WAIT_MS_MAX: Final = 5_000
# What a request without a deadline gets, and the longest that one may ask for.
DEADLINE_MS_MAX: Final = 10_000
# Items one request may have ranked: as many as the retrieval model's input holds.
CANDIDATES_MAX: Final = 512
# Users in one request: beyond it a request starves the others of its instance.
USERS_MAX: Final = 64

# Share of users whose answers are logged: enough for a skew report, a hundredth of the work.
LOGGED_SHARE_DEFAULT: Final = 0.01

NO_ITEM: Final = -1
# Items one user's request can exclude inside the model; what is beyond is filtered afterwards.
NUM_EXCLUDED: Final = 512
# Stands for a request that asks for no domain.
ANY_DOMAIN: Final = 0

# Shares in `contribution`, FP32 [B, 5]: the streams that the model read, then the live sources.
CONTRIBUTION: Final = ("recent", "mid", "lifelong", *SOURCES)
NO_CONTRIBUTION: Final = (0.0,) * len(CONTRIBUTION)


class Degraded(IntFlag):
    """Why an answer is less than it could be; 0 is a full answer."""

    NONE = 0
    UNKNOWN_USER = 1
    STORE_AWAY = 2
    MODEL_AWAY = 4
    POSITION_NOT_REACHED = 8
    FEW_CANDIDATES = 16
    LIFELONG = 32
    MID_TERM = 64
    DEADLINE = 128
    NO_TRENDING = 256


# Columns of the `provenance` output, INT64 [B, 7].
PROVENANCE: Final = (
    "model_version",
    "live_version",
    "generation",
    "ordinal",
    "newest_event_time_ms",
    "newest_event_age_ms",
    "degraded",
)
