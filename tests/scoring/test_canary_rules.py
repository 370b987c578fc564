"""What decides about a canary: the figures of its arms, and the rule over them. No servers."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compose.canary_figures import Answer, Window, figures, to_answer
from compose.canary_rules import (
    FAILED_ANSWERS_MIN,
    ArmFigures,
    Decision,
    Rules,
    decide,
    difference,
)
from compose.settings import Settings
from features.feature_log import Served
from features.redis import Canary
from features.state import Accepted, Position
from scoring.arms import CANARY, CONTROL, LIVE, SHADOW
from scoring.signature import Degraded

RULES = Rules(
    users_min=50,
    answers_min=100,
    margin=0.05,
    alpha=0.05,
    failed_margin=0.02,
    latency_factor=2.0,
    latency_floor_ms=20.0,
    age_ms_max=1_000_000,
)
YOUNG_MS, OLD_MS = 1_000, 2_000_000
SINCE_MS = 1_763_700_000_000


def arm(
    rate: float, *, users: int = 400, failed: int = 0, took_ms: float = 5.0, first: int = 0
) -> ArmFigures:
    """Return figures of an arm whose users hit with a probability, two answers each."""
    rng = random.Random(int(rate * 1_000) + first)
    found = ArmFigures(2 * users, failed, [took_ms] * (2 * users))
    for user in range(first, first + users):
        found.hits[user] = (sum(rng.random() < rate for _ in range(2)), 2)
    return found


def test_better_is_promoted_worse_is_taken_back() -> None:
    control = arm(0.3)
    better = decide(RULES, control, arm(0.6, first=10_000), age_ms=YOUNG_MS)
    assert better.decision is Decision.PROMOTE, better
    worse = decide(RULES, control, arm(0.1, first=10_000), age_ms=YOUNG_MS)
    assert worse.decision is Decision.TAKE_BACK, worse
    assert "worse" in worse.reason


def test_as_good_is_promoted_once_it_is_certain() -> None:
    few = decide(RULES, arm(0.3), arm(0.3, first=10_000), age_ms=YOUNG_MS)
    assert few.decision is Decision.GO_ON
    many = decide(
        RULES,
        arm(0.3, users=20_000),
        arm(0.3, users=20_000, first=100_000),
        age_ms=YOUNG_MS,
    )
    assert many.decision is Decision.PROMOTE, many


def test_nothing_is_decided_by_few() -> None:
    few = arm(0.9, users=20, first=10_000)
    verdict = decide(RULES, arm(0.1, users=20), few, age_ms=YOUNG_MS)
    assert verdict.decision is Decision.GO_ON
    assert "20 and 20 users" in verdict.reason
    late = decide(RULES, arm(0.1, users=20), few, age_ms=OLD_MS)
    assert late.decision is Decision.TAKE_BACK
    assert "undecided for too long" in late.reason


def test_failures_come_first() -> None:
    failing = arm(0.9, users=FAILED_ANSWERS_MIN, failed=10, first=10_000)
    verdict = decide(RULES, arm(0.1), failing, age_ms=YOUNG_MS)
    assert verdict.decision is Decision.TAKE_BACK
    assert "10.0% of its answers failed" in verdict.reason
    both = arm(0.1, failed=80)
    assert decide(RULES, both, failing, age_ms=YOUNG_MS).decision is not Decision.TAKE_BACK


def test_slowness_comes_second() -> None:
    slow = arm(0.9, took_ms=60.0, first=10_000)
    verdict = decide(RULES, arm(0.1), slow, age_ms=YOUNG_MS)
    assert verdict.decision is Decision.TAKE_BACK
    assert "p99 60.0 ms, 20.0 ms are allowed" in verdict.reason
    busy = arm(0.1, took_ms=40.0)
    assert decide(RULES, busy, slow, age_ms=YOUNG_MS).decision is Decision.PROMOTE


def test_users_of_both_arms_are_compared_with_themselves() -> None:
    """A shadow: each user's own habits fall out of the difference."""
    control, tried = arm(0.5), arm(0.5)
    paired = difference(control.rates(), tried.rates(), RULES)
    others = arm(0.5, first=10_000)
    apart = difference(control.rates(), others.rates(), RULES)
    assert paired.high - paired.low < (apart.high - apart.low) / 5
    assert paired.low < 0 < paired.high


def test_looking_often_makes_a_wrong_verdict_no_likelier() -> None:
    """Two equal arms, looked at after every ten users: few of a hundred runs are ever decided."""
    rng = random.Random(5)
    rules = replace(RULES, margin=0.0)
    wrong = 0
    for _ in range(100):
        control, tried = {}, {}
        for user in range(600):
            control[user] = float(rng.random() < 0.3)
            tried[10_000 + user] = float(rng.random() < 0.3)
            if user >= rules.users_min and user % 10 == 0:
                bounds = difference(control, tried, rules)
                if bounds.low > 0 or bounds.high < 0:
                    wrong += 1
                    break
    assert wrong <= 12


@given(
    st.dictionaries(st.integers(0, 10**6), st.floats(0, 1), min_size=2, max_size=60),
    st.dictionaries(st.integers(0, 10**6), st.floats(0, 1), min_size=2, max_size=60),
    st.integers(2, 100),
)
def test_bounds_hold_the_difference_and_turn_with_the_arms(
    control: dict[int, float], tried: dict[int, float], users_min: int
) -> None:
    rules = replace(RULES, users_min=users_min)
    bounds = difference(control, tried, rules)
    assert bounds.low < bounds.high
    turned = difference(tried, control, rules)
    assert (turned.low, turned.high) == pytest.approx((-bounds.high, -bounds.low))


@given(
    st.floats(0, 1),
    st.floats(0, 1),
    st.integers(0, 200),
    st.integers(0, 200),
    st.floats(0, 100),
    st.floats(0, 3_000_000),
)
def test_there_is_always_a_verdict(
    ours: float, theirs: float, num_ours: int, num_theirs: int, took_ms: float, age_ms: float
) -> None:
    control = arm(ours, users=num_ours)
    tried = arm(theirs, users=num_theirs, took_ms=took_ms, first=10_000)
    verdict = decide(RULES, control, tried, age_ms=age_ms)
    assert verdict.reason
    if age_ms > RULES.age_ms_max:
        assert verdict.decision is not Decision.GO_ON
    if min(num_ours, num_theirs) < RULES.users_min:
        assert verdict.decision is not Decision.PROMOTE


# --- from logs to figures


def answered(user: int, at_ms: int, items: set[int], arm_name: str = CONTROL) -> Answer:
    return Answer(user, arm_name, at_ms, frozenset(items), is_failed=False, took_ms=5.0)


def event(offset: int, at_ms: int, item_id: int) -> Accepted:
    return Accepted(Position(0, 0, offset), at_ms, item_id, at_ms, 0, offset, -1, 0.0, 1)


def test_a_hit_is_one_of_the_next_events() -> None:
    window = Window(next_events=2, window_ms=1_000)
    events = {1: [event(0, 100, 7), event(1, 600, 8), event(2, 700, 9), event(3, 800, 10)]}
    rows = [
        (answered(1, 100, {7}), None),  # the event of that very moment was before
        (answered(1, 99, {7}), True),
        (answered(1, 300, {9}), True),
        (answered(1, 300, {10}), False),  # the third one after
        (answered(1, 900, {8}), None),  # nothing follows
        (answered(2, 100, {7}), None),
    ]
    for answer, expected in rows:
        control, tried = figures([answer], events, window)
        assert tried.num_answers == 0
        assert control.num_answers == 1
        if answer.served_at_ms == 100 and answer.user_id == 1:
            assert control.hits == {1: (0, 1)}
        elif expected is None:
            assert control.hits == {}
        else:
            assert control.hits == {1: (int(expected), 1)}
    short = Window(next_events=2, window_ms=400)
    assert figures([answered(1, 150, {8})], events, short)[0].hits == {}


def served(**changes: object) -> Served:
    plain = {
        "served_at_ms": SINCE_MS + 1,
        "user_id": 1,
        "generation": 1,
        "schema_hash": "",
        "ordinal": 1,
        "clock_ms": 0,
        "position": None,
        "recent": b"",
        "mid": b"",
        "user_session": None,
        "item_ids": [7],
        "scores": [0.0],
        "contribution": (1.0, 0.0, 0.0),
        "live_version": 3,
        "model_version": 3,
        "degraded": 0,
        "arm": CONTROL,
        "took_ms": 4.0,
    }
    return Served(**(plain | changes))  # type: ignore[arg-type]


def test_what_a_record_says_about_an_arm() -> None:
    canary = Canary(9, None, "canary", 0.1, SINCE_MS)
    ours = to_answer(served(), canary)
    assert ours == Answer(1, CONTROL, SINCE_MS + 1, frozenset({7}), is_failed=False, took_ms=4.0)
    for name in (CANARY, SHADOW):
        tried = to_answer(served(arm=name, model_version=9), canary)
        assert tried is not None
        assert (tried.arm, tried.is_failed) == (CANARY, False)
        # The live version had to speak in its place.
        fell_back = to_answer(served(arm=name, model_version=3), canary)
        assert fell_back is not None
        assert fell_back.is_failed
    late = to_answer(served(degraded=int(Degraded.DEADLINE)), canary)
    assert late is not None
    assert late.is_failed
    for other in (
        {"arm": LIVE},
        {"degraded": int(Degraded.UNKNOWN_USER)},
        {"degraded": int(Degraded.STORE_AWAY)},
        {"served_at_ms": SINCE_MS - 1},
    ):
        assert to_answer(served(**other), canary) is None


def test_the_defaults_can_be_met() -> None:
    """By a version as good as the live one, where there are users enough."""
    from compose.canary import rules_of  # noqa: PLC0415 - loads what a command loads

    rules = rules_of(Settings())
    size = 60_000
    verdict = decide(
        rules,
        arm(0.2, users=size),
        arm(0.2, users=size, first=1_000_000),
        age_ms=YOUNG_MS,
    )
    assert verdict.decision is Decision.PROMOTE, verdict
