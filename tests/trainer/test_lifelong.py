"""A lifelong state is a sum over events; what is read of it is finite, learned, nothing if empty.

Sums in float32 are compared to 1e-5 of the largest entry.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import made_up_columns, small_model, small_training
from trainer.batches import PADDING, BatchSource, OldEvents
from trainer.dataset import EventLog
from trainer.models.beam import generate
from trainer.models.gems import Gems
from trainer.models.lifelong import (
    NUM_ROWS,
    VALUE_WIDTH,
    Compressor,
    MemoryReader,
    Reconstruction,
    memory_version,
    newest_vectors,
)
from trainer.train import Trained, new_model, train
from trainer.vocabulary import Vocabulary

NUM_USERS, NUM_EVENTS = 3, 40
ITEM_IDS = torch.arange(50, 250, 7)


def made_up_compressor(seed: int = 0, width: int = 16) -> Compressor:
    torch.manual_seed(seed)
    return Compressor(
        width=width,
        item_ids_V=ITEM_IDS.clone(),
        domain_ids=torch.tensor([-5, 0, 10**18]),
        item_vectors_VE=torch.nn.functional.normalize(torch.randn(len(ITEM_IDS), 8), dim=1),
    )


def made_up_events(seed: int = 0, num_events: int = NUM_EVENTS) -> OldEvents:
    generator = torch.Generator().manual_seed(seed)
    shape = (NUM_USERS, num_events)

    def drawn(high: int) -> Tensor:
        return torch.randint(high, shape, generator=generator)

    item = ITEM_IDS[drawn(len(ITEM_IDS))]
    return OldEvents(item, drawn(8), 10**18 * drawn(2), drawn(10**6) - 1, drawn(10**13))


def part(events: OldEvents, columns: Tensor | slice) -> OldEvents:
    return OldEvents(*(column[:, columns] for column in events))


def assert_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(one[1], other[1])
    difference = (one[0] - other[0]).detach().abs().max()
    assert float(difference) <= 1e-5 * float(other[0].detach().abs().max())


def test_batch_equals_streaming_equals_shuffled_equals_merged() -> None:
    compressor, events = made_up_compressor(), made_up_events()
    batch = compressor.fold(events)
    assert batch[0].shape == (NUM_USERS, NUM_ROWS, VALUE_WIDTH)
    assert batch[1].tolist() == [[NUM_EVENTS]] * NUM_USERS
    state, count = torch.zeros_like(batch[0]), torch.zeros_like(batch[1])
    for number in range(NUM_EVENTS):
        one = compressor.fold(part(events, slice(number, number + 1)))
        state, count = state + one[0], count + one[1]
    assert_same((state, count), batch)
    order = torch.randperm(NUM_EVENTS, generator=torch.Generator().manual_seed(1))
    assert_same(compressor.fold(part(events, order)), batch)
    older, newer = (compressor.fold(part(events, cut)) for cut in (slice(0, 7), slice(7, None)))
    assert_same((older[0] + newer[0], older[1] + newer[1]), batch)


def test_what_stands_on_padding_does_not_matter() -> None:
    compressor, events = made_up_compressor(), made_up_events()
    item = events.item.clone()
    item[:, 10:20] = PADDING
    padded = compressor.fold(events._replace(item=item))
    kept = torch.cat((torch.arange(10), torch.arange(20, NUM_EVENTS)))
    assert_same(padded, compressor.fold(part(events, kept)))
    nobody = compressor.fold(events._replace(item=torch.full_like(item, PADDING)))
    assert (nobody[0] == 0).all()
    assert (nobody[1] == 0).all()


def test_an_event_counts_by_the_hour_of_the_week_not_by_its_age() -> None:
    compressor, events = made_up_compressor(), made_up_events()
    week_ms = 7 * 86_400_000
    later = events._replace(event_time_ms=events.event_time_ms + 11 * week_ms)
    assert torch.equal(compressor.fold(later)[0], compressor.fold(events)[0])
    hour_later = events._replace(event_time_ms=events.event_time_ms + 3_600_000)
    assert not torch.equal(compressor.fold(hour_later)[0], compressor.fold(events)[0])


def test_the_memory_version_is_of_weights_and_tables_and_of_nothing_else() -> None:
    version = memory_version(made_up_compressor())
    assert len(version) == 16
    assert int(version, 16) >= 0
    assert memory_version(made_up_compressor()) == version
    assert memory_version(made_up_compressor(seed=1)) != version
    for name in ("item_vector_IE", "item_ids_V", "domain_ids", "key.weight", "hour.weight"):
        changed = made_up_compressor()
        changed.state_dict()[name].flatten()[-1] += 1
        assert memory_version(changed) != version, name
    restored = Compressor.restored(made_up_compressor().state_dict())
    assert memory_version(restored) == version


def test_reading_depends_on_the_mean_and_is_finite_without_events() -> None:
    torch.manual_seed(0)
    reader = MemoryReader(width=16, num_heads=2, num_seeds=4, num_layers=1)
    state, count = made_up_compressor().fold(made_up_events())
    once, mask = reader(state, count)
    twice, _ = reader(2 * state, 2 * count)
    torch.testing.assert_close(once, twice)
    assert mask.all()
    empty, absent = reader(torch.zeros_like(state), torch.zeros_like(count))
    assert torch.isfinite(empty).all()
    assert not absent.any()
    other, _ = reader(made_up_compressor().fold(made_up_events(seed=5))[0], count)
    assert float((other - once).detach().abs().max()) > 1e-3


def test_reconstruction_trains_seeds_and_compressor_and_can_be_learned() -> None:
    compressor, events = made_up_compressor(), made_up_events()
    # Everyone repeats one item of their own: what the summary must keep.
    events = events._replace(item=events.item[:, :1].expand(-1, NUM_EVENTS).contiguous())
    reader = MemoryReader(width=16, num_heads=2, num_seeds=4, num_layers=1)
    reconstruction = Reconstruction(width=16, item_width=8)
    modules = torch.nn.ModuleList((compressor, reader, reconstruction))
    optimiser = torch.optim.Adam(modules.parameters(), lr=0.01)
    losses = []
    for step in range(60):
        summary, _ = reader(*compressor.fold(events))
        loss = reconstruction(summary, *newest_vectors(compressor, events))
        optimiser.zero_grad()
        loss.backward()
        if step == 0:
            for parameter in (reader.seeds_SD, compressor.key.weight, compressor.value.weight):
                assert parameter.grad is not None
                assert float(parameter.grad.abs().max()) > 0
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.1 * losses[0]


def test_reconstruction_looks_at_no_later_event() -> None:
    torch.manual_seed(0)
    reconstruction = Reconstruction(width=8, item_width=8)
    summary, vectors = torch.randn(1, 4, 8), torch.randn(1, 3, 8)
    # Only the step from the first to the second event is judged.
    mask = torch.tensor([[True, True, False]])
    changed = vectors.clone()
    changed[:, 2] += 1
    assert torch.equal(
        reconstruction(summary, vectors, mask), reconstruction(summary, changed, mask)
    )
    nothing = reconstruction(summary, vectors, torch.zeros(1, 3, dtype=torch.bool))
    assert float(nothing.detach()) == 0


def test_old_events_are_exactly_those_before_both_streams() -> None:
    log = EventLog.from_columns(made_up_columns(seed=3))
    source = BatchSource.of(
        log, Vocabulary.of(log, split_ms=10**15), num_recent=4, num_mid=8, num_older=1000
    )
    groups = _label_groups(log)
    older = source.older(groups)
    assert older is not None
    rows, known = source.history_rows(groups)
    for number in range(len(groups)):
        begin = log.offsets[groups.user_G[number]]
        end = rows[number, 0] if known[number, 0] else begin
        item = older.item[number]
        assert item[item != PADDING].tolist() == log.item_id_N[begin:end].tolist()
        time_ms = older.event_time_ms[number][item != PADDING]
        assert time_ms.tolist() == log.event_time_ms_N[begin:end].tolist()


def test_a_long_past_is_thinned_evenly() -> None:
    log = EventLog.from_columns(made_up_columns(seed=3))
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    whole, thin = (
        BatchSource.of(log, vocabulary, num_recent=2, num_mid=2, num_older=most)
        for most in (1000, 7)
    )
    groups = _label_groups(log)
    longest = int(np.argmax(whole.read_lengths(groups)))
    groups = groups.select(np.array([longest]))
    all_times, times = (source.older(groups).event_time_ms[0] for source in (whole, thin))
    assert len(times) == 7
    assert set(times.tolist()) <= set(all_times.tolist())
    assert times[0] == all_times[0]
    assert times[-1] >= all_times[int(0.8 * len(all_times))]


def test_a_model_without_memory_says_contribution_zero(trained: Trained) -> None:
    groups = trained.groups.select(np.arange(4))
    recent, mid = trained.source.streams(groups)
    reading = trained.model.read(trained.model.history(recent, mid, None))
    assert (reading.contribution_B3[:, 2] == 0).all()
    assert torch.isfinite(reading.state_BD).all()


def test_a_memory_contributes_and_changes_scores(trained: Trained) -> None:
    groups = trained.groups.select(np.arange(len(trained.groups) - 4, len(trained.groups)))
    recent, mid = trained.source.streams(groups)
    events = made_up_events(seed=2)
    events = OldEvents(*(column[:1].expand(4, -1) for column in events))
    allowed = torch.ones(4, trained.vocabulary.num_items + 1, dtype=torch.bool)
    with torch.no_grad():
        without = trained.model.read(trained.model.history(recent, mid, None))
        reading = trained.model.read(trained.model.history(recent, mid, events))
        _, score = generate(trained.model, reading, allowed)
        _, score_without = generate(trained.model, without, allowed)
    assert (reading.contribution_B3[:, 2] > 0).all()
    torch.testing.assert_close(reading.contribution_B3.sum(dim=1), torch.ones(4))
    assert not torch.equal(score, score_without)


@pytest.mark.parametrize("left_out", ["recent", "mid", "lifelong"])
def test_a_stream_that_is_left_out_changes_nothing(left_out: str, log: EventLog) -> None:
    names = tuple(name for name in ("recent", "mid", "lifelong") if name != left_out)
    model, source = _fresh(log, streams=names)
    groups = _label_groups(log).select(np.arange(100, 104))
    batch = source.batch(groups, num_targets=3, rng=np.random.default_rng(1))
    older = made_up_events(seed=3)
    older = OldEvents(*(column[:1].expand(4, -1) for column in older))
    noise = torch.randint(1, 20, batch.recent.item.shape)
    changed = {
        "recent": batch._replace(recent=batch.recent._replace(item=noise)),
        "mid": batch._replace(mid=batch.mid._replace(dwell_ms=batch.mid.dwell_ms + 10**6)),
        "lifelong": batch._replace(older=older),
    }
    with torch.no_grad():
        plain = model.log_likelihood(batch)
        same = {
            name: torch.equal(plain, model.log_likelihood(other)) for name, other in changed.items()
        }
    assert same == {name: name == left_out for name in changed}


def test_training_learns_from_what_only_the_old_events_tell(
    trained_with: Callable[..., Trained],
) -> None:
    """Users whose favourite item stands in their old events only, right before the label."""
    with_memory = trained_with(num_recent=1, num_mid=1, num_older=16, copy="off")
    assert with_memory.model.compressor is not None
    for name, parameter in with_memory.model.compressor.named_parameters():
        if name in {"key.weight", "value.weight", "item.weight"}:
            fresh = dict(_fresh_like(with_memory).named_parameters())[f"compressor.{name}"]
            assert not torch.equal(parameter, fresh), name


def test_a_frozen_compressor_stays_and_keeps_its_version(log: EventLog) -> None:
    first = train(log, small_training())
    assert first.model.compressor is not None
    version = memory_version(first.model.compressor)
    config = small_training(seed=2)
    second = train(log, config, compressor=first.model.compressor)
    assert second.model.compressor is not None
    assert memory_version(second.model.compressor) == version
    assert memory_version(train(log, config).model.compressor) != version


def _label_groups(log: EventLog):  # noqa: ANN202 - LabelGroups
    from trainer.dataset import label_groups  # noqa: PLC0415 - named like the fixture's helper

    return label_groups(log)


def _fresh(log: EventLog, **changes: object) -> tuple[Gems, BatchSource]:
    config = small_training(model=small_model(**changes))
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    torch.manual_seed(0)
    model = new_model(log, vocabulary, config, tables_ms=10**15)
    source = BatchSource.of(
        log,
        vocabulary,
        num_recent=config.model.num_recent,
        num_mid=config.model.num_mid,
        num_older=config.model.num_older_read,
    )
    return model.eval(), source


def _fresh_like(trained: Trained) -> Gems:
    torch.manual_seed(trained.config.loop.seed)
    config = dataclasses.replace(trained.config)
    return new_model(trained.source.log, trained.vocabulary, config, tables_ms=trained.split_ms)
