"""Asking `recommend` in tests that are about neither deadlines nor a Redis that is slow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np

from scoring.client import Answer, Recommender
from scoring.errors import ScoringError
from scoring.signature import RECOMMEND_MODEL, Degraded
from tests.waiting import until

if TYPE_CHECKING:
    from collections.abc import Callable

    from scoring.triton import TritonServer

# A busy machine holds up a request for longer than a caller's usual second.
PATIENT_S: Final = 10.0
_WHOLE_S: Final = 20.0
T = TypeVar("T", Answer, list[Answer])


class PatientRecommender(Recommender):
    """A client whose requests have ten seconds unless they say otherwise."""

    def recommend(self, *args: Any, **options: Any) -> Answer:  # noqa: ANN401 - passed on
        """Return items for one user."""
        return super().recommend(*args, **{"deadline_s": PATIENT_S, **options})

    def recommend_many(self, *args: Any, **options: Any) -> list[Answer]:  # noqa: ANN401 - likewise
        """Return items for each user, in order."""
        return super().recommend_many(*args, **{"deadline_s": PATIENT_S, **options})


def is_store_away(one: Answer) -> bool:
    """Return whether an answer says that Redis took longer than its 250 ms."""
    return Degraded.STORE_AWAY in one.provenance.degraded


def whole(ask: Callable[[], T]) -> T:
    """Return the answer; where Redis was too slow for it, that of asking again.

    On a busy machine a Redis that is well is late now and then, and the answer says so: right, but
    not what the test is about.
    """
    found: list[T] = []

    def has_state() -> bool:
        found.append(ask())
        answers = found[-1] if isinstance(found[-1], list) else [found[-1]]
        return not any(map(is_store_away, answers))

    until(has_state, _WHOLE_S, what="an answer for which Redis was in time")
    return found[-1]


def ask_with(server: TritonServer, user: int, **columns: int) -> tuple[Degraded, list[int]]:
    """Return flags and items of an answer to a request that says for itself how much time it has.

    The caller waits for a minute: what the server does with its time is looked at.
    """
    asked = {
        "user_id": user,
        "k": 2,
        "min_partition": -1,
        "min_offset": -1,
        "wait_ms": 0,
        "exclude_seen": 0,
        **columns,
    }
    inputs = {name: np.array([[value]], np.int64) for name, value in asked.items()}
    found = server.infer(RECOMMEND_MODEL, 1, inputs, ["provenance", "item_id"], timeout_s=60)
    return Degraded(int(found["provenance"][0, -1])), found["item_id"][0].tolist()


def answered(condition: Callable[[], object]) -> Callable[[], object]:
    """Return a condition to wait for: it does not hold yet where no answer comes."""

    def holds() -> object:
        try:
            return condition()
        except ScoringError:
            return False

    return holds
