"""Trains and asks every rival in one way.

All neural models learn from the same labels with the same seconds, batch size and number of targets
a label, start at the same item vectors, and are stopped by the same judge: NDCG@10 on the tuning
window, the best weights kept. Item scorers share their negatives (models/sequence.py); the
generative models need none, because each level of their ids is normalised over all its codes.

Legend: G labels, V items a model knows, E width of an item vector.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from torch import Tensor

from features.sources import HOUR_MS
from trainer.baselines import (
    DECAY,
    DECAY_WINDOW,
    Float64s,
    ScoredRanker,
    co_occurrence,
    lists_of,
    own_recency,
    own_shares,
    popularity,
    recent_popularity,
)
from trainer.batches import NUM_TARGETS, Batch, BatchSource, LabelExamples, in_order
from trainer.blend import blended, calibrated, met_lowered, target_shares
from trainer.calibration import MET_FACTORS, calibrate
from trainer.counted import LiveSources
from trainer.dataset import LabelGroups, newest
from trainer.evaluate import BATCH_GROUPS, Ranker
from trainer.heads_first import learn_heads
from trainer.item_vectors import co_occurrence_vectors, with_domains
from trainer.loop import CLOCKS, Fitted, Learner, LoopConfig, Stage, fit, prepare_torch
from trainer.models.config import GemsConfig
from trainer.models.gems import Gems
from trainer.models.gru4rec import Gru4Rec
from trainer.models.hstu import Hstu
from trainer.models.sasrec import SasRec
from trainer.models.sequence import SequenceConfig, SequenceModel
from trainer.models.tiger import Tiger
from trainer.protocols import Task
from trainer.rankers import Naming, gems_ranker, reading_of, sequence_ranker
from trainer.rivals import RIVALS, Rival
from trainer.semantic_ids import CODE_SIZES, learn_semantic_ids
from trainer.served import Served
from trainer.streaming_evaluation import (
    CUTS,
    LIST_LENGTH,
    STREAMS,
    Targets,
    gains,
    places,
    rank_all,
)
from trainer.train import GemsLearner, TrainConfig, new_model, training_stages
from trainer.vocabulary import Vocabulary, item_counts

SEQUENCE_MODELS: dict[str, type[SequenceModel]] = {
    "gru4rec": Gru4Rec,
    "sasrec": SasRec,
    "hstu": Hstu,
}
# Labels whose streams are looked at for the share that each stream has in a decision.
CONTRIBUTION_LABELS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """What every neural model gets, and no more.

    Attributes:
        seconds: Of a processor, for the training loop, judging included, so that what else the
            machine does takes little from anybody. Vectors and semantic ids come before.
        label_share: Share of the labels that is learned from, the newest.
        labels_per_epoch: Labels of one pass, drawn by seed: with many users a pass would not end.
    """

    seconds: float = 200.0
    epochs: float = 30.0
    label_share: float = 0.4
    labels_per_epoch: int = 60_000
    num_targets: int = NUM_TARGETS
    examples_per_batch: int = 32
    judge_every_steps: int = 200
    patience: int = 4
    num_threads: int = 1

    def loop(self, seed: int) -> LoopConfig:
        """The training loop's settings."""
        return LoopConfig(
            epochs=self.epochs,
            budget_s=self.seconds,
            budget_clock="processor",
            examples_per_batch=self.examples_per_batch,
            seed=seed,
            num_threads=self.num_threads,
            judge_every_steps=self.judge_every_steps,
            patience=self.patience,
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A ranking that is ready to be judged.

    Attributes:
        scored: Its lists with probabilities; None for rankings that have none.
        fitted: How training went; None where nothing was trained.
        contribution: Mean share of each stream in what GEMs' decoder changed.
        weights: Of the sources of a blend; of what is served, at the mean of the tuning window.
        model: The trained one, where it can be served.
    """

    rank: Ranker
    scored: ScoredRanker | None = None
    fitted: Fitted | None = None
    contribution: list[float] | None = None
    weights: dict[str, float] | None = None
    model: Gems | None = None


@dataclass(frozen=True, slots=True)
class Contest:
    """One task, and what all rivals have in common.

    Attributes:
        catalogue: Every item of the log; rankings name items by it.
        vocabulary: The items that weights may know.
        labels: What is learned from.
        live: What live sources said at any time of the log.
        entered: What has been trained already; a blend takes its model from it.
    """

    task: Task
    catalogue: Vocabulary
    vocabulary: Vocabulary
    source: BatchSource
    labels: LabelGroups
    live: LiveSources
    repeats: bool
    budget: Budget
    seed: int
    entered: dict[str, Entry] = field(default_factory=dict)

    @classmethod
    def of(cls, task: Task, *, repeats: bool, half_life_ms: int, budget: Budget, seed: int) -> Self:
        """Prepare a task."""
        catalogue = Vocabulary.of(task.log, split_ms=int(task.log.event_time_ms_N.max()))
        labels = newest(task.learn, share=budget.label_share)
        rng = np.random.default_rng(seed)
        drawn = np.sort(rng.permutation(len(labels))[: budget.labels_per_epoch])
        return cls(
            task=task,
            catalogue=catalogue,
            vocabulary=Vocabulary.of(task.fitted, split_ms=int(task.fitted.event_time_ms_N.max())),
            source=BatchSource.of(task.log, catalogue, num_recent=STREAMS, num_mid=0),
            labels=labels.select(drawn),
            live=LiveSources.of(task.log, half_life_h=max(1, half_life_ms // HOUR_MS)),
            repeats=repeats,
            budget=budget,
            seed=seed,
        )

    def enter(self, name: str) -> Entry:
        """Get a rival ready, once; neural ones are trained."""
        if name not in self.entered:
            self.entered[name] = self._entry(RIVALS[name])
        return self.entered[name]

    def _entry(self, rival: Rival) -> Entry:
        if rival.kind == "free":
            return self._free(rival.base)
        if rival.kind == "blend":
            return self._blend(rival)
        if rival.kind == "served":
            return self._served(rival)
        prepare_torch(self.budget.loop(self.seed))
        if rival.kind == "sequence":
            return self._sequence(rival)
        return self._tiger(rival) if rival.kind == "tiger" else self._gems(rival)

    def _free(self, base: str) -> Entry:
        source, k = self.source, LIST_LENGTH
        if base == "popularity":
            return Entry(popularity(source, k=k, repeats=self.repeats))
        if base == "own_recency":
            return Entry(own_recency(source, k=k))
        scored: dict[str, Callable[[], ScoredRanker]] = {
            "recent_popularity": lambda: recent_popularity(
                source, self.live, k=k, repeats=self.repeats
            ),
            "own_frequency": lambda: own_shares(source, window=DECAY_WINDOW, decay=DECAY, k=k),
            "co_occurrence": lambda: co_occurrence(source, self.live, k=k, repeats=self.repeats),
        }
        rank = scored[base]()
        return Entry(lists_of(rank), rank)

    def _blend(self, rival: Rival) -> Entry:
        """Mix the sources that name single items; own items count only where items repeat."""
        names = [name for name in rival.sources if self.repeats or not name.startswith("own_")]
        entries = [self.enter(name) for name in names]
        sources = [entry.scored for entry in entries if entry.scored is not None]
        assert len(sources) == len(entries), "every source of a blend has shares"
        tune = self.task.tune
        targets = Targets.of(self.source, tune)
        parts = list(in_order(tune, size=BATCH_GROUPS))
        share_SE = []
        for source in sources:
            items, shares = zip(*(source(part) for part in parts), strict=True)
            scored = np.concatenate(items), np.concatenate(shares)
            share_SE.append(target_shares(scored, targets.group_E, targets.item_E))
        weight_S = calibrated(np.stack(share_SE, axis=1))
        named = dict(zip(names, sources, strict=True))
        rank = self._best_lowered(named, weight_S, parts, targets)
        weights = {name: round(float(one), 4) for name, one in zip(names, weight_S, strict=True)}
        return Entry(lists_of(rank), rank, weights=weights)

    def _best_lowered(
        self,
        sources: dict[str, ScoredRanker],
        weight_S: Float64s,
        parts: list[LabelGroups],
        targets: Targets,
    ) -> ScoredRanker:
        """The blend that ranks the tuning window best, out of a few factors for what was met.

        As in the mixture that is served: what is counted of all users is lowered where the user met
        the item, what is counted of the user alone is not. `parts` are the window's labels.
        """

        def with_factor(factor: float) -> ScoredRanker:
            changed = [
                one if name.startswith("own_") else met_lowered(one, self.source, factor)
                for name, one in sources.items()
            ]
            return blended(changed, weight_S)

        def ndcg10(rank: ScoredRanker) -> float:
            ranked_GK = np.concatenate([rank(part)[0] for part in parts])
            return float(gains(places(targets, ranked_GK), cut=10).mean())

        return max((with_factor(factor) for factor in MET_FACTORS), key=ndcg10)

    def _served(self, rival: Rival) -> Entry:
        """Put the live sources beside a model that is trained once for all who serve it."""
        alone = self.enter(rival.sources[0])
        assert alone.model is not None, "only GEMs is served"
        served = Served(
            alone.model,
            self.vocabulary,
            self._gems_source(alone.model.config),
            self.live,
            repeats=self.repeats,
        )
        gate = calibrate(served, self.task.calibrate, by_facts=rival.base == "by_facts")
        rank = served.ranker(gate, self.catalogue)
        weight_W = gate.bias_W.detach().softmax(dim=0).tolist()
        weights = {name: round(one, 4) for name, one in zip(rival.sources, weight_W, strict=True)}
        return dataclasses.replace(alone, rank=lists_of(rank), scored=rank, weights=weights)

    def _sequence(self, rival: Rival) -> Entry:
        config = SequenceConfig(num_events=rival.window)
        model = SEQUENCE_MODELS[rival.base](
            config, item_vectors_VE=self._vectors(), item_counts_V=self._counts()
        )
        source = self._window(rival.window)
        scored = sequence_ranker(model, source, self._naming())
        return Entry(lists_of(scored), scored, self._fit(model, source, scored, rival.base))

    def _tiger(self, rival: Rival) -> Entry:
        vectors = self._vectors()
        described = with_domains(vectors, self.task.fitted, self.vocabulary)
        model = Tiger(
            GemsConfig(num_recent=rival.window),
            learn_semantic_ids(described, sizes=CODE_SIZES, seed=self.seed),
            item_vectors_VE=vectors,
            item_counts_V=self._counts(),
        )
        source = self._window(rival.window)
        scored = gems_ranker(model, source, self._naming())
        fitted = self._fit(GemsLearner(model), source, scored, rival.base)
        return Entry(lists_of(scored), scored, fitted)

    def _gems(self, rival: Rival) -> Entry:
        config = dataclasses.replace(GemsConfig(), **rival.changes)  # type: ignore[arg-type]
        settings = TrainConfig(
            model=config, num_targets=self.budget.num_targets, loop=self.budget.loop(self.seed)
        )
        model = new_model(
            self.task.fitted,
            self.vocabulary,
            settings,
            tables_ms=int(self.task.fitted.event_time_ms_N.max()),
        )
        source = self._gems_source(model.config)
        scored = gems_ranker(model, source, self._naming())
        fitted = self._fit(
            GemsLearner(model),
            source,
            scored,
            rival.base,
            stages=training_stages(model),
            spent_s=self._heads_first(model, source),
        )
        return Entry(
            lists_of(scored), scored, fitted, self._contribution(model, source), model=model
        )

    def _heads_first(self, model: Gems, source: BatchSource) -> float:
        """Have the heads learn that learn first; return the seconds of the budget they took."""
        loop = self.budget.loop(self.seed)
        clock = CLOCKS[loop.budget_clock]
        started = clock()
        learn_heads(model, LabelExamples(source, self.labels, self.budget.num_targets), loop)
        return clock() - started

    def _fit(
        self,
        learner: Learner[Batch],
        source: BatchSource,
        scored: ScoredRanker,
        name: str,
        *,
        stages: Sequence[Stage] = (),
        spent_s: float = 0.0,
    ) -> Fitted:
        """Train until the budget is spent or the tuning window sees no progress."""
        targets = Targets.of(self.source, self.task.tune)

        def judge() -> float:
            ranked = rank_all(source, self.task.tune, lists_of(scored), name="tuning")
            return float(gains(places(targets, ranked), cut=CUTS[0]).mean())

        return fit(
            learner,
            LabelExamples(source, self.labels, self.budget.num_targets),
            self.budget.loop(self.seed),
            name=name,
            stages=stages,
            judge=judge,
            spent_s=spent_s,
        )

    def _contribution(self, model: Gems, source: BatchSource) -> list[float]:
        some = self.task.live.select(slice(CONTRIBUTION_LABELS))
        with torch.inference_mode():
            share_B3 = reading_of(model, source, some).contribution_B3
        return [round(one, 4) for one in share_B3.mean(dim=0).tolist()]

    def _gems_source(self, config: GemsConfig) -> BatchSource:
        return BatchSource.of(
            self.task.log,
            self.vocabulary,
            num_recent=config.num_recent,
            num_mid=config.num_mid,
            num_older=config.num_older_read,
        )

    def _window(self, num_events: int) -> BatchSource:
        # A source always has a mid-term stream of one event, which counts here.
        return BatchSource.of(self.task.log, self.vocabulary, num_recent=num_events - 1, num_mid=1)

    def _naming(self) -> Naming:
        return Naming.of(self.catalogue, self.vocabulary, repeats=self.repeats)

    def _vectors(self) -> Tensor:
        fitted = self.task.fitted
        until_ms = int(fitted.event_time_ms_N.max())
        return co_occurrence_vectors(fitted, self.vocabulary, split_ms=until_ms, seed=self.seed)

    def _counts(self) -> Tensor:
        fitted = self.task.fitted
        until_ms = int(fitted.event_time_ms_N.max())
        return torch.from_numpy(item_counts(fitted, self.vocabulary, until_ms=until_ms))
