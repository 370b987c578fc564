"""Training sets from the lake: every feature as it was known at each label, and nothing later.

Legend: N events, G labels, W events of both streams together.

`features/history.py` says what is known at a label. With an entity frame its rows are the labels;
without one every (user, time) of the log is, together with the items that came then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pyarrow as pa

from features.errors import SchemaMismatchError
from features.history import History, LabelGroups, known_rows, label_groups, labels_at
from features.history_sessions import SessionHistory
from features.lake_users import MEMORY_BYTES, stream_users
from features.schema import views
from features.view import LAST_ITEMS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from features.config import StateConfig
    from features.history import Bools, Int64s
    from features.schema import Feature

# Bytes of a label and event of its window while columns are made of them, copies included.
_WINDOW_BYTES: Final = 120
_STEPPED_VIEWS: Final = ("user_session", "user_recent", "user_mid")
_STREAM_COLUMNS: Final = {
    "item_id": "item_id_N",
    "event_time_ms": "event_time_ms_N",
    "action": "action_N",
    "domain": "domain_N",
    "dwell_ms": "dwell_ms_N",
    "value": "value_N",
}
_ARROW: Final = {"int64": pa.int64(), "float32": pa.float32(), "bool": pa.bool_()}


@dataclass(frozen=True)
class Entities:
    """An entity frame: which user's features, at which time.

    Attributes:
        user_id: int64.
        time_ms: int64; what happens at or after it is not known.
        ordinal: int64, the ordinal from which on nothing was known, as an answer says it and the
            feature log records it; None finds it from the time.
    """

    user_id: Int64s
    time_ms: Int64s
    ordinal: Int64s | None = None


def feature_names(config: StateConfig) -> list[str]:
    """Return every feature that events give, in the order of the schema."""
    stepped = (view for view in views(config) if view.name in _STEPPED_VIEWS)
    return [feature.name for view in stepped for feature in view.features]


def _features(config: StateConfig) -> dict[str, Feature]:
    user_views = (view for view in views(config) if view.entity == "user")
    return {feature.name: feature for view in user_views for feature in view.features}


def training_rows(
    root: Path,
    topic: str,
    config: StateConfig,
    *,
    entities: Entities | None = None,
    features: Sequence[str] | None = None,
    memory_bytes: int = MEMORY_BYTES,
    scratch: Path | None = None,
) -> Iterator[pa.Table]:
    """Yield the labels' features, some users at a time.

    Columns: `user_id`, `event_time_ms` (the label's), `ordinal` (that of the next to arrive),
    `newest_event_time_ms` (of those known), `label_item_id` (what came at that very time, in order
    of arrival; a list), then the features. A feature is null where nothing was known of the user.
    With an entity frame also `row`, the row of the frame, every one once, users in no fixed order.

    Args:
        root: the lake's folder.
        topic: the log's first one; those that follow it are read too.
        config: the generation's rules.
        entities: the labels; every (user, time) of the log if left out.
        features: names from the schema; all that events give if left out. Those of a user that
            events alone do not give, but a model, are null.
        memory_bytes: of what is held at a time, half of it for events and half for columns; see
            `features.lake_users.stream_users` for when it cannot be kept to.
        scratch: see there.

    Raises:
        LakeError: nothing there, a hole, or a file is missing or unreadable.
        SchemaMismatchError: a feature that this build does not compute.
    """
    names = feature_names(config) if features is None else list(features)
    kinds = _features(config)
    unknown = sorted(set(names) - set(kinds))
    if unknown:
        raise SchemaMismatchError(
            f"no feature {unknown[0]!r} can be computed from the lake; those of the schema are "
            f"{', '.join(feature_names(config))}."
        )
    users = None if entities is None else np.unique(entities.user_id)
    half = memory_bytes // 2
    seen = np.zeros(0 if users is None else users.size, bool)
    for columns in stream_users(
        root, topic, config, users=users, memory_bytes=half, scratch=scratch
    ):
        log = History.from_columns(columns)
        if users is not None:
            seen |= np.isin(users, log.user_ids_U)
        rows, labels = _labels(log, entities)
        cut = _Cut(log, config, {name: kinds[name] for name in names}, SessionHistory(log, config))
        size = _labels_at_once(labels, config, half)
        for start in range(0, len(labels), size):
            part = slice(start, start + size)
            yield cut.table(labels.select(part), None if rows is None else rows[part])
    if entities is not None and users is not None and not seen.all():
        yield _unknown(entities, users[~seen], {name: kinds[name] for name in names})


def _labels(log: History, entities: Entities | None) -> tuple[Int64s | None, LabelGroups]:
    """Return the labels of a part's users, and the rows of the frame they come from."""
    if entities is None:
        return None, label_groups(log)
    rows = np.flatnonzero(np.isin(entities.user_id, log.user_ids_U))
    ordinal = None if entities.ordinal is None else entities.ordinal[rows]
    return rows, labels_at(log, entities.user_id[rows], entities.time_ms[rows], ordinal)


def _labels_at_once(labels: LabelGroups, config: StateConfig, memory_bytes: int) -> int:
    width = config.recent + config.mid + int(labels.num_late_G.max(initial=0))
    return max(1, memory_bytes // (width * _WINDOW_BYTES))


@dataclass(frozen=True)
class _Cut:
    """Makes tables out of one part's events."""

    log: History
    config: StateConfig
    features: Mapping[str, Feature]
    sessions: SessionHistory

    def table(self, labels: LabelGroups, rows: Int64s | None) -> pa.Table:
        """Return the features at some labels."""
        window, known = self._window(labels)
        exists = known[:, -1]
        newest_ms = self.log.event_time_ms_N[window[:, -1]]
        made = {} if rows is None else {"row": pa.array(rows)}
        made |= {
            "user_id": pa.array(self.log.user_ids_U[labels.user_G]),
            "event_time_ms": pa.array(labels.time_ms_G),
            "ordinal": pa.array(
                np.minimum(labels.first_ordinal_G, self.log.next_ordinals[labels.user_G])
            ),
            "newest_event_time_ms": pa.array(newest_ms, mask=~exists),
            "label_item_id": self._targets(labels),
        }
        computed: dict[str, pa.Array] = {}
        if any(name.startswith("session_") for name in self.features):
            computed |= self._session_columns(labels, window, known)
        computed |= self._stream_columns(window, known)
        nulls = _nulls(self.features, len(labels))
        return pa.table(made | {name: computed.get(name, nulls[name]) for name in self.features})

    def _window(self, labels: LabelGroups) -> tuple[Int64s, Bools]:
        """Return the rows of the streams asked for, newest last; of both if mid-term is."""
        with_mid = any(name.startswith("mid_") for name in self.features)
        return known_rows(
            self.log, labels, self.config.recent + (self.config.mid if with_mid else 0)
        )

    def _targets(self, labels: LabelGroups) -> pa.Array:
        first = np.repeat(labels.first_row_G, labels.num_rows_G)
        starts = np.concatenate(([0], np.cumsum(labels.num_rows_G)))
        lane = np.arange(starts[-1]) - np.repeat(starts[:-1], labels.num_rows_G)
        return _lists(starts, self.log.item_id_N[first + lane])

    def _stream_columns(self, window: Int64s, known: Bools) -> dict[str, pa.Array]:
        """Return the columns asked for of both streams, a list a label."""
        null = ~known[:, -1]
        recent = self.config.recent
        columns = {}
        for stream, part in (("recent", slice(-recent, None)), ("mid", slice(None, -recent))):
            names = [name for name in self.features if name.startswith(f"{stream}_")]
            if names:
                rows = window[:, part][known[:, part]]
                offsets = np.concatenate(([0], np.cumsum(known[:, part].sum(axis=1))))
            for name in names:
                values = getattr(self.log, _STREAM_COLUMNS[name.removeprefix(f"{stream}_")])
                columns[name] = _lists(offsets, values[rows], null=null)
        return columns

    def _session_columns(
        self, labels: LabelGroups, window: Int64s, known: Bools
    ) -> dict[str, pa.Array]:
        """Return every session feature: `features.view.view_session` for all labels at once."""
        found = self.sessions.at(labels)
        null = ~found.exists_G
        is_open = found.exists_G & (
            labels.time_ms_G - found.last_ms_G <= self.config.session_gap_ms
        )
        part = slice(-self.config.recent, None)
        rows = window[:, part]
        inside = known[:, part] & (self.log.event_time_ms_N[rows] >= found.start_ms_G[:, None])
        inside &= is_open[:, None]
        items = np.where(inside, self.log.item_id_N[rows], -1)
        plain = {
            "session_id": found.session_id_G,
            "session_start_ms": found.start_ms_G,
            "session_last_ms": found.last_ms_G,
            "session_num_events": found.num_events_G,
            "session_dwell_ms": found.dwell_ms_G,
            "session_distinct_items": _num_distinct(items),
        }
        columns = {
            name: pa.array(np.where(is_open, values, 0), mask=null)
            for name, values in plain.items()
        }
        counts = np.where(is_open[:, None], found.action_counts_GA, 0)
        return columns | {
            "session_is_open": pa.array(is_open, mask=null),
            "session_action_counts": _lists(
                np.arange(len(labels) + 1) * counts.shape[1], counts.ravel(), null=null
            ),
            "session_last_items": _newest_first(items, null),
        }


def _num_distinct(items: Int64s) -> Int64s:
    """Return how many different items each row holds; -1 is none."""
    ordered = np.sort(items, axis=1)
    is_new = np.diff(ordered, axis=1, prepend=-1) != 0
    counts: Int64s = (is_new & (ordered >= 0)).sum(axis=1, dtype=np.int64)
    return counts


def _newest_first(items: Int64s, null: Bools) -> pa.Array:
    """Return the newest LAST_ITEMS of each row; the front of a row may be -1, its end is not."""
    newest = items[:, ::-1][:, :LAST_ITEMS]
    has = newest >= 0
    return _lists(np.concatenate(([0], np.cumsum(has.sum(axis=1)))), newest[has], null=null)


def _lists(offsets: Int64s, values: np.ndarray[Any, Any], *, null: Bools | None = None) -> pa.Array:
    """Return lists between offsets, without an object for any of them."""
    return pa.ListArray.from_arrays(
        pa.array(offsets, pa.int32()),
        pa.array(values),
        mask=None if null is None else pa.array(null),
    )


def _nulls(features: Mapping[str, Feature], size: int) -> dict[str, pa.Array]:
    """Return the columns of features nobody knows."""
    kinds = {name: _ARROW[feature.dtype] for name, feature in features.items()}
    return {
        name: pa.nulls(size, pa.list_(kinds[name]) if feature.length else kinds[name])
        for name, feature in features.items()
    }


def _unknown(entities: Entities, users: Int64s, features: Mapping[str, Feature]) -> pa.Table:
    """Return the rows of users of whom the lake has nothing."""
    rows = np.flatnonzero(np.isin(entities.user_id, users))
    made = {
        "row": pa.array(rows),
        "user_id": pa.array(entities.user_id[rows]),
        "event_time_ms": pa.array(entities.time_ms[rows]),
        "ordinal": pa.array(np.zeros(rows.size, np.int64)),
        "newest_event_time_ms": pa.nulls(rows.size, pa.int64()),
        "label_item_id": _lists(np.zeros(rows.size + 1, np.int64), np.zeros(0, np.int64)),
    }
    return pa.table(made | _nulls(features, rows.size))
