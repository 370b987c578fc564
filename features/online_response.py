"""Puts a batch of users into the answer of get_online_features, value by value in place.

Feast's own way builds each value, then copies it into the answer, which for streams of hundreds of
events takes longer than reading them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feast import utils
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from google.protobuf.timestamp_pb2 import Timestamp

from features.online_values import filler

if TYPE_CHECKING:
    from collections.abc import Sequence

    from feast import FeatureView
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse

    from features.online_values import UserColumns

_MS_PER_S = 1_000
_NANOS_PER_MS = 1_000_000


def add_view(
    response: GetOnlineFeaturesResponse,
    table: FeatureView,
    found: UserColumns,
    places: Sequence[int],
    *,
    full_names: bool,
    with_version: bool,
) -> None:
    """Add one user view to the answer.

    Args:
        response: what get_online_features will return.
        table: the view.
        found: its values; a user whose `newest_ms` is -1 is not found.
        places: for each row of the answer, which user of `found` it is about.
        full_names: whether names begin with the view's.
        with_version: whether the answer says which version of the view it is.
    """
    # Without features it adds what the answer says of the view.
    utils._populate_response_from_feature_data(  # noqa: SLF001 - as Feast's own store
        [], [], [], response, full_names, table, 0, with_version
    )
    projection: Any = table.projection
    prefix = f"{projection.name_to_use()}__" if full_names else ""
    response.metadata.feature_names.val.extend(prefix + name for name in found.names)
    present = [found.newest_ms[user] >= 0 for user in places]
    found_or_not = FieldStatus.PRESENT, FieldStatus.NOT_FOUND
    statuses = [found_or_not[not here] for here in present]
    times = [_timestamp(found.newest_ms[user]) for user in places]
    for name, column in zip(found.names, found.columns, strict=True):
        vector = response.results.add()
        vector.statuses.extend(statuses)
        vector.event_timestamps.extend(times)
        values: Any = vector.values
        fill = filler(name)
        for user, here in zip(places, present, strict=True):
            value = values.add()
            if here:
                fill(value, column[user])


def _timestamp(time_ms: int) -> Timestamp:
    if time_ms < 0:
        return Timestamp()
    seconds, rest_ms = divmod(time_ms, _MS_PER_S)
    return Timestamp(seconds=seconds, nanos=rest_ms * _NANOS_PER_MS)
