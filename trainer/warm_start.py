"""Training that goes on where an earlier one ended, so that a new version costs seconds.

What stays: the compressor with its tables, and with them the memory version, so that nobody's
lifelong memory has to be made anew; the semantic id and, where vectors are frozen, the vector of
every item known before; the sizes of the model; how the live sources are weighed against one
another. What changes: items that came since join (new_items.py), priors start from the counts of
the new window, the other weights learn on, and the model is weighed against the sources by what its
predecessor did in service (gate_since). Items that nobody meets any more keep their place, and
domains that came since stay unknown, until a training from the start drops or learns them. The
optimiser starts anew.
"""

import hashlib
from dataclasses import fields, replace
from functools import partial
from pathlib import Path

from trainer.batches import LabelExamples
from trainer.calibration import are_enough, reweighed
from trainer.counted import LiveSources
from trainer.dataset import (
    EventLog,
    LabelGroups,
    label_groups,
    newest,
    split_time_ms,
    training_groups,
)
from trainer.errors import EmptyWindowError, ExportError, WarmStartError
from trainer.export import MANIFEST_FILE, read_manifest, sha256_of
from trainer.loop import CLOCKS, NO_OUTPUTS, Outputs, Stage, fit, prepare_torch
from trainer.models.gems import Gems
from trainer.models.indexer import DISTIL, TOP_K
from trainer.models.sources import SourceGate
from trainer.new_items import extended, renew_priors, window_counts
from trainer.served import Served
from trainer.train import (
    STAGE_BEGINS,
    GemsLearner,
    TrainConfig,
    Trained,
    calibration_groups,
    data_key,
    gems_source,
    refuse_no_step,
)
from trainer.training_state import STATE_FILE, WarmState, read_state, save_state

__all__ = ["STATE_FILE", "WarmState", "load_state", "save_state", "warm_train"]


def load_state(package: Path) -> WarmState:
    """What the training of a package left.

    Raises:
        ExportError: The package has none, or its file is damaged.
    """
    manifest = read_manifest(package / MANIFEST_FILE)
    path, expected = package / STATE_FILE, manifest.get("training_files", {}).get(STATE_FILE)
    if expected is None or not path.is_file():
        raise ExportError(
            f"{package} has no {STATE_FILE}, which a training goes on from: a published version "
            "leaves it behind, and packages of older Movelines lack it; name a package of the "
            "models folder, or train from the start: moveline train"
        )
    actual = sha256_of(path)
    if actual != expected:
        raise ExportError(
            f"{path} has hash {actual}, the manifest says {expected}; name another package, or "
            "train from the start: moveline train"
        )
    return read_state(path)


def warm_train(
    log: EventLog,
    state: WarmState,
    config: TrainConfig,
    outputs: Outputs = NO_OUTPUTS,
    *,
    until_ms: int | None = None,
    from_ms: int | None = None,
    half_life_ms: int | None = None,
) -> Trained:
    """A model that goes on from `state`, which stays as it is, on the newest labels of a log.

    Args:
        log: The events; items that first come in it join the vocabulary.
        state: Of the earlier training.
        config: How long and how; the sizes of the model must be those of `state`.
        outputs: Where the run leaves its traces.
        until_ms: Nothing later is learned from; by `config.train_quantile` if left out.
        from_ms: Labels from then on are learned from, and priors count events from then on. Left
            out, the newest `config.label_share` of the labels, and all events.
        half_life_ms: When all is learned, priors go over to the counts of the end: an event of so
            long ago counts half. Left out, they stay with the counts of the window.

    Raises:
        WarmStartError: The model would have other sizes.
        EmptyWindowError: There is nothing to learn from.
        VocabularyError: New items do not fit the semantic ids.
        DivergedError: The loss is not finite.
        BudgetError: The budget does not reach the first step.
        DeviceError: There is no such device.
        CheckpointError: The checkpoint belongs to another run, or is damaged.
    """
    clock = CLOCKS[config.loop.budget_clock]
    started = clock()
    config = _as_settled(state, config)
    _refuse_other_sizes(state, config)
    prepare_torch(config.loop)
    if until_ms is None:
        until_ms = split_time_ms(log, quantile=config.train_quantile)
    groups = label_groups(log)
    learnable = _learnable(log, groups, config, until_ms=until_ms, from_ms=from_ms)
    known = extended(state, log, until_ms=until_ms, from_ms=from_ms)
    source = gems_source(log, known.vocabulary, config.model)
    fitted = fit(
        GemsLearner(known.model),
        LabelExamples(source, learnable, config.num_targets),
        config.loop,
        name="gems",
        outputs=replace(outputs, data_key=_key(log, state, config, until_ms, from_ms)),
        stages=warm_stages(known.model),
        spent_s=clock() - started,
    )
    refuse_no_step(fitted, config.loop)
    count_V = known.count_V
    if half_life_ms is not None:
        # Not before: the labels are spread over the window, and would teach its mean again.
        count_V = window_counts(log, known.vocabulary, until_ms=until_ms, half_life_ms=half_life_ms)
        renew_priors(known.model, known.count_V, count_V)
    return Trained(
        model=known.model,
        config=config,
        vocabulary=known.vocabulary,
        source=source,
        groups=groups,
        split_ms=until_ms,
        fitted=fitted,
        count_V=count_V,
        domain_V=known.domain_V,
        gate=gate_since(log, state, groups, config, until_ms=until_ms),
    )


def gate_since(
    log: EventLog, state: WarmState, groups: LabelGroups, config: TrainConfig, *, until_ms: int
) -> SourceGate:
    """How much the model is worth beside the live sources, by the labels since the earlier one.

    They are answered by the model of then. A model is worth most in the minute it is trained; what
    was found there would trust it too much for as long as it is served. What its predecessor was
    worth in all its time is what it will be itself, if trainings come evenly.

    Returns:
        The gate of `state`, the odds of its sources against the model multiplied; as it is where
        the labels are too few to tell.
    """
    since = calibration_groups(log, groups, fit_ms=state.split_ms, split_ms=until_ms)
    if not are_enough(since):
        return state.gate
    source = gems_source(log, state.vocabulary, state.config.model)
    live = LiveSources.of(log, half_life_h=config.half_life_h)
    return reweighed(Served(state.model, state.vocabulary, source, live), since, state.gate)


def warm_stages(model: Gems) -> list[Stage]:
    """Attention is full already; the indexer follows it, and takes over at the end as ever."""
    if model.config.used_indexer is None:
        return []
    return [
        Stage(0.0, partial(model.set_stage, DISTIL)),
        Stage(STAGE_BEGINS[-1], partial(model.set_stage, TOP_K)),
    ]


def _learnable(
    log: EventLog,
    groups: LabelGroups,
    config: TrainConfig,
    *,
    until_ms: int,
    from_ms: int | None,
) -> LabelGroups:
    learnable = training_groups(log, groups, split_ms=until_ms)
    if from_ms is None:
        return newest(learnable, share=config.label_share)
    learnable = learnable.select(learnable.time_ms_G >= from_ms)
    if len(learnable) == 0:
        raise EmptyWindowError(
            f"no user has an event with others before it between {from_ms} ms and {until_ms} ms, "
            "so there is nothing to learn from; wait for events, or go further back"
        )
    return learnable


def _as_settled(state: WarmState, config: TrainConfig) -> TrainConfig:
    """What is left to the log was decided by the log of the first training."""
    if config.model.dense != "by_log":
        return config
    return replace(config, model=replace(config.model, dense=state.config.model.dense))


def _refuse_other_sizes(state: WarmState, config: TrainConfig) -> None:
    pairs = [("code_sizes", state.config.code_sizes, config.code_sizes)]
    pairs += [
        (
            f"model.{one.name}",
            getattr(state.config.model, one.name),
            getattr(config.model, one.name),
        )
        for one in fields(config.model)
    ]
    for name, was, wanted in pairs:
        if was != wanted:
            raise WarmStartError(
                f"the model was trained with {name} {was}, this training wants {wanted}; keep it, "
                "or train from the start: moveline train without --warm"
            )


def _key(
    log: EventLog, state: WarmState, config: TrainConfig, until_ms: int, from_ms: int | None
) -> str:
    """Hex digits that also change with the base and the window."""
    digest = hashlib.blake2b(data_key(log, config).encode(), digest_size=16)
    digest.update(repr((state.split_ms, until_ms, from_ms)).encode())
    for tensor in state.model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
