"""The feature contract: every feature's name, type, shape, default, unit and ttl, in order.

Feast objects are rendered from it, models carry its hash, and a mismatch is refused.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from features.lifelong import LIFELONG_ROWS, LIFELONG_WIDTH
from features.row import ROW_FORMAT
from features.view import LAST_ITEMS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from features.config import StateConfig

Dtype = Literal["int64", "float32", "bool", "string"]
SECONDS_PER_DAY: Final = 86_400
# What AMEN foresees of a user's next interests: as many vectors of this width.
INTEREST_STEPS: Final = 4
INTEREST_WIDTH: Final = 64


@dataclass(frozen=True)
class Feature:
    """One feature of a view.

    Attributes:
        shape: () is a scalar; a stream's only number is how long it is at most; several are a
            tensor, stored as one list, row after row.
        default: what stands where nothing is known; None: nothing does, the value is null.
    """

    name: str
    dtype: Dtype
    unit: str
    shape: tuple[int, ...] = ()
    default: float | str | None = 0
    about: str = ""

    @property
    def length(self) -> int:
        """Values in its list at most; 0 for a scalar."""
        return prod(self.shape) if self.shape else 0


@dataclass(frozen=True)
class View:
    """A feature view. `owner` is "worker" when Feast may read it but not write it."""

    name: str
    entity: Literal["user", "item"]
    ttl_s: int
    owner: Literal["worker", "feast"]
    features: tuple[Feature, ...]
    about: str


def _stream_features(prefix: str, length: int) -> tuple[Feature, ...]:
    columns: tuple[tuple[str, Dtype, str, str], ...] = (
        ("item_id", "int64", "id", "oldest first"),
        ("event_time_ms", "int64", "ms", "UTC epoch"),
        ("action", "int64", "code", "position in the generation's list of actions"),
        ("domain", "int64", "hash", "64-bit XXH3 reinterpreted as signed; 0 is none"),
        ("dwell_ms", "int64", "ms", "-1 is none"),
        ("value", "float32", "as sent", "NaN is none"),
    )
    return tuple(
        Feature(f"{prefix}_{name}", dtype, unit, (length,), None, about)
        for name, dtype, unit, about in columns
    )


def views(config: StateConfig) -> tuple[View, ...]:
    """Return every view of a generation, in the order the hash takes them."""
    return (
        View(
            "user_session",
            "user",
            ttl_s=SECONDS_PER_DAY,
            owner="worker",
            features=(
                Feature("session_is_open", "bool", "flag", default=False),
                Feature("session_id", "int64", "ordinal"),
                Feature("session_start_ms", "int64", "ms"),
                Feature("session_last_ms", "int64", "ms"),
                Feature("session_num_events", "int64", "events"),
                Feature("session_dwell_ms", "int64", "ms"),
                Feature("session_distinct_items", "int64", "items"),
                Feature("session_action_counts", "int64", "events", (len(config.actions),), None),
                Feature("session_last_items", "int64", "id", (LAST_ITEMS,), None, "newest first"),
            ),
            about="the rolling session, evaluated at the reader's clock",
        ),
        View(
            "user_recent",
            "user",
            ttl_s=0,
            owner="worker",
            features=_stream_features("recent", config.recent),
            about=f"the newest {config.recent} events",
        ),
        View(
            "user_mid",
            "user",
            ttl_s=0,
            owner="worker",
            features=_stream_features("mid", config.mid),
            about=f"the {config.mid} events before the recent ones",
        ),
        View(
            "user_interest_flow",
            "user",
            ttl_s=7 * SECONDS_PER_DAY,
            owner="worker",
            features=(
                Feature(
                    "interest_flow",
                    "float32",
                    "embedding",
                    (INTEREST_STEPS, INTEREST_WIDTH),
                    None,
                    "the next interests foreseen, nearest first",
                ),
                Feature("interest_flow_ordinal", "int64", "events", default=None),
            ),
            about="a place for what AMEN foresees; nothing writes it yet, so it is null",
        ),
        View(
            "user_lifelong",
            "user",
            ttl_s=0,
            owner="worker",
            features=(
                Feature(
                    "lifelong_memory",
                    "float32",
                    "embedding",
                    (LIFELONG_ROWS, LIFELONG_WIDTH),
                    None,
                    "the sum over all events folded so far, row after row",
                ),
                Feature("lifelong_num_chunks", "int64", "chunks", default=None),
            ),
            about="a place for the lifelong memory; nothing writes it yet, so it is null",
        ),
        View(
            "item_catalogue",
            "item",
            ttl_s=0,
            owner="worker",
            features=(
                Feature("item_name", "string", "text", default=""),
                Feature("item_categories", "string", "text", (32,), None, "widest first"),
                Feature("item_available", "bool", "flag", default=True),
            ),
            about="names and availability from the compacted items topic",
        ),
        View(
            "item_statistics",
            "item",
            ttl_s=7 * SECONDS_PER_DAY,
            owner="feast",
            features=(
                Feature("item_events_1d", "int64", "events"),
                Feature("item_events_7d", "int64", "events"),
            ),
            about="popularity; anyone may push it through Feast",
        ),
    )


# Feature service -> the views that a model, or an answer, is made of.
SERVICES: Final[Mapping[str, tuple[str, ...]]] = MappingProxyType(
    {
        "gems": ("user_session", "user_recent", "user_mid", "user_lifelong"),
        "hpgr": ("user_session", "user_recent", "item_catalogue", "item_statistics"),
        "amen": ("user_session", "user_recent", "user_mid", "user_interest_flow"),
        "recommend": (
            "user_session",
            "user_recent",
            "user_mid",
            "user_interest_flow",
            "user_lifelong",
            "item_catalogue",
            "item_statistics",
        ),
        "catalogue": ("item_catalogue",),
    }
)


def schema_hash(config: StateConfig) -> str:
    """Return 16 hex digits that change when any feature or the rules behind it change."""
    contract = {
        "row_format": ROW_FORMAT,
        "config": config.digest(),
        "views": [asdict(view) for view in views(config)],
    }
    return hashlib.sha256(msgspec.json.encode(contract, order="sorted")).hexdigest()[:16]
