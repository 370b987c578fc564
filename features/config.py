"""The rules of one generation: stream sizes, session gap, actions. Recorded with the state."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

import msgspec

DEFAULT_ACTIONS = (
    "impression",
    "click",
    "view",
    "like",
    "dislike",
    "cart",
    "purchase",
    "rating",
)

# Not an action of a user's: everything of the user's that stands before it in the log is forgotten.
FORGET_ACTION: Final = "forget"
# Past every code that a list of actions can have.
FORGET_CODE: Final = 255

# The session trailer holds one counter per action, so the list cannot grow past its width.
ACTIONS_MAX = 16


@dataclass(frozen=True, kw_only=True)
class StateConfig:
    """What decides the bytes of a user's state; equal configs give equal bytes.

    Attributes:
        recent: R, events in the recent stream.
        mid: M, events in the mid-term stream, those before the recent ones.
        chunk: C, events that leave the tail together once it holds R + M + C.
        dedup_window: a repeated event_id among the last this many accepted events is dropped.
        session_gap_ms: silence that ends a session.
        session_max_ms: a session never spans more event time than this.
        actions: every action an event may carry; position in the list is its stored code.
        stream_actions: the actions that enter the streams; the others are valid but leave
            no trace in the state (impressions would drown the rest).
        future_tolerance_ms: an event dated further past its broker append time is refused.
    """

    recent: int = 64
    mid: int = 448
    chunk: int = 64
    dedup_window: int = 256
    session_gap_ms: int = 30 * 60 * 1000
    session_max_ms: int = 24 * 60 * 60 * 1000
    actions: tuple[str, ...] = DEFAULT_ACTIONS
    stream_actions: tuple[str, ...] = DEFAULT_ACTIONS[1:]
    future_tolerance_ms: int = 5 * 60 * 1000

    def __post_init__(self) -> None:
        """Refuse sizes the row format cannot hold."""
        if min(self.recent, self.mid, self.chunk, self.dedup_window, self.session_gap_ms) < 1:
            raise ValueError(f"stream sizes, window and gap must be at least 1: {self}")
        if not 0 < len(self.actions) <= ACTIONS_MAX:
            raise ValueError(
                f"{len(self.actions)} actions; between 1 and {ACTIONS_MAX} are allowed"
            )
        if FORGET_ACTION in self.actions:
            raise ValueError(f"{FORGET_ACTION!r} is reserved: `moveline forget` sends it")
        unknown = set(self.stream_actions) - set(self.actions)
        if unknown:
            raise ValueError(f"stream_actions not among actions: {sorted(unknown)}")

    @property
    def tail_max(self) -> int:
        """Records the tail holds right before its oldest chunk leaves."""
        return self.recent + self.mid + self.chunk

    @property
    def codes(self) -> dict[str, int]:
        """The code of every action that an event may carry, a forget among them."""
        codes = {action: code for code, action in enumerate(self.actions)}
        return {**codes, FORGET_ACTION: FORGET_CODE}

    @property
    def entering(self) -> frozenset[str]:
        """The actions that change a state."""
        return frozenset((*self.stream_actions, FORGET_ACTION))

    def to_json(self) -> bytes:
        """Return the record kept beside the generation's state."""
        return msgspec.json.encode(self, order="sorted")

    def digest(self) -> str:
        """Return 16 hex digits that differ when any rule differs."""
        return hashlib.sha256(self.to_json()).hexdigest()[:16]


def config_from_json(raw: bytes) -> StateConfig:
    """Return the config recorded by `StateConfig.to_json`."""
    return msgspec.json.decode(raw, type=StateConfig)
