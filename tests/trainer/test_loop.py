"""The loop itself, on a model of one matrix: what it visits, when it ends, what it leaves."""

import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn

from tests.trainer.conftest import small_training
from trainer.batches import PADDING_SHARE_MAX, BatchSource, LabelExamples, length_batches
from trainer.dataset import EventLog, Int64s, label_groups
from trainer.errors import DivergedError, EmptyWindowError
from trainer.loop import Fitted, Learner, LoopConfig, Outputs, Stage, fit, on_device, prepare_torch
from trainer.train import GemsLearner, new_model, train
from trainer.vocabulary import Vocabulary

NUM_EXAMPLES = 50


class Pairs(NamedTuple):
    """Inputs and what is to be said of them."""

    x_BD: Tensor
    y_B: Tensor


class Line(Learner[Pairs]):
    """Least squares; remembers which examples it was shown, in training."""

    def __init__(self, *, gain: float = 1.0, num_targets: int | None = None) -> None:
        super().__init__()
        self.targets = num_targets
        self.weight = nn.Linear(2, 1)
        self.gain = gain
        self.seen: list[int] = []

    def loss(self, batch: Pairs) -> Tensor:
        self.seen += batch.x_BD[:, 0].long().tolist()
        return (
            self.gain
            * (self.weight(batch.x_BD / NUM_EXAMPLES).squeeze(1) - batch.y_B).square().mean()
        )

    def num_targets(self, batch: Pairs) -> int:
        return len(batch.y_B) if self.targets is None else self.targets

    def num_tokens(self, batch: Pairs) -> int:
        return len(batch.y_B)


class Numbers:
    """Examples that carry their own number."""

    def __init__(self, size: int = NUM_EXAMPLES) -> None:
        self.size = size

    def lengths(self) -> Int64s:
        return np.ones(self.size, np.int64)

    def batch(self, chosen: Int64s, rng: np.random.Generator) -> Pairs:
        del rng
        x = torch.from_numpy(chosen).float()
        return Pairs(torch.stack((x, torch.ones_like(x)), dim=1), x / NUM_EXAMPLES)


def fitted(learner: Line, *, outputs: Outputs = Outputs(), **changes: object) -> Fitted:  # noqa: B008 - frozen
    config = LoopConfig(num_threads=1, examples_per_batch=8, **changes)  # type: ignore[arg-type]
    prepare_torch(config)
    return fit(learner, Numbers(), config, name="line", outputs=outputs)


def test_a_pass_shows_every_example_once_and_passes_differ() -> None:
    learner = Line()
    done = fitted(learner, epochs=2.0)
    first, second = learner.seen[:NUM_EXAMPLES], learner.seen[NUM_EXAMPLES:]
    assert sorted(first) == sorted(second) == list(range(NUM_EXAMPLES))
    assert first != second
    assert done.num_steps == len(done.losses) == 2 * 7
    assert done.num_tokens == 2 * NUM_EXAMPLES
    assert done.ended_by == "epochs"
    assert not learner.training


def test_half_a_pass_is_half_the_steps() -> None:
    learner = Line()
    assert fitted(learner, epochs=0.5).num_steps == 4
    assert len(set(learner.seen)) == len(learner.seen)


def test_stages_are_entered_in_order_at_their_share() -> None:
    entered: list[tuple[str, int]] = []
    learner = Line()

    def note(name: str) -> None:
        entered.append((name, len(learner.seen)))

    stages = [Stage(0.0, lambda: note("one")), Stage(0.5, lambda: note("two"))]
    config = LoopConfig(num_threads=1, examples_per_batch=5, epochs=1.0)
    fit(learner, Numbers(), config, name="line", stages=stages)
    assert entered == [("one", 0), ("two", 25)]


def test_patience_ends_a_run_with_its_best_weights() -> None:
    learner = Line()
    answers = iter([1.0, 3.0, 2.0, 2.0])
    weights: list[Tensor] = []

    def judge() -> float:
        assert not learner.training
        weights.append(learner.weight.weight.detach().clone())
        return next(answers)

    config = LoopConfig(num_threads=1, epochs=10.0, judge_every_steps=2, patience=2)
    done = fit(learner, Numbers(), config, name="line", judge=judge)
    assert done.ended_by == "patience"
    assert len(done.losses) == 8
    assert torch.equal(learner.weight.weight, weights[1])
    assert not torch.equal(weights[1], weights[3])


@pytest.mark.parametrize("gain", [float("nan"), float("inf"), 1e38])
def test_what_is_not_finite_ends_the_run_before_the_weights_change(gain: float) -> None:
    """With 1e38 the loss is finite and the length of the gradient is not."""
    learner = Line(gain=gain)
    before = learner.weight.weight.detach().clone()
    with pytest.raises(DivergedError, match="smaller learning_rate"):
        fitted(learner)
    assert torch.equal(learner.weight.weight, before)


def test_no_example_is_refused() -> None:
    with pytest.raises(EmptyWindowError, match="no example"):
        fit(Line(), Numbers(0), LoopConfig(num_threads=1), name="line")


def test_no_target_anywhere_is_refused_and_changes_nothing() -> None:
    learner = Line(num_targets=0)
    before = learner.weight.weight.detach().clone()
    with pytest.raises(EmptyWindowError, match="no batch had a target"):
        fitted(learner)
    assert torch.equal(learner.weight.weight, before)


def test_a_resumed_run_enters_its_stages_again_and_keeps_its_best(tmp_path: Path) -> None:
    """The judge likes the weights of step 4 best; the checkpoint is from step 8 of 14."""
    config = LoopConfig(num_threads=1, examples_per_batch=8, epochs=2.0, judge_every_steps=4)
    weights: list[Tensor] = []
    entered: list[str] = []
    stages = [
        Stage(0.0, lambda: entered.append("one")),
        Stage(0.5, lambda: entered.append("two")),
    ]
    for resume in (False, True):
        learner, answers = Line(), iter([3.0, 2.0] if not resume else [])
        prepare_torch(config)
        stages = [
            Stage(0.0, lambda: entered.append("one")),
            Stage(0.5, lambda: entered.append("two")),
        ]
        outputs = Outputs(checkpoints=tmp_path, checkpoint_every_steps=8, resume=resume)
        fit(
            learner,
            Numbers(),
            config,
            name="line",
            stages=stages,
            judge=lambda answers=answers: next(answers, 1.0),
            outputs=outputs,
        )
        weights.append(learner.weight.weight.detach().clone())
    assert entered == ["one", "two", "one", "two"]
    assert torch.equal(weights[0], weights[1])


def test_gems_makes_no_tensor_on_another_device_than_its_inputs(log: EventLog) -> None:
    """On the meta device, which refuses a mixture as a GPU does, and computes nothing."""
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    source = BatchSource.of(log, vocabulary, num_recent=8, num_mid=24)
    model = new_model(log, vocabulary, small_training(), tables_ms=10**15)
    examples = LabelExamples(source, label_groups(log), num_targets=4)
    batch = examples.batch(np.arange(9), np.random.default_rng(0))
    meta = torch.device("meta")
    loss = GemsLearner(model).to(meta).loss(on_device(batch, meta))
    torch.autograd.backward(loss)
    assert loss.device == meta


def test_tensorboard_has_every_step_once_after_a_resume(tmp_path: Path) -> None:
    folders = {"tensorboard": tmp_path / "logs", "checkpoints": tmp_path / "kept"}
    for resume in (False, True):
        outputs = Outputs(**folders, checkpoint_every_steps=4, resume=resume)  # type: ignore[arg-type]
        done = fitted(Line(), outputs=outputs, epochs=2.0)
    events = EventAccumulator(str(tmp_path / "logs" / "line"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {
        "loss", "learning_rate", "gradient_norm", "tokens_per_s",
    }  # fmt: skip
    shown = events.Scalars("loss")
    assert [one.step for one in shown] == list(range(1, 15))
    assert [one.value for one in shown] == pytest.approx(done.losses)


def test_bfloat16_learns_about_the_same(log: EventLog) -> None:
    with warnings.catch_warnings():
        # On the CPU the normalisation has no fused kernel for it, and says so.
        warnings.filterwarnings("ignore", message="Mismatch dtype")
        half = train(log, small_training(epochs=3.0, precision="bf16")).fitted
    full = train(log, small_training(epochs=3.0)).fitted
    assert half.losses != full.losses
    assert half.losses[0] == pytest.approx(full.losses[0], rel=0.02)
    assert np.mean(half.losses[-5:]) == pytest.approx(np.mean(full.losses[-5:]), rel=0.1)


def test_padding_of_very_skewed_histories_stays_within_its_bound() -> None:
    """News readers: half have a handful of clicks, few have hundreds."""
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.zipf(1.4, 20_000), 512).astype(np.int64)
    batches = length_batches(lengths, size=32, rng=rng)
    assert sorted(np.concatenate(batches).tolist()) == list(range(len(lengths)))
    padded = sum(len(one) * lengths[one].max() for one in batches)
    assert 1 - lengths.sum() / padded <= PADDING_SHARE_MAX
    for one in batches:
        assert lengths[one].min() >= (1 - PADDING_SHARE_MAX) * lengths[one].max()
    in_any_order = rng.permutation(len(lengths)).reshape(-1, 32)
    careless = (32 * lengths[in_any_order].max(axis=1)).sum()
    assert 1 - lengths.sum() / careless > 0.7
    # Smaller batches are few: at most one for each rung of the ladder.
    assert len(batches) <= len(lengths) / 32 + 23


def _skewed_log() -> EventLog:
    rng = np.random.default_rng(5)
    counts = np.minimum(rng.zipf(1.3, 60), 200) + 1
    user_id = np.repeat(np.arange(60), counts)
    ordinal = np.concatenate([np.arange(count) for count in counts])
    return EventLog.from_columns(
        {
            "user_id": user_id,
            "item_id": rng.integers(0, 20, len(user_id)),
            "event_time_ms": ordinal * 1000,
            "ordinal": ordinal,
        }
    )


def test_streams_are_cut_to_what_their_batch_needs_and_no_further() -> None:
    log = _skewed_log()
    source = BatchSource.of(log, Vocabulary.of(log, split_ms=10**15), num_recent=8, num_mid=120)
    groups = label_groups(log)
    groups = groups.select(groups.first_row_G > log.offsets[groups.user_G])
    examples = LabelExamples(source, groups, num_targets=4)
    rng = np.random.default_rng(1)
    num_real = num_padded = num_spare = 0
    for chosen in length_batches(examples.lengths(), size=16, rng=rng):
        batch = examples.batch(chosen, rng)
        recent, mid = batch.recent, batch.mid
        fixed_recent, fixed_mid = source.streams(groups.select(chosen))
        for cut, whole in ((recent, fixed_recent), (mid, fixed_mid)):
            width = cut.item.shape[1]
            assert all(torch.equal(a, b[:, -width:]) for a, b in zip(cut, whole, strict=True))
            assert int(cut.mask.sum()) == int(whole.mask.sum())
        num_real += int(recent.mask.sum() + mid.mask.sum())
        num_padded += recent.mask.numel() + mid.mask.numel()
        num_spare += 0 if mid.mask.any() else len(chosen)
    assert 1 - num_real / (num_padded - num_spare) <= PADDING_SHARE_MAX


def test_targets_of_a_group_do_not_depend_on_the_groups_beside_it(log: EventLog) -> None:
    source = BatchSource.of(log, Vocabulary.of(log, split_ms=10**15), num_recent=8, num_mid=8)
    groups = label_groups(log)
    together = source.targets(groups, num_targets=1, rng=np.random.default_rng(3))
    halves = [
        source.targets(
            groups.select(np.arange(half, len(groups), 2)),
            num_targets=1,
            rng=np.random.default_rng(3),
        )
        for half in range(2)
    ]
    assert torch.equal(together[0::2], halves[0])
    assert torch.equal(together[1::2], halves[1])
    other = source.targets(groups, num_targets=1, rng=np.random.default_rng(4))
    assert not torch.equal(together, other)
