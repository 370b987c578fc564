"""What goes in and out of an answer, and the draft in between."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from scoring.arms import LIVE
from scoring.signature import DEADLINE_MS_MAX, NO_CONTRIBUTION, Degraded

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from features.config import StateConfig
    from features.sources import Counted
    from features.state import UserState
    from features.view import Records, StreamBatch
_HALF = 2**63


class Ask(NamedTuple):
    """What one user's answer should respect.

    Attributes:
        user_id: whose answer.
        k: items wanted.
        min_partition: of an event that the state must have seen; negative asks for none.
        min_offset: its offset.
        wait_ms: how long to wait for it.
        exclude_seen: leave out what is in the recent and mid-term stream.
        request_id: the caller's own.
        candidates: only these items, best first; empty is any.
        in_domain: only items of the domain with this unsigned hash; 0 is any.
        deadline_ms: what is left of the caller's deadline; 0 is none.
    """

    user_id: int
    k: int
    min_partition: int = -1
    min_offset: int = -1
    wait_ms: int = 0
    exclude_seen: bool = False
    request_id: str = ""
    candidates: tuple[int, ...] = ()
    in_domain: int = 0
    deadline_ms: int = 0

    @property
    def signed_domain(self) -> int:
        """The domain's hash as tensors carry it: the same 64 bits, read as a signed number."""
        return (self.in_domain + _HALF) % (2 * _HALF) - _HALF

    @property
    def num_wanted(self) -> int:
        """Items of a whole answer: no more than there are candidates."""
        return min(self.k, len(set(self.candidates))) if self.candidates else self.k


class Retrieved(NamedTuple):
    """What the retrieval model returned for a batch of users, best first."""

    item_ids: list[list[int]]
    scores: list[list[float]]
    contributions: list[list[float]]


class Seen(NamedTuple):
    """What the model was given of a user: the streams as batched, padding and all.

    Attributes:
        memory_version: the memories that were read; None where the model reads none.
        num_folded: chunks in the user's; the mid-term stream is then all else but the recent one.
        has_mid: False when only the recent stream was read, for lack of time.
    """

    state: UserState
    recent: Records
    mid: Records
    clock_ms: int
    memory_version: str | None = None
    num_folded: int = 0
    has_mid: bool = True


class Answered(NamedTuple):
    """One user's answer, padded to nothing: as long as there are items.

    Attributes:
        provenance: in the order of scoring.signature.PROVENANCE.
        seen: what it was made from; None where no state was read.
        config: the rules of the generation.
        arm: of a canary, see scoring/arms.py.
        took: how long the batch took that it was made in.
    """

    item_ids: list[int]
    scores: list[float]
    provenance: tuple[int, ...]
    contribution: tuple[float, ...]
    seen: Seen | None
    config: StateConfig
    arm: str = LIVE
    took: Took | None = None


@dataclass
class Took:
    """Seconds that a batch spent, by stage."""

    read_s: float = 0.0
    model_s: float = 0.0
    total_s: float = 0.0


class Retrieve(Protocol):
    """Runs one version of the retrieval model; raises RetrievalError when it is away."""

    def __call__(
        self,
        version: int,
        streams: StreamBatch,
        excluded: Sequence[Sequence[int]],
        withdrawn: frozenset[int],
        *,
        counted: Counted,
        candidates: Sequence[Sequence[int]],
        in_domain: Sequence[int],
    ) -> Retrieved:
        """Return the items for each row of the batch; domains are hashes, their bits as signed."""
        ...


class RetrievalError(Exception):
    """The retrieval model did not answer."""


@dataclass
class Draft:
    """One answer in the making."""

    ask: Ask
    arm: str = LIVE
    state: UserState | None = None
    degraded: Degraded = Degraded.NONE
    item_ids: list[int] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    contribution: tuple[float, ...] = NO_CONTRIBUTION
    model_version: int = 0
    newest_ms: int = -1
    seen: Seen | None = None


class Budget:
    """The time that is left for a batch: that of the ask with the least."""

    def __init__(self, asks: Iterable[Ask]) -> None:
        given = (ask.deadline_ms or DEADLINE_MS_MAX for ask in asks)
        least_ms = max(0, min(min(given, default=DEADLINE_MS_MAX), DEADLINE_MS_MAX))
        self._end_s = time.monotonic() + least_ms / 1000

    def left_ms(self) -> float:
        """Return what is left, not below 0."""
        return max(0.0, (self._end_s - time.monotonic()) * 1000)
