"""Whether a canary is promoted, taken back, or watched on: a rule over figures. Pure.

A user is the unit: users were drawn, and one user's answers resemble each other. What may be asked
again and again while answers come in is a confidence sequence: its bounds hold at every moment at
once, so looking often does not make a wrong verdict likelier (Waudby-Smith, Arbour, Sinha, Kennedy,
Ramdas: Time-uniform central limit theory and asymptotic confidence sequences, theorem 2.2; the two
arms of unequal size are taken as one sequence of differences: an inference of ours).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

# Before so many answers a share of failures says little.
FAILED_ANSWERS_MIN: Final = 50
# Users who all hit, or none, vary no less than this: few of them prove little.
_VARIANCE_FLOOR: Final = 0.25


class Decision(StrEnum):
    """What is to be done with a canary."""

    PROMOTE = "promote"
    TAKE_BACK = "take back"
    GO_ON = "go on"


class Verdict(NamedTuple):
    """A decision and the sentence that says why."""

    decision: Decision
    reason: str


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What counts as good enough; compose.settings.CanarySettings has the defaults.

    Attributes:
        users_min: with an answer that an event followed, in each arm.
        answers_min: in each arm.
        margin: by how much the share of hits may be lower, at worst.
        alpha: how likely a verdict on hits may be wrong, over all times of looking.
        failed_margin: by how much the share of failed answers may be higher.
        latency_factor: by how much the 99th percentile of the time may be longer.
        latency_floor_ms: a 99th percentile below this is never too long.
        age_ms_max: what is undecided by then is taken back.
    """

    users_min: int
    answers_min: int
    margin: float
    alpha: float
    failed_margin: float
    latency_factor: float
    latency_floor_ms: float
    age_ms_max: float


@dataclass
class ArmFigures:
    """What one arm's answers came to.

    Attributes:
        num_answers: made by a model, or failed to be.
        num_failed: of those, by no model, or not by the arm's own version.
        took_ms: how long each took.
        hits: by user, (answers that the user's next events were in, answers that events followed).
    """

    num_answers: int = 0
    num_failed: int = 0
    took_ms: list[float] = field(default_factory=list)
    hits: dict[int, tuple[int, int]] = field(default_factory=dict)

    @property
    def failed_share(self) -> float:
        """Share of answers that failed."""
        return self.num_failed / max(1, self.num_answers)

    @property
    def p99_ms(self) -> float:
        """The 99th percentile of the time an answer took."""
        return float(np.percentile(self.took_ms, 99)) if self.took_ms else 0.0

    @property
    def hit_rate(self) -> float:
        """The users' shares of hits, averaged over users."""
        rates = self.rates()
        return sum(rates.values()) / max(1, len(rates))

    def rates(self) -> dict[int, float]:
        """Return each user's share of hits."""
        return {user: hit / followed for user, (hit, followed) in self.hits.items()}


class Bounds(NamedTuple):
    """Between what the difference of two shares lies; the tried version's less the live one's."""

    low: float
    high: float


def decide(rules: Rules, control: ArmFigures, tried: ArmFigures, *, age_ms: float) -> Verdict:
    """Return what to do with a canary that has run for `age_ms`.

    First what is broken (failures, then slowness), then what is worse or good enough, then time.
    """
    if min(tried.num_answers, control.num_answers) >= FAILED_ANSWERS_MIN:
        allowed = control.failed_share + rules.failed_margin
        if tried.failed_share > allowed:
            return Verdict(
                Decision.TAKE_BACK,
                f"{tried.failed_share:.1%} of its answers failed, {allowed:.1%} are allowed",
            )
    has_answers = min(tried.num_answers, control.num_answers) >= rules.answers_min
    if has_answers:
        slowest_ms = max(rules.latency_floor_ms, control.p99_ms * rules.latency_factor)
        if tried.p99_ms > slowest_ms:
            return Verdict(
                Decision.TAKE_BACK,
                f"p99 {tried.p99_ms:.1f} ms, {slowest_ms:.1f} ms are allowed",
            )
    has_users = min(len(tried.hits), len(control.hits)) >= rules.users_min
    if has_answers and has_users:
        bounds = difference(control.rates(), tried.rates(), rules)
        said = f"hits {tried.hit_rate:.2%} against {control.hit_rate:.2%}, difference between "
        said += f"{bounds.low:+.2%} and {bounds.high:+.2%}"
        if bounds.high < 0:
            return Verdict(Decision.TAKE_BACK, f"worse: {said}")
        if bounds.low > -rules.margin:
            return Verdict(Decision.PROMOTE, f"good enough: {said}, margin {rules.margin:.2%}")
        undecided = said
    else:
        undecided = (
            f"{tried.num_answers:,} and {control.num_answers:,} answers of {rules.answers_min:,}, "
            f"{len(tried.hits):,} and {len(control.hits):,} users with events after them of "
            f"{rules.users_min:,}"
        )
    if age_ms > rules.age_ms_max:
        return Verdict(Decision.TAKE_BACK, f"undecided for too long: {undecided}")
    return Verdict(Decision.GO_ON, undecided)


def difference(control: Mapping[int, float], tried: Mapping[int, float], rules: Rules) -> Bounds:
    """Return bounds of the difference of the means that hold at all times of looking at once.

    Users who are in both (a shadow's) are compared with themselves.
    """
    both = control.keys() & tried.keys()
    if len(both) >= rules.users_min:
        pairs = np.array([tried[user] - control[user] for user in sorted(both)])
        size, mean, variance = pairs.size, float(pairs.mean()), _variance(pairs)
    else:
        ours, theirs = (np.array(sorted(arm.values())) for arm in (tried, control))
        size = min(ours.size, theirs.size)
        mean = float(ours.mean() - theirs.mean())
        variance = size * (_variance(ours) / ours.size + _variance(theirs) / theirs.size)
    half = math.sqrt(variance) * _half_width(size, rules)
    return Bounds(mean - half, mean + half)


def _variance(values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> float:
    """Return the variance, as if one more user had been half a hit off the mean."""
    return (float(values.var()) * values.size + _VARIANCE_FLOOR) / (values.size + 1)


def _half_width(size: int, rules: Rules) -> float:
    """Return half the width of the sequence at a size, for values of variance 1.

    Narrowest near `users_min`, where it is first looked at.
    """
    wide = -2 * math.log(rules.alpha)
    rho2 = (wide + math.log(wide) + 1) / rules.users_min if wide > 1 else 1 / rules.users_min
    grown = size * rho2 + 1
    return math.sqrt(2 * grown / (size**2 * rho2) * math.log(math.sqrt(grown) / rules.alpha))
