"""What an answer falls back to when a part is away or time is short: the ladder, as data.

From a whole answer down to an empty one. An answer carries the flag of every step it took, and each
is counted on Triton's metrics page (`moveline_recommend_steps_total`, label `step`). The last two
rows are no rungs: they say that an answer lacks something on whatever rung it stands.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from scoring.signature import Degraded

if TYPE_CHECKING:
    from collections.abc import Iterator

# With less left when state is to be read, only the recent stream is: one short string of a row,
# without the scripts that put chunks and memory beside it.
FULL_MS_MIN: Final = 50
# With less left when the model is to be asked, it is not: trending items now beat nothing.
MODEL_MS_MIN: Final = 20


class Step(NamedTuple):
    """One step of the ladder.

    Attributes:
        name: the label it is counted under.
        flag: what the answer carries.
        condition: when it is taken.
        answer: what the answer then holds.
    """

    name: str
    flag: Degraded
    condition: str
    answer: str


LADDER: Final = (
    Step("full", Degraded.NONE, "all is there, in time", "the model's, of all three streams"),
    Step(
        "no_lifelong",
        Degraded.LIFELONG,
        "the memory is not ready, or cannot be read",
        "the model's, without the events that are only in it",
    ),
    Step(
        "no_mid_term",
        Degraded.MID_TERM,
        f"less than {FULL_MS_MIN} ms were left when state was to be read",
        "the model's, of the recent stream alone",
    ),
    Step(
        "deadline",
        Degraded.DEADLINE,
        f"less than {MODEL_MS_MIN} ms were left for the model, or it did not answer in time",
        "trending items",
    ),
    Step("unknown_user", Degraded.UNKNOWN_USER, "there is no state of the user", "trending items"),
    Step(
        "model_away",
        Degraded.MODEL_AWAY,
        "no version is published, or the retrieval model failed",
        "trending items",
    ),
    Step(
        "store_away",
        Degraded.STORE_AWAY,
        "Redis did not answer within 250 ms or the deadline, or a row is corrupt",
        "trending items",
    ),
    Step(
        "no_trending",
        Degraded.NO_TRENDING,
        "items were missing, and there are no trending items to fill up with",
        "what there is, perhaps nothing",
    ),
    Step(
        "position_not_reached",
        Degraded.POSITION_NOT_REACHED,
        "the state did not reach `min_position` in time",
        "from the state as it is",
    ),
    Step(
        "few_candidates",
        Degraded.FEW_CANDIDATES,
        "the model returned some, but fewer usable items than asked for",
        "the model's, filled up",
    ),
)


def steps_of(degraded: int) -> Iterator[str]:
    """Yield the names of the steps that an answer with these flags took.

    >>> list(steps_of(0)), list(steps_of(Degraded.LIFELONG | Degraded.MID_TERM))
    (['full'], ['no_lifelong', 'no_mid_term'])
    """
    if not degraded:
        yield LADDER[0].name
    for step in LADDER[1:]:
        if step.flag & degraded:
            yield step.name
