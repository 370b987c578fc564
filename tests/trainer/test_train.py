"""Training learns, repeats itself under a seed, and says what is wrong with its input."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from tests.trainer.conftest import made_up_columns, small_model, small_training
from trainer.batches import BatchSource
from trainer.dataset import EventLog, label_groups
from trainer.errors import BudgetError, DivergedError, EmptyWindowError, VocabularyError
from trainer.models.copying import item_facts
from trainer.models.events import log_bucket
from trainer.models.reading import mixed_log, without_lifelong
from trainer.train import Trained, new_model, train
from trainer.vocabulary import Vocabulary, item_counts, item_users


def _small_log(num_baskets: int) -> EventLog:
    columns = made_up_columns(seed=2, num_users=2, num_items=12, num_baskets=num_baskets)
    return EventLog.from_columns(columns)


def test_a_tiny_set_is_learned_by_heart() -> None:
    """Without copying, so that the generative part alone has to do it."""
    settings = small_training(
        epochs=150.0,
        learning_rate=1e-2,
        weight_decay=0.0,
        model=small_model(copy="off", prior="off", width=32),
    )
    trained = train(_small_log(8), settings)
    assert trained.fitted.losses[0] > 2.0
    assert np.mean(trained.fitted.losses[-5:]) < 0.5 * trained.fitted.losses[0]


def test_the_same_seed_gives_the_same_weights(log: EventLog) -> None:
    one, other = (train(log, small_training(seed=4)) for _ in range(2))
    assert one.fitted.losses == other.fitted.losses
    for name, value in one.model.state_dict().items():
        assert torch.equal(value, other.model.state_dict()[name]), name
    assert train(log, small_training(seed=5)).fitted.losses != one.fitted.losses


def test_an_untrained_copy_is_plain_counting(trained: Trained) -> None:
    untrained = new_model(
        trained.source.log, trained.vocabulary, trained.config, tables_ms=trained.split_ms
    )
    groups = trained.groups.select(np.array([len(trained.groups) - 1]))
    recent, mid = trained.source.streams(groups)
    with torch.no_grad():
        reading = untrained.read(without_lifelong(recent, mid))
    assert reading.shares is not None
    item = torch.cat((mid.item, recent.item), dim=1)[0]
    known, counts = item[item > 0].unique(return_counts=True)
    share = dict(zip(reading.shares.item_BG[0].tolist(), reading.shares.share_BG[0], strict=True))
    for dense, count in zip(known.tolist(), counts.tolist(), strict=True):
        assert float(share[dense]) == pytest.approx(count / counts.sum().item(), rel=1e-4)


def test_without_history_the_generative_part_decides_alone(trained: Trained) -> None:
    first = trained.groups.select(trained.groups.first_row_G == 0)
    recent, mid = trained.source.streams(first)
    assert not recent.mask.any()
    with torch.no_grad():
        reading = trained.model.read(without_lifelong(recent, mid))
    assert reading.copy_weight_B.item() == 0
    assert (reading.contribution_B3 == 0).all()


def test_contributions_are_shares(trained: Trained) -> None:
    last = trained.groups.select(np.array([len(trained.groups) - 1]))
    recent, mid = trained.source.streams(last)
    with torch.no_grad():
        reading = trained.model.read(without_lifelong(recent, mid))
    assert reading.contribution_B3.sum().item() == pytest.approx(1.0)
    assert reading.contribution_B3[0, 2].item() == 0


def test_a_mixture_is_finite_at_its_ends() -> None:
    zero, one = torch.tensor(0.0), torch.tensor(1.0)
    log_half = torch.tensor(0.5).log()
    assert mixed_log(log_half, zero, one).exp().item() == pytest.approx(0.5)
    assert mixed_log(log_half, one, zero).exp().item() == pytest.approx(1.0)
    assert torch.isfinite(mixed_log(log_half, zero, zero))


def test_time_buckets_are_ordered_and_bounded() -> None:
    times = torch.tensor([-1, 0, 999, 60_000, 86_400_000, 10**15])
    buckets = log_bucket(times).tolist()
    assert buckets == sorted(buckets)
    assert buckets[0] == buckets[1] == 0
    assert buckets[-1] <= 63


def test_the_budget_ends_a_run_early(log: EventLog) -> None:
    trained = train(log, small_training(epochs=1e6, budget_s=5.0, budget_clock="processor"))
    assert trained.fitted.ended_by == "budget"
    assert len(trained.fitted.losses) > 0


def test_a_budget_without_a_step_is_refused(log: EventLog) -> None:
    with pytest.raises(BudgetError, match="larger budget"):
        train(log, small_training(budget_s=1e-6))


def test_too_many_items_are_refused(log: EventLog) -> None:
    with pytest.raises(VocabularyError, match="raise code_sizes"):
        train(log, small_training(code_sizes=(2, 2, 2)))


def test_one_event_per_user_is_refused() -> None:
    columns = made_up_columns(seed=1, num_users=1, num_baskets=1)
    with pytest.raises(EmptyWindowError):
        train(EventLog.from_columns(columns), small_training())


def test_a_wild_learning_rate_is_named(log: EventLog) -> None:
    with pytest.raises(DivergedError, match="learning_rate"):
        train(log, small_training(epochs=50.0, learning_rate=1e30))


def test_model_survives_ids_it_never_saw(
    trained: Trained, trained_with: Callable[..., Trained]
) -> None:
    del trained_with
    columns = made_up_columns(seed=9)
    columns["item_id"] = columns["item_id"] + 10_000_000
    stranger = EventLog.from_columns(columns)
    source = BatchSource.of(stranger, trained.vocabulary, num_recent=8, num_mid=24)
    recent, mid = source.streams(label_groups(stranger))
    assert recent.mask.any()
    assert (recent.item == 0).all()
    with torch.no_grad():
        reading = trained.model.read(without_lifelong(recent, mid))
    assert torch.isfinite(reading.state_BD).all()
    assert (reading.copy_weight_B == 0).all()


def test_an_items_facts_are_events_and_events_of_each_user() -> None:
    """One user meets item 7 three times, two users item 9 once each; later events do not count."""
    log = EventLog.from_columns(
        {
            "user_id": np.array([1, 1, 1, 1, 2, 2]),
            "item_id": np.array([7, 7, 7, 9, 9, 7]),
            "event_time_ms": np.array([1, 2, 3, 4, 5, 60]),
            "ordinal": np.array([0, 1, 2, 3, 0, 1]),
        }
    )
    vocabulary = Vocabulary.of(log, split_ms=10)
    counts, users = (count(log, vocabulary, until_ms=10) for count in (item_counts, item_users))
    assert counts.tolist() == [3, 2]
    assert users.tolist() == [1, 2]
    facts = item_facts(torch.from_numpy(counts), torch.from_numpy(users))
    assert facts[1:].exp().round().tolist() == [[4, 2], [3, 1]]
    assert facts[0].tolist() == [0, 0]
