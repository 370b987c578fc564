"""What the result files of one data set and protocol amount to, seeds averaged."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from compose.errors import ComposeError
from trainer.rivals import RIVALS, SINGLE_STREAM
from trainer.streaming_evaluation import Difference, Figures, PerUser, paired_bootstrap

if TYPE_CHECKING:
    from pathlib import Path

SERVED: Final = "gems"
BOOTSTRAP_SEED: Final = 11


class MixedResultsError(ComposeError):
    """Results that do not compare stand side by side."""


@dataclass(frozen=True)
class Outcome:
    """All seeds of one model."""

    model: str
    seeds: list[dict[str, Any]]

    @property
    def note(self) -> str:
        """What the model is."""
        return RIVALS[self.model].note

    def live(self) -> Figures:
        """Mean figures with live state."""
        return mean_figures([seed["live"] for seed in self.seeds])

    def frozen(self) -> Figures | None:
        """Mean figures with the state of the split; None where time is not split."""
        found = [seed["frozen"] for seed in self.seeds]
        return None if found[0] is None else mean_figures(found)

    def long_history(self) -> Figures:
        """Mean figures of labels that know more than the recent stream holds."""
        return mean_figures([seed["long_history"] for seed in self.seeds])

    def bands(self, kind: str) -> dict[str, Figures]:
        """Mean figures by history or by age; `kind` is by_history or by_age."""
        return {
            band: mean_figures([seed[kind][band] for seed in self.seeds])
            for band in self.seeds[0][kind]
        }

    def spread(self) -> float | None:
        """Standard deviation of NDCG@10 over seeds; 0 where nothing is drawn, None for one seed."""
        if RIVALS[self.model].kind == "free":
            return 0.0
        if len(self.seeds) == 1:
            return None
        return round(float(np.std([one["live"]["ndcg10"] for one in self.seeds], ddof=1)), 6)

    def answer_ms(self) -> float:
        """Processor time of one answer, the median of the seeds."""
        return float(np.median([one["answer_ms"] for one in self.seeds]))

    def per_user(self) -> PerUser:
        """Sums per user, averaged over seeds."""
        gains = np.mean([one["per_user"]["ndcg10"] for one in self.seeds], axis=0)
        return PerUser(self.seeds[0]["per_user"]["events"], gains.tolist())


def mean_figures(found: list[Figures]) -> Figures:
    """The mean of each figure; counts are the same in all."""
    return {name: float(np.mean([one[name] for one in found])) for name in found[0]}


def outcomes(folder: Path, set_name: str, protocol: str) -> dict[str, Outcome]:
    """Every model that has results, in the order of the rivals.

    Raises:
        MixedResultsError: Results were made with different settings.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((folder / set_name).glob(f"{protocol}-*-s*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        found.setdefault(result["model"], []).append(result)
    _refuse_mixed(folder / set_name, [one for seeds in found.values() for one in seeds])
    return {name: Outcome(name, found[name]) for name in RIVALS if name in found}


def _refuse_mixed(folder: Path, results: list[dict[str, Any]]) -> None:
    """What is judged must be the same for all, what is trained the same for all that are."""
    common: dict[str, Any] = {}
    for result in results:
        for name in ("revision", "sample", "events", "budget"):
            value = result["settings"][name]
            if value is not None and common.setdefault(name, value) != value:
                raise MixedResultsError(
                    f"{folder}: {result['model']} was measured with {name} {value}, another model "
                    f"with {common[name]}: measure both alike, or delete the files of one"
                )


def difference(one: Outcome, other: Outcome) -> Difference:
    """How much NDCG@10 of one exceeds that of the other, users drawn anew."""
    return paired_bootstrap(one.per_user(), other.per_user(), seed=BOOTSTRAP_SEED)


def relative(one: float, other: float) -> float | None:
    """How much one exceeds the other, as a share of the other; None where that is 0."""
    return round(one / other - 1.0, 4) if other else None


def live_against_frozen(outcome: Outcome) -> float | None:
    """What live state adds to NDCG@10 of frozen state, relative."""
    frozen = outcome.frozen()
    return None if frozen is None else relative(outcome.live()["ndcg10"], frozen["ndcg10"])


def long_history_gain(found: dict[str, Outcome]) -> float | None:
    """What the served model adds to the best single-stream one of the same recent window."""
    rivals = [found[name].long_history()["ndcg10"] for name in SINGLE_STREAM if name in found]
    if SERVED not in found or not rivals:
        return None
    return relative(found[SERVED].long_history()["ndcg10"], max(rivals))


def summary(folder: Path, set_name: str, protocol: str) -> dict[str, Any]:
    """The figures of the last line."""
    found = outcomes(folder, set_name, protocol)
    models = {}
    for name, outcome in found.items():
        live = outcome.live()
        figures = {key: round(live[key], 6) for key in ("hr10", "ndcg10", "recall100")}
        models[name] = {**figures, "spread": outcome.spread()}
    served = found.get(SERVED)
    return {
        "set": set_name,
        "protocol": protocol,
        "models": models,
        "live_vs_frozen_ndcg10": served and live_against_frozen(served),
        "long_history_gain_ndcg10": long_history_gain(found),
    }
