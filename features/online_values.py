"""A user's features and an item's entry as Feast's values: (event time, feature -> value)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from feast.protos.feast.types.Value_pb2 import Value

from features.config import StateConfig
from features.errors import SchemaMismatchError
from features.schema import views
from features.view import PADDING_ITEM

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from features.catalogue import Item
    from features.schema import Feature
    from features.user_batch import UserBatch

Row = tuple[datetime | None, dict[str, Value] | None]

NOT_FOUND: Final[Row] = (None, None)
EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
MILLISECOND: Final = timedelta(milliseconds=1)
SESSION: Final = "user_session"
MID: Final = "user_mid"
# The views that rows hold; the places for what models will write are empty.
_FILLED: Final = frozenset({SESSION, "user_recent", MID})
# Names and types are the same in every generation; only lengths differ.
_FEATURES: Final = {
    feature.name: feature for view in views(StateConfig()) for feature in view.features
}
# Feature -> field of features.user_batch.SessionBatch.
_SESSION_FIELDS: Final = {
    "session_is_open": "is_open_B",
    "session_id": "session_id_B",
    "session_start_ms": "start_ms_B",
    "session_last_ms": "last_ms_B",
    "session_num_events": "num_events_B",
    "session_dwell_ms": "dwell_ms_B",
    "session_distinct_items": "distinct_items_B",
    "session_action_counts": "action_counts_BA",
    "session_last_items": "last_items_BL",
}
# How a message begins that is a list of numbers: field 1, packed.
_PACKED: Final = b"\x0a"
_SEVEN_BITS: Final = 127
_MORE: Final = 128


class UserColumns(NamedTuple):
    """One user view of a batch: for each feature asked for, a value by user.

    Lists of numbers are the bytes of the message that holds them.
    """

    names: Sequence[str]
    columns: list[list[Any]]
    newest_ms: list[int]  # -1: the view has nothing of this user

    def row(self, index: int) -> Row:
        """Return one user's row as `online_read` gives it."""
        newest_ms = self.newest_ms[index]
        if newest_ms < 0:
            return NOT_FOUND
        values = {name: Value() for name in self.names}
        for (name, value), column in zip(values.items(), self.columns, strict=True):
            filler(name)(value, column[index])
        return EPOCH + newest_ms * MILLISECOND, values


def user_columns(
    view_name: str, features: Sequence[str], batch: UserBatch | None, num_users: int
) -> UserColumns:
    """Return the features asked for of one user view, dated by each user's newest event.

    Args:
        view_name: one of the worker's user views.
        features: of it, in the order wanted.
        batch: what was read; None when nobody has built the generation yet.
        num_users: how many there are.

    Raises:
        SchemaMismatchError: a feature that this build does not compute.
    """
    known = [_known(name) for name in features]
    if batch is None or view_name not in _FILLED:
        return UserColumns(features, [[None] * num_users for _ in known], [-1] * num_users)
    columns: list[list[Any]]
    if view_name == SESSION:
        sessions = batch.sessions()
        columns = [
            _session_column(getattr(sessions, _SESSION_FIELDS[feature.name]), feature)
            for feature in known
        ]
    else:
        columns = _stream_columns(view_name, known, batch)
    return UserColumns(features, columns, batch.newest_ms_B.tolist())


def _session_column(column: np.ndarray[Any, Any], feature: Feature) -> list[Any]:
    if not feature.length:
        return list(column.tolist())
    ends = [column.shape[1]] * len(column)
    if feature.name == "session_last_items":
        ends = (column != PADDING_ITEM).sum(axis=1).tolist()
    return _messages(column, [0] * len(column), ends)


def _stream_columns(view_name: str, known: Sequence[Feature], batch: UserBatch) -> list[list[Any]]:
    """Return a stream's columns; recent_item_id is item_id of the recent records."""
    streams = batch.streams()
    records = streams.mid_BM if view_name == MID else streams.recent_BR
    starts = (records["item_id"] == PADDING_ITEM).sum(axis=1).tolist()
    ends = [records.shape[1]] * len(starts)
    return [_messages(records[feature.name.split("_", 1)[1]], starts, ends) for feature in known]


def _messages(
    column: np.ndarray[Any, Any], starts: Sequence[int], ends: Sequence[int]
) -> list[bytes]:
    """Return each row's values from start to end as the bytes of an Int64List or FloatList.

    Handed over as bytes, a list costs a tenth of what its numbers cost one by one.
    """
    payload = _floats(column) if column.dtype == np.float32 else _varints(column)
    width = payload.shape[1] // max(1, column.shape[1])
    messages = []
    for row, start, end in zip(payload, starts, ends, strict=True):
        values = row[start * width : end * width].tobytes()
        messages.append(_PACKED + _varint(len(values)) + values if values else b"")
    return messages


def _floats(column: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a column as protobuf packs floats: as numpy holds them."""
    return np.ascontiguousarray(column, "<f4").view(np.uint8)


def _varints(column: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a column as protobuf packs integers, all as wide as the widest.

    Seven bits a byte, the lowest first; a set top bit says that more follow, also where they are
    zero. Numbers below zero and unsigned ones keep their 64 bits: Feast has none without a sign.
    """
    wide = column if column.dtype == np.uint64 else column.astype(np.int64)
    bits = np.ascontiguousarray(wide).view(np.uint64)
    width = max(1, -(-int(bits.max(initial=0)).bit_length() // 7))
    packed = np.empty((*bits.shape, width), np.uint8)
    for place in range(width):
        packed[..., place] = (bits >> np.uint64(7 * place)).astype(np.uint8)
    packed |= _MORE
    packed[..., -1] &= _SEVEN_BITS
    return packed.reshape(len(bits), -1)


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
    row = {name: Value() for name in features}
    for name, value in row.items():
        filler(name)(value, values[name])
    return None, row


def filler(name: str) -> Callable[[Any, Any], None]:
    """Return what makes a message say a value of the feature.

    Raises:
        SchemaMismatchError: a feature that this build does not compute.
    """
    feature = _known(name)
    return _FILLERS[feature.dtype, feature.length > 0]


def _fill_bool(value: Any, found: bool) -> None:  # noqa: ANN401, FBT001 - generated protobuf
    value.bool_val = found


def _fill_int(value: Any, found: int) -> None:  # noqa: ANN401 - generated protobuf
    value.int64_val = found


def _fill_text(value: Any, found: str) -> None:  # noqa: ANN401 - generated protobuf
    value.string_val = found


def _fill_ints(value: Any, message: bytes) -> None:  # noqa: ANN401 - generated protobuf
    # An empty list is a value too, which merging nothing would not say.
    value.int64_list_val.SetInParent()
    value.int64_list_val.MergeFromString(message)


def _fill_floats(value: Any, message: bytes) -> None:  # noqa: ANN401 - generated protobuf
    value.float_list_val.SetInParent()
    value.float_list_val.MergeFromString(message)


def _fill_texts(value: Any, found: Sequence[str]) -> None:  # noqa: ANN401 - generated protobuf
    value.string_list_val.SetInParent()
    value.string_list_val.val.extend(found)


_FILLERS: Final[Mapping[tuple[str, bool], Callable[[Any, Any], None]]] = {
    ("bool", False): _fill_bool,
    ("int64", False): _fill_int,
    ("string", False): _fill_text,
    ("int64", True): _fill_ints,
    ("float32", True): _fill_floats,
    ("string", True): _fill_texts,
}


def _varint(number: int) -> bytes:
    """Return a number as protobuf writes lengths: seven bits a byte, the lowest first."""
    out = bytearray()
    while number > _SEVEN_BITS:
        out.append(number & _SEVEN_BITS | _MORE)
        number >>= 7
    out.append(number)
    return bytes(out)


def _known(name: str) -> Feature:
    feature = _FEATURES.get(name)
    if feature is None:
        raise SchemaMismatchError(
            f"the registry names a feature {name!r} that this build does not compute: "
            "run `feast -c features apply`, then refresh the store's registry."
        )
    return feature
