"""Made-up users with an interest that is older than the mid-term stream and returns.

A user begins with `OLD_EVENTS` events on the items of one interest. Then come baskets of items
drawn evenly from those that belong to no interest, more of them than recent and mid-term stream
hold, and after these one basket of the old interest: the marked label. The same `NUM_RETURNS`
times, so that most returns fall before the split, where a model can learn that old interests
return. Nothing before a return says that it is one.

The control differs in one thing: the basket that returns is of an interest drawn anew among all
interests, so that nobody's past says which.

Legend: N events.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from features.config import DEFAULT_ACTIONS

if TYPE_CHECKING:
    from numpy.typing import NDArray

NUM_USERS: Final = 500
NUM_INTERESTS: Final = 20
ITEMS_PER_INTEREST: Final = 16
NUM_OTHER_ITEMS: Final = 400
# A quarter of what a user has done at the first return.
OLD_EVENTS: Final = 240
OLD_BASKET: Final = 60
# Longer than recent stream, mid-term stream and one chunk together: nothing of it is in either.
EVENTS_BETWEEN: Final = 640
BASKET: Final = 12
# As few as hold so many: a return is one basket in three of those that follow the beginning, often
# enough to be learned in minutes.
OTHER_BASKET: Final = 320
NUM_RETURNS: Final = 2
DAY_MS: Final = 86_400_000
START_MS: Final = 1_700_000_000_000
# Users begin within so many days, and a basket comes a day on average: the last return stands about
# 22 days after the beginning.
BEGIN_WITHIN_DAYS: Final = 30.0


def planted_columns(*, seed: int, is_planted: bool) -> dict[str, NDArray[Any]]:
    """Columns of all users; `value` is 1 on the events of a return and NaN elsewhere."""
    rng = np.random.default_rng(seed)
    users = [_one_user(user, rng, is_planted=is_planted) for user in range(NUM_USERS)]
    columns = {name: np.concatenate([one[name] for one in users]) for name in users[0]}
    columns["action"] = np.full(len(columns["user_id"]), DEFAULT_ACTIONS.index("click"))
    return columns


def _one_user(user: int, rng: np.random.Generator, *, is_planted: bool) -> dict[str, NDArray[Any]]:
    interest = int(rng.integers(NUM_INTERESTS))
    baskets = [(_often(interest, rng), False) for _ in range(OLD_EVENTS // OLD_BASKET)]
    for _ in range(NUM_RETURNS):
        baskets += [(_others(rng), False) for _ in range(EVENTS_BETWEEN // OTHER_BASKET)]
        # The control draws too, so that both logs are alike up to the items of the returns.
        other = int(rng.integers(NUM_INTERESTS))
        baskets.append((_of(interest if is_planted else other, rng), True))
    gaps = rng.exponential(DAY_MS, len(baskets))
    times = START_MS + rng.uniform(0, BEGIN_WITHIN_DAYS * DAY_MS) + np.cumsum(gaps)
    item = np.concatenate([items for items, _ in baskets])
    sizes = [len(items) for items, _ in baskets]
    returned = np.repeat([is_return for _, is_return in baskets], sizes)
    return {
        "user_id": np.full(len(item), user + 1, np.int64),
        "item_id": item,
        "event_time_ms": np.repeat(times.astype(np.int64), sizes),
        "ordinal": np.arange(len(item)),
        "value": np.where(returned, 1.0, np.nan).astype(np.float32),
    }


def _of(interest: int, rng: np.random.Generator) -> NDArray[np.int64]:
    items = rng.choice(ITEMS_PER_INTEREST, BASKET, replace=False)
    return (interest * ITEMS_PER_INTEREST + items + 1).astype(np.int64)


def _often(interest: int, rng: np.random.Generator) -> NDArray[np.int64]:
    items = rng.integers(0, ITEMS_PER_INTEREST, OLD_BASKET)
    return (interest * ITEMS_PER_INTEREST + items + 1).astype(np.int64)


def _others(rng: np.random.Generator) -> NDArray[np.int64]:
    first = NUM_INTERESTS * ITEMS_PER_INTEREST + 1
    return (first + rng.choice(NUM_OTHER_ITEMS, OTHER_BASKET, replace=False)).astype(np.int64)
