"""A user's features and an item's entry as Feast's values: (event time, feature -> value)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from feast.protos.feast.types.Value_pb2 import FloatList, Int64List, StringList, Value

from features.config import StateConfig
from features.errors import SchemaMismatchError
from features.schema import views

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from features.catalogue import Item
    from features.schema import Feature
    from features.view import Records, UserView

Row = tuple[datetime | None, dict[str, Value] | None]

NOT_FOUND: Final[Row] = (None, None)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND: Final = timedelta(milliseconds=1)
SESSION: Final = "user_session"
MID: Final = "user_mid"
# Names and types are the same in every generation; only lengths differ.
_FEATURES: Final = {
    feature.name: feature for view in views(StateConfig()) for feature in view.features
}
# Feature -> field of features.view.SessionView.
_SESSION_FIELDS: Final = {
    "session_is_open": "is_open",
    "session_id": "session_id",
    "session_start_ms": "start_ms",
    "session_last_ms": "last_ms",
    "session_num_events": "num_events",
    "session_dwell_ms": "dwell_ms",
    "session_distinct_items": "distinct_items",
    "session_action_counts": "action_counts",
    "session_last_items": "last_items",
}
_ENCODERS: Final[Mapping[tuple[str, bool], Callable[[Any], Value]]] = {
    ("bool", False): lambda value: Value(bool_val=value),
    ("int64", False): lambda value: Value(int64_val=value),
    ("string", False): lambda value: Value(string_val=value),
    ("int64", True): lambda values: Value(int64_list_val=Int64List(val=values)),
    ("float32", True): lambda values: Value(float_list_val=FloatList(val=values)),
    ("string", True): lambda values: Value(string_list_val=StringList(val=values)),
}


def user_row(view_name: str, seen: UserView | None, features: Sequence[str]) -> Row:
    """Return the features asked for of one user view, dated by the newest event seen.

    Raises:
        SchemaMismatchError: a feature that this build does not compute.
    """
    if seen is None or seen.newest_event_time_ms is None:
        return NOT_FOUND
    if view_name == SESSION:
        values = {
            name: _encode(name, getattr(seen.user_session, _SESSION_FIELDS[_known(name).name]))
            for name in features
        }
    else:
        records = seen.mid if view_name == MID else seen.recent
        values = {name: _encode(name, _column(records, name)) for name in features}
    return EPOCH + seen.newest_event_time_ms * MILLISECOND, values


def _column(records: Records, name: str) -> list[Any]:
    """Return a stream's column; recent_item_id is item_id of the recent records."""
    column = records[_known(name).name.split("_", 1)[1]]
    # Feast has no unsigned integers: the 64-bit domain hash keeps its bits.
    signed = column.view(np.int64) if column.dtype == np.uint64 else column
    values: list[Any] = signed.tolist()
    return values


def item_row(item: Item | None, features: Sequence[str]) -> Row:
    """Return the features asked for of one catalogue entry; entries carry no time.

    Raises:
        SchemaMismatchError: a feature that this build does not compute.
    """
    if item is None:
        return NOT_FOUND
    values = {
        "item_name": item.name,
        "item_categories": item.categories[: _FEATURES["item_categories"].length],
        "item_available": item.available,
    }
    return None, {name: _encode(name, values[_known(name).name]) for name in features}


def _encode(name: str, value: object) -> Value:
    feature = _known(name)
    return _ENCODERS[feature.dtype, feature.length > 0](value)


def _known(name: str) -> Feature:
    feature = _FEATURES.get(name)
    if feature is None:
        raise SchemaMismatchError(
            f"the registry names a feature {name!r} that this build does not compute: "
            "run `feast -c features apply`, then refresh the store's registry."
        )
    return feature
