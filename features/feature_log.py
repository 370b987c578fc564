"""One line of the serve-time feature log: what `recommend` read of a user, and what it answered.

Written by `scoring/feature_log.py`, compared with the lake by `features/skew.py`. MessagePack;
fields and golden bytes: docs/formats.md.
"""

from __future__ import annotations

from typing import Final

import msgspec
import numpy as np
import xxhash

from features.errors import FeatureLogError
from features.state import RECORD, RECORD_BYTES, Position
from features.view import SessionView, UserView

SERVED_VERSION: Final = 3
# Records of version 1 say nothing of memories, for none was read; those of 2 nothing of candidates,
# domain and arm, for there were none.
_READABLE: Final = frozenset({1, 2, SERVED_VERSION})
# One more than the largest hash, so that a share of 1.0 takes every user.
_HASH_RANGE: Final = 2**64


class Served(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What one user's answer was made from, at one instant.

    Attributes:
        served_at_ms: the server's clock.
        request_id: the caller's own, empty where it gave none.
        schema_hash: of the generation's features (features.schema.schema_hash).
        live_version: model version the pointers named, 0 for none.
        model_version: model version that spoke, 0 for none.
        ordinal: events of the user the state had seen, 0 for an unknown user.
        clock_ms: the clock the features were seen at.
        position: of the last event applied, None for an unknown user.
        recent: RECORDs of the recent stream, oldest first, as a state row holds them.
        mid: likewise, the mid-term stream.
        user_session: the session at that clock.
        contribution: share of each stream and live source in scoring.signature.CONTRIBUTION's
            order; records of before there were sources end with the streams.
        degraded: flags of scoring.signature.Degraded.
        memory_version: of the memory that was read beside, None where the model reads none.
        num_folded: chunks in it; `mid` is then all else but the recent stream.
        has_mid: False when time was too short to read more than the recent stream.
        candidates: only these were asked for; empty for any.
        in_domain: hash of the domain that was asked for, 0 for any.
        arm: of a canary (scoring/arms.py).
        took_ms: how long making the answer took, on the server.
    """

    served_at_ms: int
    user_id: int
    generation: int
    schema_hash: str
    ordinal: int
    clock_ms: int
    position: Position | None
    recent: bytes
    mid: bytes
    user_session: SessionView | None
    item_ids: list[int]
    scores: list[float]
    contribution: tuple[float, ...]
    live_version: int
    model_version: int
    degraded: int
    request_id: str = ""
    memory_version: str | None = None
    num_folded: int = 0
    has_mid: bool = True
    candidates: list[int] = []
    in_domain: int = 0
    arm: str = "live"
    took_ms: float = 0.0
    v: int = SERVED_VERSION

    @property
    def chunks_folded(self) -> int | None:
        """What `features.as_of.features_at` takes: None where no memory was read."""
        return None if self.memory_version is None else self.num_folded

    def view(self) -> UserView | None:
        """Return the features that were read, None where no state was."""
        if self.user_session is None:
            return None
        recent = np.frombuffer(self.recent, RECORD)
        newest = int(recent["event_time_ms"][-1]) if recent.size else None
        mid = np.frombuffer(self.mid, RECORD)
        return UserView(self.ordinal, newest, recent, mid, self.user_session)


_ENCODER: Final = msgspec.msgpack.Encoder()
_DECODER: Final = msgspec.msgpack.Decoder(Served)


def encode_served(served: Served) -> bytes:
    """Return the record's bytes."""
    return _ENCODER.encode(served)


def decode_served(value: bytes | None) -> Served:
    """Return the record in `value`.

    Raises:
        FeatureLogError: not a record, or of a version this build does not read.
    """
    if value is None:
        raise FeatureLogError("a feature log record without a value")
    try:
        served = _DECODER.decode(value)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise FeatureLogError(f"not a feature log record: {error}") from error
    if served.v not in _READABLE:
        known = ", ".join(map(str, sorted(_READABLE)))
        raise FeatureLogError(f"feature log record of version {served.v}; this build reads {known}")
    if len(served.recent) % RECORD_BYTES or len(served.mid) % RECORD_BYTES:
        raise FeatureLogError(
            f"streams of {len(served.recent)} and {len(served.mid)} bytes; a record has "
            f"{RECORD_BYTES}"
        )
    return served


def is_sampled(user_id: int, share: float) -> bool:
    """Return whether a user is among the `share` whose answers are logged, always the same ones.

    By a hash that has nothing to do with buckets: a sample of few buckets would not see what is
    wrong in the others.

    >>> is_sampled(42, 0.0), is_sampled(42, 1.0)
    (False, True)
    """
    hashed = xxhash.xxh3_64_intdigest((user_id % _HASH_RANGE).to_bytes(8, "little"))
    return hashed < share * _HASH_RANGE
