"""For recommenders: ask Triton for items, sync or asyncio, with a deadline on every call."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Self

import numpy as np
import tritonclient.grpc as grpcclient
import tritonclient.grpc.aio as aioclient
from tritonclient.utils import InferenceServerException

from features.events import ID_MAX, domain_hash, parse_id
from scoring.errors import (
    DeadlineExceededError,
    OverloadedError,
    RejectedError,
    SignatureError,
)
from scoring.signature import (
    CANDIDATES_MAX,
    K_DEFAULT,
    K_MAX,
    NO_ITEM,
    PROVENANCE,
    RECOMMEND_MODEL,
    USERS_MAX,
    WAIT_MS_MAX,
    Degraded,
)
from scoring.triton import make_inputs, map_error

if TYPE_CHECKING:
    from collections.abc import Sequence

DEADLINE_S_DEFAULT: Final = 1.0
# Each request in flight holds its tensors; past this the caller waits, then is told.
IN_FLIGHT_MAX_DEFAULT: Final = 64
# What is kept of the deadline for the answer's way back: a tenth, or so many milliseconds.
_RETURN_SHARE: Final = 0.1
_RETURN_MS: Final = 50
_OUTPUTS: Final = ("item_id", "score", "provenance", "contribution")

UserId = int | str
MinPosition = tuple[int, int]


@dataclass(frozen=True)
class Recommended:
    """One item and the model's log-probability for it (or the trending score)."""

    item_id: int
    score: float


@dataclass(frozen=True)
class Provenance:
    """Where an answer came from.

    Attributes:
        model_version: version that spoke, 0 when none did (trending).
        live_version: version the pointers named then, 0 before any was published.
        generation: number of the generation whose state was read.
        ordinal: how many of the user's events that state has seen.
        newest_event_time_ms: event time of the newest of them, None without any.
        newest_event_age_ms: its age when the answer was made.
        degraded: what is missing from a full answer.
        contribution: share in the answer of each stream and live source, in the order of
            scoring.signature.CONTRIBUTION: recent, mid-term, lifelong, then the sources.
    """

    model_version: int
    live_version: int
    generation: int
    ordinal: int
    newest_event_time_ms: int | None
    newest_event_age_ms: int | None
    degraded: Degraded
    contribution: tuple[float, ...]


@dataclass(frozen=True)
class Answer:
    """Items for one user, best first."""

    user_id: int
    items: tuple[Recommended, ...]
    provenance: Provenance


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What a request asks for beside its users; the same for all of them."""

    k: int
    min_position: MinPosition | None
    exclude_seen: bool
    deadline_s: float
    candidates: Sequence[UserId] | None
    domain: str | None


@dataclass(frozen=True)
class _Ask:
    users: tuple[int, ...]
    inputs: dict[str, np.ndarray[tuple[int, ...], np.dtype[Any]]]
    deadline_s: float


def _make_ask(user_ids: Sequence[UserId], options: _Options) -> _Ask:
    """Return a request's tensors.

    Raises:
        RejectedError: something is out of range.
    """
    users = tuple(parse_id(user) for user in user_ids)
    k, deadline_s = options.k, options.deadline_s
    if not 0 < len(users) <= USERS_MAX:
        raise RejectedError(f"{len(users)} users in one request; send 1 to {USERS_MAX}")
    if not all(0 <= user <= ID_MAX for user in users):
        raise RejectedError(f"user ids must be 0..{ID_MAX}: {users}")
    if not 0 < k <= K_MAX:
        raise RejectedError(f"k={k}; ask for 1 to {K_MAX} items")
    if deadline_s <= 0:
        raise RejectedError(f"deadline_s={deadline_s}; give the call some time")
    size = len(users)
    partition, offset = options.min_position or (-1, -1)
    columns = {
        "user_id": users,
        "k": [k] * size,
        "min_partition": [partition] * size,
        "min_offset": [offset] * size,
        "wait_ms": [0] * size,
        "exclude_seen": [int(options.exclude_seen)] * size,
    }
    inputs = {name: np.array(column, np.int64)[:, None] for name, column in columns.items()}
    if options.candidates is not None:
        row = _candidates(options.candidates)
        inputs["candidate_item"] = np.tile(np.array(row, np.int64), (size, 1))
    if options.domain is not None:
        bits = np.array([[domain_hash(options.domain)]], np.uint64).view(np.int64)
        inputs["in_domain"] = np.tile(bits, (size, 1))
    inputs["deadline_ms"] = np.zeros((size, 1), np.int64)
    return _Ask(users, inputs, deadline_s)


def _tensors(ask: _Ask, left_s: float) -> list[Any]:
    """Return what is sent when so much of the deadline is left, waiting for a slot done."""
    left_ms = left_s * 1000
    left_ms = max(1, int(left_ms - min(_RETURN_MS, _RETURN_SHARE * left_ms)))
    ask.inputs["wait_ms"][:] = min(WAIT_MS_MAX, left_ms)
    ask.inputs["deadline_ms"][:] = left_ms
    return make_inputs(ask.inputs)


def _candidates(given: Sequence[UserId]) -> list[int]:
    items = [parse_id(item) for item in given]
    if not 0 < len(items) <= CANDIDATES_MAX:
        raise RejectedError(
            f"{len(items)} candidates; give 1 to {CANDIDATES_MAX} of them, or none for any item"
        )
    if not all(0 <= item <= ID_MAX for item in items):
        raise RejectedError(f"item ids must be 0..{ID_MAX}: {items}")
    return items


def _read_answers(ask: _Ask, result: Any) -> list[Answer]:  # noqa: ANN401 - tritonclient is untyped
    arrays = {name: result.as_numpy(name) for name in _OUTPUTS}
    missing = [name for name, array in arrays.items() if array is None]
    if missing or arrays["provenance"].shape != (len(ask.users), len(PROVENANCE)):
        raise SignatureError(
            f"`{RECOMMEND_MODEL}` answered without {missing or 'the promised provenance'}: "
            "client and model_repo are of different versions."
        )
    return [_read_answer(user, i, arrays) for i, user in enumerate(ask.users)]


def _read_answer(user: int, i: int, arrays: dict[str, Any]) -> Answer:
    items = tuple(
        Recommended(int(item), float(score))
        for item, score in zip(arrays["item_id"][i], arrays["score"][i], strict=True)
        if item != NO_ITEM
    )
    version, live, generation, ordinal, newest_ms, age_ms, degraded = map(
        int, arrays["provenance"][i]
    )
    contribution = tuple(map(float, arrays["contribution"][i]))
    return Answer(
        user,
        items,
        Provenance(
            version,
            live,
            generation,
            ordinal,
            None if newest_ms < 0 else newest_ms,
            None if newest_ms < 0 else age_ms,
            Degraded(degraded),
            contribution,
        ),
    )


class Recommender:
    """A thread-safe client; keep one per process and close it."""

    def __init__(self, address: str, *, in_flight_max: int = IN_FLIGHT_MAX_DEFAULT) -> None:
        self.address = address
        self._client: Any = grpcclient.InferenceServerClient(address)
        self._slots = threading.BoundedSemaphore(in_flight_max)
        self._in_flight_max = in_flight_max

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the channel."""
        self._client.close()

    def recommend(
        self,
        user_id: UserId,
        *,
        k: int = K_DEFAULT,
        min_position: MinPosition | None = None,
        exclude_seen: bool = False,
        candidates: Sequence[UserId] | None = None,
        domain: str | None = None,
        deadline_s: float = DEADLINE_S_DEFAULT,
        request_id: str = "",
    ) -> Answer:
        """Return items for one user; see `recommend_many`."""
        return self.recommend_many(
            [user_id],
            k=k,
            min_position=min_position,
            exclude_seen=exclude_seen,
            candidates=candidates,
            domain=domain,
            deadline_s=deadline_s,
            request_id=request_id,
        )[0]

    def recommend_many(
        self,
        user_ids: Sequence[UserId],
        *,
        k: int = K_DEFAULT,
        min_position: MinPosition | None = None,
        exclude_seen: bool = False,
        candidates: Sequence[UserId] | None = None,
        domain: str | None = None,
        deadline_s: float = DEADLINE_S_DEFAULT,
        request_id: str = "",
    ) -> list[Answer]:
        """Return items for each user, in order.

        Args:
            user_ids: up to USERS_MAX; a string id is hashed as the producer hashes it.
            k: items per user, up to K_MAX.
            min_position: `Delivery.position` of an event, as the producer's send returned it:
                the answer waits until the state has seen it, or says POSITION_NOT_REACHED.
            exclude_seen: leave out items in the user's recent and mid-term streams.
            candidates: rank these and return no other; up to CANDIDATES_MAX, ids as in events.
            domain: only items of this domain, by its text as in events.
            deadline_s: for the whole call, waiting for a free slot included.
            request_id: your own; the feature log keeps it, and events that follow may carry it.

        Raises:
            RejectedError: the request is out of range.
            DeadlineExceededError: no answer in time.
            OverloadedError: no slot became free in time.
            UnavailableError: Triton or the model is not there.
        """
        ask = _make_ask(
            user_ids,
            _Options(
                k=k,
                min_position=min_position,
                exclude_seen=exclude_seen,
                deadline_s=deadline_s,
                candidates=candidates,
                domain=domain,
            ),
        )
        started = time.monotonic()
        if not self._slots.acquire(timeout=deadline_s):
            raise OverloadedError(
                f"{self._in_flight_max} requests in flight and none ended within {deadline_s} s"
            )
        try:
            left_s = deadline_s - (time.monotonic() - started)
            result = self._client.infer(
                RECOMMEND_MODEL,
                _tensors(ask, left_s),
                client_timeout=max(left_s, 1e-3),
                request_id=request_id,
            )
        except InferenceServerException as error:
            raise map_error(error, f"recommending within {deadline_s} s", self.address) from error
        finally:
            self._slots.release()
        return _read_answers(ask, result)


class AsyncRecommender:
    """The asyncio client; lives in one event loop. Use as `async with`."""

    def __init__(self, address: str, *, in_flight_max: int = IN_FLIGHT_MAX_DEFAULT) -> None:
        self.address = address
        self._in_flight_max = in_flight_max
        self._client: Any = None
        self._slots = asyncio.Semaphore(in_flight_max)

    async def __aenter__(self) -> Self:
        self._client = aioclient.InferenceServerClient(self.address)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.close()

    async def recommend(
        self,
        user_id: UserId,
        *,
        k: int = K_DEFAULT,
        min_position: MinPosition | None = None,
        exclude_seen: bool = False,
        candidates: Sequence[UserId] | None = None,
        domain: str | None = None,
        deadline_s: float = DEADLINE_S_DEFAULT,
        request_id: str = "",
    ) -> Answer:
        """Return items for one user; see `Recommender.recommend_many`."""
        ask = _make_ask(
            [user_id],
            _Options(
                k=k,
                min_position=min_position,
                exclude_seen=exclude_seen,
                deadline_s=deadline_s,
                candidates=candidates,
                domain=domain,
            ),
        )
        started = time.monotonic()
        try:
            async with asyncio.timeout(deadline_s):
                await self._slots.acquire()
        except TimeoutError as error:
            raise OverloadedError(
                f"{self._in_flight_max} requests in flight and none ended within {deadline_s} s"
            ) from error
        try:
            left_s = deadline_s - (time.monotonic() - started)
            return (await self._ask(ask, left_s, request_id))[0]
        finally:
            self._slots.release()

    async def _ask(self, ask: _Ask, left_s: float, request_id: str) -> list[Answer]:
        try:
            async with asyncio.timeout(max(left_s, 1e-3)):
                result = await self._client.infer(
                    RECOMMEND_MODEL,
                    _tensors(ask, left_s),
                    client_timeout=max(left_s, 1e-3),
                    request_id=request_id,
                )
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"no answer from {self.address} within {ask.deadline_s} s"
            ) from error
        except InferenceServerException as error:
            raise map_error(error, "recommending", self.address) from error
        return _read_answers(ask, result)
