"""What bench_staleness.py measures: arms that train at moments, and answer until the next one.

Every number of a moment is made from events before it, or, with live state, before the label that
is ranked. One file an arm and moment keeps the place of each judged event, so that a run that was
stopped goes on; the newest state of an arm's model is kept beside them.

Legend: G labels, E events of the labels.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from benchmarks.common import CONSOLE
from benchmarks.staleness_protocol import ARMS, between, judged_labels, sampled
from features.history import labels_at
from trainer.baselines import lists_of
from trainer.batches import in_order
from trainer.blend import blended, calibrated, target_shares
from trainer.contest import Budget, Contest, Entry
from trainer.dataset import label_groups, training_groups
from trainer.evaluate import BATCH_GROUPS, held_out_groups
from trainer.protocols import Task, rows_of
from trainer.rankers import Naming, gems_ranker
from trainer.streaming_evaluation import Targets, places, rank_all, rank_frozen
from trainer.train import TrainConfig, gems_source, train
from trainer.training_state import WarmState, read_state, save_state
from trainer.warm_start import warm_train

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.staleness_protocol import Protocol
    from trainer.baselines import ScoredRanker
    from trainer.dataset import EventLog, LabelGroups
    from trainer.train import Trained

# Of the model and of each of REFERENCES; None where the model answers alone.
Weights = list[float] | None

# Rankings that need no model, and how often their frozen state is renewed: as an arm's.
REFERENCES: Final = ("recent_popularity", "co_occurrence")


@dataclass(frozen=True)
class Ground:
    """A sampled log, what is judged on it, and where results are kept."""

    protocol: Protocol
    log: EventLog
    labels: LabelGroups
    contest: Contest
    folder: Path

    @classmethod
    def of(cls, log: EventLog, protocol: Protocol, folder: Path) -> Ground:
        """Draw users and labels."""
        log = sampled(log, protocol)
        groups = label_groups(log)
        labels = judged_labels(log, protocol)
        known = rows_of(log, log.event_time_ms_N < protocol.split_ms)
        task = Task(
            log=log,
            fitted=known,
            learn=training_groups(log, groups, split_ms=protocol.split_ms - 1),
            tune=groups.select(slice(0)),
            calibrate=groups.select(slice(0)),
            live=labels,
            frozen=None,
            split_ms=protocol.split_ms,
        )
        contest = Contest.of(
            task,
            repeats=True,
            half_life_ms=protocol.half_life_ms,
            budget=Budget(),
            seed=protocol.seed,
        )
        return cls(protocol, log, labels, contest, folder / protocol.served)

    def path(self, arm: str, moment_ms: int) -> Path:
        """Where the places of an arm's interval are kept."""
        hour = np.datetime64(moment_ms, "ms").astype("datetime64[h]")
        return self.folder / f"{arm}-{hour}.json"

    def found(self, arm: str, moment_ms: int) -> dict[str, Any] | None:
        """The result of an interval, if one was made of the same protocol and log."""
        path = self.path(arm, moment_ms)
        if not path.is_file():
            return None
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return result if result["key"] == self.key else None

    @property
    def key(self) -> str:
        """Names protocol and log."""
        return f"{self.protocol.key}-{self.log.num_events}"

    def write(self, arm: str, moment_ms: int, result: dict[str, Any]) -> None:
        """Keep a result, whole or not at all."""
        path = self.path(arm, moment_ms)
        path.parent.mkdir(parents=True, exist_ok=True)
        new = path.with_suffix(".new")
        new.write_text(json.dumps({"key": self.key, **result}) + "\n", encoding="utf-8")
        new.replace(path)

    def interval(self, arm: str, moment_ms: int) -> LabelGroups:
        """The judged labels that an arm answers with what it trained at a moment."""
        later = [one for one in self.protocol.moments(arm) if one > moment_ms]
        end_ms = later[0] if later else self.protocol.end_ms
        return self.labels.select(between(self.labels, moment_ms, end_ms))

    def judged(
        self, entry: Entry, labels: LabelGroups, moment_ms: int, name: str
    ) -> dict[str, Any]:
        """Places of the events of some labels, with live state and with that of the moment."""
        if len(labels) == 0:
            return {"live": [], "frozen": []}
        targets = Targets.of(self.contest.source, labels)
        frozen = labels_at(
            self.log, self.log.user_ids_U[labels.user_G], np.full(len(labels), moment_ms)
        )
        source = self.contest.source
        live_GK = rank_all(source, labels, entry.rank, name=f"{name}, live")
        frozen_GK = rank_frozen(source, frozen, entry.rank, name=f"{name}, frozen")
        return {
            "live": places(targets, live_GK).tolist(),
            "frozen": places(targets, frozen_GK).tolist(),
        }


def run_references(ground: Ground) -> None:
    """Judge what needs no model, its frozen state renewed at the moments of each arm."""
    for name in REFERENCES:
        entry = ground.contest.enter(name)
        for arm in ARMS:
            for moment_ms in ground.protocol.moments(arm):
                kept_as = f"{name}-{arm}"
                if ground.found(kept_as, moment_ms) is None:
                    labels = ground.interval(arm, moment_ms)
                    found = ground.judged(entry, labels, moment_ms, kept_as)
                    ground.write(kept_as, moment_ms, found)


def run_arm(ground: Ground, arm: str) -> None:
    """Train an arm at each of its moments, and judge it until the next."""
    moments = ground.protocol.moments(arm)
    missing = [place for place, one in enumerate(moments) if ground.found(arm, one) is None]
    if not missing:
        CONSOLE.print(f"{arm}: there already")
        return
    states = _States(ground, arm)
    begin = states.place_to_begin(moments, missing[0])
    for place in range(begin, len(moments)):
        state, weights = states.trained_at(moments, place)
        _judge_moment(ground, arm, moments[place], state, weights)


def _judge_moment(
    ground: Ground, arm: str, moment_ms: int, state: WarmState, weights: Weights
) -> None:
    entry = entry_of(ground, state, weights)
    labels = ground.interval(arm, moment_ms)
    found = ground.judged(entry, labels, moment_ms, f"{arm} {ground.path(arm, moment_ms).stem}")
    facts = {"items": state.vocabulary.num_items, "weights": weights}
    ground.write(arm, moment_ms, {**facts, **found})
    CONSOLE.print(f"{ground.path(arm, moment_ms).stem}: {len(labels)} labels judged, {facts}")


class _States:
    """The newest model of an arm, on disk as well: what a run that was stopped goes on from."""

    def __init__(self, ground: Ground, arm: str) -> None:
        self.ground = ground
        self.arm = arm
        self.folder = ground.folder / "states"
        self.state = self._kept(arm)

    def place_to_begin(self, moments: list[int], missing: int) -> int:
        """The moment to go on at: the first without a result, or the very first without a state."""
        if missing == 0 or self.state is None:
            return 0
        known_ms = self.state.split_ms + 1
        return missing if known_ms in moments[missing - 1 : missing + 1] else 0

    def trained_at(self, moments: list[int], place: int) -> tuple[WarmState, Weights]:
        """The arm's model as trained at a moment, and the weights it is mixed with."""
        moment_ms = moments[place]
        if place == 0:
            return self._base()
        assert self.state is not None, "place_to_begin found a state"
        if self.state.split_ms + 1 != moment_ms:
            config = self.ground.protocol.training(self.ground.protocol.seconds(self.arm))
            self._train(self.arm, self.state, config, moment_ms)
            self.state = self._kept(self.arm)
        assert self.state is not None
        return self.state, self._weights(self.arm, moment_ms)

    def _base(self) -> tuple[WarmState, Weights]:
        """What all arms begin with; trained once."""
        split_ms = self.ground.protocol.split_ms
        if self._kept("base") is None:
            config = self.ground.protocol.training(self.ground.protocol.seconds("daily"))
            self._train("base", WarmState.of(first_training(self.ground)), config, split_ms)
        self.state = self._kept("base")
        assert self.state is not None
        return self.state, self._weights("base", split_ms)

    def _train(self, name: str, state: WarmState, config: TrainConfig, moment_ms: int) -> None:
        """Weigh by what the model before did in its time, then train; both are kept."""
        weights = weights_of(self.ground, state, moment_ms)
        trained = trained_on(self.ground, state, config, moment_ms)
        new = self.folder / "new"
        new.mkdir(parents=True, exist_ok=True)
        kept = {"moment_ms": moment_ms, "weights": weights}
        self._path(name, ".json").write_text(json.dumps(kept), encoding="utf-8")
        save_state(trained, new).replace(self._path(name))

    def _weights(self, name: str, moment_ms: int) -> Weights:
        kept = json.loads(self._path(name, ".json").read_text(encoding="utf-8"))
        assert kept["moment_ms"] == moment_ms, "weights are written before the state"
        weights: Weights = kept["weights"]
        return weights

    def _path(self, name: str, suffix: str = "") -> Path:
        return self.folder / f"{name}-{self.ground.key}{suffix}"

    def _kept(self, name: str) -> WarmState | None:
        path = self._path(name)
        return read_state(path) if path.is_file() else None


def first_training(ground: Ground) -> Trained:
    """From nothing, on all events until a window before the split.

    The window itself is learned at the split, as at every later moment: what all arms begin with is
    of the same kind as what comes later, and has been weighed in the same way.
    """
    protocol = ground.protocol
    known = rows_of(ground.log, ground.log.event_time_ms_N < protocol.split_ms - protocol.window_ms)
    trained = train(known, protocol.training(protocol.first_s))
    return dataclasses.replace(trained, split_ms=protocol.split_ms - protocol.window_ms - 1)


def trained_on(ground: Ground, state: WarmState, config: TrainConfig, moment_ms: int) -> Trained:
    """A training at a moment, on the newest labels before it; it sees nothing else."""
    known = rows_of(ground.log, ground.log.event_time_ms_N < moment_ms)
    return warm_train(
        known,
        state,
        config,
        until_ms=moment_ms - 1,
        from_ms=moment_ms - ground.protocol.window_ms,
        half_life_ms=ground.protocol.prior_half_life_ms,
    )


def model_alone(ground: Ground, state: WarmState) -> ScoredRanker:
    """The ranking of a model, whatever the time of a label."""
    source = gems_source(ground.log, state.vocabulary, state.config.model)
    naming = Naming.of(ground.contest.catalogue, state.vocabulary, repeats=True)
    return gems_ranker(state.model, source, naming)


def mixed_sources(ground: Ground, state: WarmState) -> list[ScoredRanker]:
    """The model and the rankings without a model, in the order of their weights."""
    scored = [ground.contest.enter(name).scored for name in REFERENCES]
    return [model_alone(ground, state), *(one for one in scored if one is not None)]


def entry_of(ground: Ground, state: WarmState, weights: Weights) -> Entry:
    """A model as it is served."""
    if weights is None:
        alone = model_alone(ground, state)
        return Entry(lists_of(alone), alone)
    mixed = blended(mixed_sources(ground, state), np.array(weights))
    return Entry(lists_of(mixed), mixed)


def weights_of(ground: Ground, state: WarmState, moment_ms: int) -> Weights:
    """The weights under which what came between a training and a moment was likeliest.

    A model is worth most in the minute it is trained. Weights fitted there would trust it too much
    for as long as it is served; those of its whole time are what the next one is served with.
    """
    if ground.protocol.served == "gems_no_sources":
        return None
    groups = label_groups(ground.log)
    begin_ms = state.split_ms + 1
    window = groups.select(between(groups, begin_ms, moment_ms))
    sources = mixed_sources(ground, state)
    if len(window) == 0:
        return [1.0 / len(sources)] * len(sources)
    tune = held_out_groups(
        ground.log,
        window,
        split_ms=begin_ms - 1,
        seed=ground.protocol.seed,
        max_users=ground.protocol.calibration_users,
        max_groups_per_user=ground.protocol.labels_per_day,
    )
    targets = Targets.of(ground.contest.source, tune)
    parts = list(in_order(tune, size=BATCH_GROUPS))
    share_SE = []
    for source in sources:
        items, shares = zip(*(source(part) for part in parts), strict=True)
        scored = np.concatenate(items), np.concatenate(shares)
        share_SE.append(target_shares(scored, targets.group_E, targets.item_E))
    return [round(float(one), 4) for one in calibrated(np.stack(share_SE, axis=1))]
