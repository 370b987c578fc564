"""Many users' rows as columns, without an object for each value. Pure; numpy only.

A row ends with its trailer, so rows laid out flush right have every field in one column: the
bytes as they came from Redis, behind one another, are the arrays.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import msgspec
import numpy as np

from features.errors import CorruptRowError
from features.row import MAGIC, ROW_FORMAT, TRAILER_BYTES, decode_newest, encode_row
from features.state import RECORD, RECORD_BYTES, UserState
from features.view import LAST_ITEMS, PADDING_ITEM, StreamBatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from features.config import StateConfig

Bools = np.ndarray[Any, np.dtype[np.bool_]]
Int64s = np.ndarray[Any, np.dtype[np.int64]]
Structs = np.ndarray[Any, np.dtype[np.void]]

TRAILER: Final = np.dtype(
    [
        ("session_id", "<u4"),
        ("start_ms", "<i8"),
        ("last_ms", "<i8"),
        ("num_events", "<u4"),
        ("dwell_ms", "<u8"),
        ("action_counts", "<u4", (16,)),
        ("source", "<u4"),
        ("partition", "<i4"),
        ("offset", "<i8"),
        ("append_time_ms", "<i8"),
        ("next_ordinal", "<u4"),
        ("num_chunks", "<u4"),
        ("num_late", "<u4"),
        ("num_records", "<u4"),
        ("num_departed", "<u2"),
        ("has_session", "u1"),
        ("num_actions", "u1"),
        ("crc", "<u4"),
        ("format", "<u2"),
        ("magic", "S2"),
    ]
)
_END_BYTES: Final = 8  # crc, format and magic: what the checksum does not cover
# How a row ends that is read by columns: no departed ids, this format. Others are few.
_NONE_DEPARTED: Final = bytes(2)
_DEPARTED_AT: Final = slice(-12, -10)
_ENDING: Final = ROW_FORMAT.to_bytes(2, "little") + MAGIC


class SessionBatch(NamedTuple):
    """Sessions of B users at their clocks, as `features.view.SessionView` has one.

    Attributes:
        is_open_B: bool [B]; where it is False, everything else is zero.
        session_id_B, start_ms_B, last_ms_B, num_events_B, dwell_ms_B: int64 [B].
        distinct_items_B: int64 [B].
        action_counts_BA: int64 [B, A], A the number of actions.
        last_items_BL: item ids [B, LAST_ITEMS], newest first, PADDING_ITEM behind them.
    """

    is_open_B: Bools
    session_id_B: Int64s
    start_ms_B: Int64s
    last_ms_B: Int64s
    num_events_B: Int64s
    dwell_ms_B: Int64s
    distinct_items_B: Int64s
    action_counts_BA: Int64s
    last_items_BL: Int64s


@dataclass(frozen=True)
class UserBatch:
    """What B users' rows hold, each as of one instant.

    Attributes:
        rows: as they were read; None for a user nothing is known of.
        known_B: whether there was one, bool [B].
        trailers_B: TRAILERs [B]: position, ordinals, session; zeros for an unknown user.
        records_BN: RECORDs [B, N], the newest N, newest last, PADDING_ITEM in front.
        clock_ms_B: the clock each user is seen at, int64 [B].
        newest_ms_B: time of the newest event, int64 [B]; -1 without one.
        config: the rules of their generation.
    """

    rows: Sequence[bytes | None]
    known_B: Bools
    trailers_B: Structs
    records_BN: Structs
    clock_ms_B: Int64s
    newest_ms_B: Int64s
    config: StateConfig

    def streams(self) -> StreamBatch:
        """Return recent and mid-term stream; the latter as far as it was read."""
        records, recent = self.records_BN, self.config.recent
        return StreamBatch(
            records[:, -recent:],
            records[:, :-recent],
            self.clock_ms_B,
            self.trailers_B["next_ordinal"].astype(np.int64),
            self.newest_ms_B,
        )

    def sessions(self) -> SessionBatch:
        """Return the sessions; an ended one is all zeros, as an absent one."""
        trailers = self.trailers_B
        silence_ms = self.clock_ms_B - trailers["last_ms"]
        is_open = (trailers["has_session"] > 0) & (silence_ms <= self.config.session_gap_ms)
        start_ms = _where(is_open, trailers["start_ms"])
        inside, num_inside = self._inside(is_open, start_ms)
        return SessionBatch(
            is_open,
            _where(is_open, trailers["session_id"]),
            start_ms,
            _where(is_open, trailers["last_ms"]),
            _where(is_open, trailers["num_events"]),
            _where(is_open, trailers["dwell_ms"]),
            _num_distinct(inside, num_inside),
            _where(is_open[:, None], trailers["action_counts"][:, : len(self.config.actions)]),
            _newest_first(inside, num_inside),
        )

    def _inside(self, is_open: Bools, start_ms: Int64s) -> tuple[Int64s, Int64s]:
        """Return the sessions' items within the recent stream, newest last, and how many."""
        recent = self.records_BN[:, -self.config.recent :]
        items = recent["item_id"]
        belongs = (recent["event_time_ms"] >= start_ms[:, None]) & is_open[:, None]
        belongs &= items != PADDING_ITEM
        num_inside = belongs.sum(axis=1)
        # Records are in the order of time, so those of a session stand together at the end.
        width = max(1, int(num_inside.max(initial=0)))
        return items[:, -width:], num_inside

    def state(self, index: int) -> UserState | None:
        """Return one user's state as an object: for logs and people, not for every user."""
        row = self.rows[index]
        return None if row is None else decode_newest(row)[0]


def decode_batch(
    user_ids: Sequence[int],
    rows: Sequence[bytes | None],
    *,
    newest: int,
    now_ms: int,
    config: StateConfig,
) -> UserBatch:
    """Return rows, or their ends, as columns.

    Args:
        user_ids: whose rows; for messages.
        rows: each with at least the `newest` records, as far as the user has them, and the trailer.
        newest: N of the result, at least 1.
        now_ms: the reader's clock.
        config: the rules of the generation.

    Raises:
        CorruptRowError: wrong magic, format, checksum or length.
    """
    width = newest * RECORD_BYTES + TRAILER_BYTES
    absent = bytes(width)
    raw = np.frombuffer(
        bytearray().join(
            [absent if row is None else _flush_right(row, width, config) for row in rows]
        ),
        np.uint8,
    ).reshape(len(rows), width)
    trailers = raw[:, -TRAILER_BYTES:].view(TRAILER)[:, 0]
    records = raw[:, :-TRAILER_BYTES].view(RECORD)
    known = np.array([row is not None for row in rows], np.bool_)
    _refuse_damaged(user_ids, rows, raw, trailers)
    held = np.minimum(trailers["num_records"], newest)
    records["item_id"][np.arange(newest) < newest - held[:, None]] = PADDING_ITEM
    newest_ms = np.where(held > 0, records["event_time_ms"][:, -1], -1)
    return UserBatch(
        rows, known, trailers, records, np.maximum(now_ms, newest_ms + 1), newest_ms, config
    )


def _flush_right(row: bytes, width: int, config: StateConfig) -> bytes:
    """Return the row's last bytes, zeros before a shorter one."""
    if not row.endswith(_ENDING) or row[_DEPARTED_AT] != _NONE_DEPARTED:
        state, _ = decode_newest(row)
        row = encode_row(msgspec.structs.replace(state, departed=()), len(config.actions))
    return row[-width:].rjust(width, b"\0")


def _refuse_damaged(
    user_ids: Sequence[int],
    rows: Sequence[bytes | None],
    raw: np.ndarray[Any, np.dtype[np.uint8]],
    trailers: Structs,
) -> None:
    """Return if every row matches its checksum and has the bytes that its trailer promises."""
    size = TRAILER_BYTES - _END_BYTES
    covered = memoryview(raw[:, -TRAILER_BYTES:-_END_BYTES].tobytes())
    sums = [zlib.crc32(covered[at : at + size]) for at in range(0, len(covered), size)]
    lengths = np.array([0 if row is None else len(row) for row in rows])
    held = np.minimum(lengths, raw.shape[1]) - TRAILER_BYTES
    promised = trailers["num_records"].astype(np.int64) * RECORD_BYTES
    damaged = trailers["crc"] != np.array(sums, np.uint32)
    damaged |= np.minimum(promised, raw.shape[1] - TRAILER_BYTES) > held
    damaged &= lengths > 0
    if damaged.any():
        which = int(np.flatnonzero(damaged)[0])
        raise CorruptRowError(
            f"the row of user {user_ids[which]} is damaged: {lengths[which]} bytes, "
            f"{trailers['num_records'][which]} records promised, checksum "
            f"{sums[which]:08x} where {trailers['crc'][which]:08x} is stored. "
            "`moveline audit` looks for more; a replay into a new generation heals it."
        )


def _where(condition: Bools, column: np.ndarray[Any, Any]) -> Int64s:
    return np.where(condition, column, 0).astype(np.int64)


def _num_distinct(items: Int64s, num_inside: Int64s) -> Int64s:
    """Return how many different items stand in the last `num_inside` places of each row."""
    width = items.shape[1]
    outside = np.arange(width) < width - num_inside[:, None]
    # An item of the row stands in for what does not count, and adds none.
    ordered = np.sort(np.where(outside, items[:, -1:], items), axis=1)
    changes = (ordered[:, 1:] != ordered[:, :-1]).sum(axis=1)
    return np.where(num_inside > 0, changes + 1, 0).astype(np.int64)


def _newest_first(items: Int64s, num_inside: Int64s) -> Int64s:
    newest = np.full((items.shape[0], LAST_ITEMS), PADDING_ITEM, np.int64)
    few = items[:, ::-1][:, :LAST_ITEMS]
    newest[:, : few.shape[1]] = few
    newest[np.arange(LAST_ITEMS) >= num_inside[:, None]] = PADDING_ITEM
    return newest
