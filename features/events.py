"""The event: decode, judge, hash. The rules here are the same for live, replay and training.

Formats and golden bytes: docs/formats.md.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Final

import msgspec
import xxhash

from features.config import FORGET_ACTION
from features.errors import InvalidEventError, Reason

if TYPE_CHECKING:
    from features.config import StateConfig

EVENT_VERSION: Final = 1
# Larger values are almost always a payload put in the wrong field; the broker's own limit is 1 MiB.
VALUE_BYTES_MAX: Final = 16 * 1024
ID_MAX: Final = 2**63 - 1
# 9999-12-31: beyond it datetime, Parquet readers and people disagree about the meaning.
TIME_MS_MAX: Final = 253_402_300_799_999
DWELL_MS_MAX: Final = 2**31 - 1
POSITION_MAX: Final = 2**31 - 1
# Kept as float32; what does not fit could be neither packed nor written to the lake.
VALUE_MAX: Final = float.fromhex("0x1.fffffep+127")

CONTENT_TYPE_HEADER: Final = "content-type"
JSON_TYPE: Final = b"application/json"
MSGPACK_TYPE: Final = b"application/msgpack"


class Event(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One thing a user did. Field meanings and ranges: docs/formats.md."""

    event_id: str
    user_id: int
    item_id: int
    action: str
    event_time_ms: int
    v: int = EVENT_VERSION
    domain: str | None = None
    dwell_ms: int | None = None
    value: float | None = None
    request_id: str | None = None
    position: int | None = None


class _Checked(Event, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An event whose ranges the decoder looks at: what `judge_ranges` would refuse, it refuses."""

    user_id: Annotated[int, msgspec.Meta(ge=0, le=ID_MAX)]
    item_id: Annotated[int, msgspec.Meta(ge=0, le=ID_MAX)]
    event_time_ms: Annotated[int, msgspec.Meta(ge=0, le=TIME_MS_MAX)]
    v: Annotated[int, msgspec.Meta(ge=EVENT_VERSION, le=EVENT_VERSION)] = EVENT_VERSION
    dwell_ms: Annotated[int, msgspec.Meta(ge=0, le=DWELL_MS_MAX)] | None = None
    value: Annotated[float, msgspec.Meta(ge=-VALUE_MAX, le=VALUE_MAX)] | None = None
    position: Annotated[int, msgspec.Meta(ge=0, le=POSITION_MAX)] | None = None


_CHECKED_DECODER: Final = msgspec.json.Decoder(_Checked)
_JSON_DECODER: Final = msgspec.json.Decoder(Event)
_MSGPACK_DECODER: Final = msgspec.msgpack.Decoder(Event)
_JSON_ENCODER: Final = msgspec.json.Encoder()
_MSGPACK_ENCODER: Final = msgspec.msgpack.Encoder()


def encode_event(event: Event, *, msgpack: bool = False) -> bytes:
    """Return the event's bytes, JSON unless `msgpack`; `v` is left out while it is 1."""
    return (_MSGPACK_ENCODER if msgpack else _JSON_ENCODER).encode(event)


def decode_event(value: bytes | None, *, msgpack: bool = False) -> Event:
    """Return the event in `value`; says nothing yet about ranges (see `judge`).

    Raises:
        InvalidEventError: too large, not JSON/MessagePack, a missing field or a wrong type.
    """
    if value is None:
        raise InvalidEventError(Reason.MALFORMED, "no value (a tombstone is not an event)")
    if len(value) > VALUE_BYTES_MAX:
        raise InvalidEventError(
            Reason.TOO_LARGE, f"{len(value)} bytes, at most {VALUE_BYTES_MAX} are taken"
        )
    try:
        return (_MSGPACK_DECODER if msgpack else _JSON_DECODER).decode(value)
    except msgspec.ValidationError as error:
        raise InvalidEventError(Reason.WRONG_TYPE, str(error)) from error
    except msgspec.DecodeError as error:
        raise InvalidEventError(Reason.MALFORMED, str(error)) from error
    except UnicodeDecodeError as error:
        raise InvalidEventError(Reason.MALFORMED, f"not UTF-8: {error}") from error


def decode_checked(value: bytes | None, key: bytes | None) -> Event | None:
    """Return the event in `value` if it is JSON and `judge_ranges` would take it; None otherwise.

    None says nothing more than: decode and judge it, to learn what it is.
    """
    try:
        # A value of None is a TypeError; everything else that is wrong, a ValueError.
        event = _CHECKED_DECODER.decode(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    is_plain = key == b"%d" % event.user_id and event.action != FORGET_ACTION
    return event if is_plain else None


def judge_ranges(event: Event, key: bytes | None) -> None:
    """Raise unless the event is one any generation could take (these rules never change).

    Raises:
        InvalidEventError: version, ids, key or time out of range.
    """
    if event.v != EVENT_VERSION:
        raise InvalidEventError(
            Reason.UNSUPPORTED_VERSION, f"v={event.v}, this build reads v={EVENT_VERSION}"
        )
    if not (0 <= event.user_id <= ID_MAX and 0 <= event.item_id <= ID_MAX):
        raise InvalidEventError(
            Reason.ID_OUT_OF_RANGE,
            f"user_id={event.user_id} item_id={event.item_id}, allowed 0..{ID_MAX}",
        )
    if event.action == FORGET_ACTION and event.item_id:
        raise InvalidEventError(
            Reason.ID_OUT_OF_RANGE, f"item_id={event.item_id} of a forget, which is about no item"
        )
    if key != b"%d" % event.user_id:
        raise InvalidEventError(
            Reason.KEY_MISMATCH, f"record key {key!r} is not the decimal user_id {event.user_id}"
        )
    if not 0 <= event.event_time_ms <= TIME_MS_MAX:
        raise InvalidEventError(
            Reason.TIME_OUT_OF_RANGE,
            f"event_time_ms={event.event_time_ms}, allowed 0..{TIME_MS_MAX}",
        )
    if event.position is not None and not 0 <= event.position <= POSITION_MAX:
        raise InvalidEventError(
            Reason.WRONG_TYPE, f"position={event.position}, allowed 0..{POSITION_MAX}"
        )
    if event.dwell_ms is not None and not 0 <= event.dwell_ms <= DWELL_MS_MAX:
        raise InvalidEventError(
            Reason.WRONG_TYPE, f"dwell_ms={event.dwell_ms}, allowed 0..{DWELL_MS_MAX}"
        )
    # Not a comparison of the value itself: NaN, which MessagePack can carry, must fail it too.
    if event.value is not None and not abs(event.value) <= VALUE_MAX:
        raise InvalidEventError(
            Reason.WRONG_TYPE, f"value={event.value}, finite and at most {VALUE_MAX} are taken"
        )


def judge_rules(event: Event, *, append_time_ms: int, config: StateConfig) -> None:
    """Raise unless the generation's own rules take the event.

    A forget is taken under any rules; its time means nothing. The future is measured against the
    broker's append time, never a worker's clock: a replay must judge alike.

    Raises:
        InvalidEventError: unknown action, or dated too far after its append time.
    """
    if event.action == FORGET_ACTION:
        return
    if event.action not in config.actions:
        raise InvalidEventError(
            Reason.UNKNOWN_ACTION, f"action {event.action!r} is not one of {list(config.actions)}"
        )
    ahead_ms = event.event_time_ms - append_time_ms
    if ahead_ms > config.future_tolerance_ms:
        raise InvalidEventError(
            Reason.TIME_IN_FUTURE,
            f"event_time_ms is {ahead_ms} ms after the append time, "
            f"at most {config.future_tolerance_ms} ms are taken",
        )


def event_hash(event_id: str) -> int:
    """Return the unsigned 64-bit XXH3 of the event_id, the identity used to drop duplicates."""
    return xxhash.xxh3_64_intdigest(event_id.encode())


@lru_cache(maxsize=65_536)
def domain_hash(domain: str | None) -> int:
    """Return the unsigned 64-bit XXH3 of the domain; 0 stands for no domain."""
    return 0 if domain is None else (xxhash.xxh3_64_intdigest(domain.encode()) or 1)


def stable_id(text: str) -> int:
    """Return the documented 63-bit id of a string id: BLAKE2b-8, big-endian, top bit cleared.

    >>> stable_id("user-42") == stable_id("user-42") <= 2**63 - 1
    True
    """
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") & ID_MAX


def parse_id(raw: str | int) -> int:
    """Return an int id as it is, a decimal string as its number, any other string hashed.

    >>> parse_id("42"), parse_id(42)
    (42, 42)
    """
    if isinstance(raw, int):
        return raw
    return int(raw) if raw.isascii() and raw.isdigit() and int(raw) <= ID_MAX else stable_id(raw)
