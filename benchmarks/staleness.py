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
from trainer.contest import Budget, Contest, Entry
from trainer.dataset import label_groups, training_groups
from trainer.protocols import Task, rows_of
from trainer.rankers import Naming, gems_ranker
from trainer.served import Served
from trainer.streaming_evaluation import Targets, places, rank_all, rank_frozen
from trainer.train import TrainConfig, gems_source, train
from trainer.training_state import WarmState, read_state, save_state
from trainer.warm_start import warm_train

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.staleness_protocol import Protocol
    from trainer.dataset import EventLog, LabelGroups
    from trainer.train import Trained

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
        _judge_moment(ground, arm, moments[place], states.trained_at(moments, place))


def _judge_moment(ground: Ground, arm: str, moment_ms: int, state: WarmState) -> None:
    entry = entry_of(ground, state)
    labels = ground.interval(arm, moment_ms)
    found = ground.judged(entry, labels, moment_ms, f"{arm} {ground.path(arm, moment_ms).stem}")
    weights = state.gate.bias_W.detach().softmax(dim=0).tolist()
    facts = {
        "items": state.vocabulary.num_items,
        # Of the model and of each live source where every fact is at its mean.
        "weights": [round(one, 4) for one in weights],
    }
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

    def trained_at(self, moments: list[int], place: int) -> WarmState:
        """The arm's model as trained at a moment."""
        moment_ms = moments[place]
        if place == 0:
            return self._base()
        assert self.state is not None, "place_to_begin found a state"
        if self.state.split_ms + 1 != moment_ms:
            config = self.ground.protocol.training(self.ground.protocol.seconds(self.arm))
            self._train(self.arm, self.state, config, moment_ms)
            self.state = self._kept(self.arm)
        assert self.state is not None
        return self.state

    def _base(self) -> WarmState:
        """What all arms begin with; trained once."""
        if self._kept("base") is None:
            config = self.ground.protocol.training(self.ground.protocol.seconds("daily"))
            first = WarmState.of(first_training(self.ground))
            self._train("base", first, config, self.ground.protocol.split_ms)
        self.state = self._kept("base")
        assert self.state is not None
        return self.state

    def _train(self, name: str, state: WarmState, config: TrainConfig, moment_ms: int) -> None:
        trained = trained_on(self.ground, state, config, moment_ms)
        new = self.folder / "new"
        new.mkdir(parents=True, exist_ok=True)
        save_state(trained, new).replace(self._path(name))

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}-{self.ground.key}"

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


def entry_of(ground: Ground, state: WarmState) -> Entry:
    """A model as it is served: by its gate beside the live sources, or alone."""
    source = gems_source(ground.log, state.vocabulary, state.config.model)
    catalogue = ground.contest.catalogue
    if ground.protocol.served == "gems_no_sources":
        alone = gems_ranker(
            state.model, source, Naming.of(catalogue, state.vocabulary, repeats=True)
        )
        return Entry(lists_of(alone), alone)
    mixture = Served(state.model, state.vocabulary, source, ground.contest.live)
    ranked = mixture.ranker(state.gate, catalogue)
    return Entry(lists_of(ranked), ranked)
