"""Which answers are logged, and what is said of them. Nothing here may cost an answer.

Whoever serves hands in `send`, which takes a record without waiting or says that it could not
(`streams/feature_log.py`); scoring knows no Kafka.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, Protocol

from features.feature_log import Served, encode_served, is_sampled
from features.schema import schema_hash
from features.view import PADDING_ITEM, view_session
from scoring.arms import LIVE
from scoring.signature import PROVENANCE

if TYPE_CHECKING:
    from collections.abc import Iterable

    from features.config import StateConfig
    from features.view import Records
    from scoring.asks import Answered, Ask

# Rules change with a generation: a handful in the life of a server.
_CONFIGS_CACHED: Final = 8


class Send(Protocol):
    """Takes a record without waiting."""

    def __call__(self, key: bytes, value: bytes) -> None:
        """Take it, or count it as dropped; never raise, never wait."""
        ...


@dataclass(frozen=True, kw_only=True)
class FeatureLog:
    """Logs the answers of `share` of all users, always the same ones, and those of a canary."""

    share: float
    send: Send

    def log(self, asks: Iterable[Ask], answers: Iterable[Answered], served_at_ms: int) -> None:
        """Send what the sampled users were answered from; call it once the answers are out."""
        for ask, one in zip(asks, answers, strict=True):
            # What decides about a canary is logged whole.
            if one.arm != LIVE or is_sampled(ask.user_id, self.share):
                value = encode_served(served_of(ask, one, served_at_ms))
                self.send(b"%d" % ask.user_id, value)


def served_of(ask: Ask, one: Answered, served_at_ms: int) -> Served:
    """Return the log's record of one answer."""
    source = dict(zip(PROVENANCE, one.provenance, strict=True))
    seen = one.seen
    recent = b"" if seen is None else _held(seen.recent).tobytes()
    return Served(
        served_at_ms=served_at_ms,
        request_id=ask.request_id,
        user_id=ask.user_id,
        generation=source["generation"],
        schema_hash=_schema_hash(one.config),
        live_version=source["live_version"],
        model_version=source["model_version"],
        ordinal=source["ordinal"],
        clock_ms=served_at_ms if seen is None else seen.clock_ms,
        position=None if seen is None else seen.state.position,
        recent=recent,
        mid=b"" if seen is None else _held(seen.mid).tobytes(),
        memory_version=None if seen is None else seen.memory_version,
        num_folded=0 if seen is None else seen.num_folded,
        user_session=None
        if seen is None
        else view_session(seen.state.user_session, _held(seen.recent), seen.clock_ms, one.config),
        item_ids=one.item_ids,
        scores=one.scores,
        contribution=one.contribution,
        degraded=source["degraded"],
        has_mid=seen is None or seen.has_mid,
        candidates=list(ask.candidates),
        in_domain=ask.in_domain,
        arm=one.arm,
        took_ms=0.0 if one.took is None else round(one.took.total_s * 1000, 3),
    )


@lru_cache(maxsize=_CONFIGS_CACHED)
def _schema_hash(config: StateConfig) -> str:
    return schema_hash(config)


def _held(records: Records) -> Records:
    """Return the records without their padding."""
    held: Records = records[records["item_id"] != PADDING_ITEM]
    return held
