"""The single-stream rivals compute what their sources say, and learn from the right targets.

Method: HSTU against a slow reference written as loops, forward and backward, in float64; all of
them against changed futures, changed padding and made-up targets.
"""

import math

import pytest
import torch
from torch import Tensor

from trainer.batches import Batch, Stream
from trainer.models.gru4rec import Gru4Rec
from trainer.models.hstu import BUCKET_WIDTH, EPSILON, Hstu, time_buckets
from trainer.models.next_items import NUM_IN_BATCH, NUM_UNIFORM, next_starts, next_targets
from trainer.models.sasrec import SasRec
from trainer.models.sequence import SequenceConfig, SequenceModel, joined

MODELS = (Gru4Rec, SasRec, Hstu)
NUM_ITEMS, NUM_EVENTS, WIDTH = 40, 7, 8
DAY_MS = 86_400_000


def new(kind: type[SequenceModel], **changes: object) -> SequenceModel:
    torch.manual_seed(5)
    settings = {"width": WIDTH, "num_events": NUM_EVENTS, "dropout": 0.0, **changes}
    vectors = torch.nn.functional.normalize(torch.randn(NUM_ITEMS, WIDTH), dim=1)
    config = SequenceConfig(**settings)  # type: ignore[arg-type]
    counts = torch.arange(1, NUM_ITEMS + 1)
    return kind(config, item_vectors_VE=vectors, item_counts_V=counts).eval()


def stream(items: list[list[int]], days: list[list[int]]) -> Stream:
    """Item 0 is padding; `days` say how long ago."""
    item = torch.tensor(items)
    age = torch.tensor(days) * DAY_MS
    other = torch.zeros_like(item)
    return Stream(item, age, other, other, other, item > 0)


def some() -> Stream:
    return stream(
        [[0, 0, 3, 4, 5, 6, 7], [8, 9, 8, 1, 2, 3, 11]],
        [[0, 0, 9, 9, 4, 0, 0], [30, 20, 20, 20, 3, 1, 0]],
    )


def empty(of: Stream) -> Stream:
    return Stream(*(column[:, :0] for column in of))


def layer_norm(row: Tensor) -> Tensor:
    centred = row - row.mean()
    return centred / torch.sqrt((centred * centred).mean() + EPSILON)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def slow_states(model: Hstu, of: Stream) -> Tensor:
    """HSTU event by event and head by head, as methods describe it."""
    users = []
    for user in range(of.item.shape[0]):
        item, age = of.item[user].tolist(), of.age_ms[user].tolist()
        x = [
            model.items.vector.weight[item[i]] * math.sqrt(WIDTH) + model.position_ND[i]
            for i in range(NUM_EVENTS)
        ]
        for number in range(len(model.layers)):
            x = slow_layer(model, number, x, item, age)
        users.append(torch.stack(x))
    return torch.stack(users)


def slow_layer(
    model: Hstu, number: int, x: list[Tensor], item: list[int], age: list[int]
) -> list[Tensor]:
    layer = model.layers[number]
    heads = model.config.num_heads
    part = WIDTH // heads
    u, v, q, k = zip(
        *(silu(layer.in_.weight @ layer_norm(row)).split(WIDTH) for row in x), strict=True
    )
    out = []
    for i in range(NUM_EVENTS):
        later = [j for j in range(i + 1, NUM_EVENTS) if age[j] != age[i]]
        until = age[later[0]] if later else age[-1]
        read = []
        for head in range(heads):
            at = slice(head * part, (head + 1) * part)
            total = torch.zeros(part, dtype=torch.float64)
            for j in range(i + 1):
                if item[j] == 0:
                    continue
                seconds = abs(age[j] - until) / 1000
                bucket = int(math.log(max(1.0, seconds)) / BUCKET_WIDTH)
                bias = model.time.weight[bucket, number] + model.distance.weight[i - j, number]
                total = total + silu(q[i][at] @ k[j][at] + bias) / NUM_EVENTS * v[j][at]
            read.append(total)
        gated = u[i] * layer_norm(torch.cat(read))
        out.append(layer.out.weight @ gated + layer.out.bias + x[i])
    return out


def test_hstu_equals_a_loop_forward_and_backward() -> None:
    model = new(Hstu).double()
    assert isinstance(model, Hstu)
    # Drawn large, so that every part of the layer matters.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    real = some().mask
    weight = torch.randn(*real.shape, WIDTH, dtype=torch.float64) * real.unsqueeze(2)
    gradients = []
    states = []
    for compute in (model.states, lambda of: slow_states(model, of)):
        model.zero_grad()
        state = compute(some())
        (state * weight).sum().backward()
        states.append(state.detach()[real])
        named = model.named_parameters()
        gradients.append({name: one.grad.clone() for name, one in named if one.grad is not None})
    torch.testing.assert_close(states[0], states[1], rtol=1e-9, atol=1e-9)
    assert set(gradients[0]) == set(gradients[1])
    assert {"time.weight", "distance.weight", "layers.1.in_.weight"} <= set(gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], rtol=1e-8, atol=1e-8, msg=name)


def test_time_is_measured_to_what_comes_next() -> None:
    buckets = time_buckets(stream([[1, 2, 3]], [[2, 1, 0]]))
    one, two = int(math.log(86_400) / BUCKET_WIDTH), int(math.log(2 * 86_400) / BUCKET_WIDTH)
    # The newest event predicts the unknown: it is measured against its own time.
    assert buckets[0].tolist() == [[one, 0, one], [two, one, 0], [two, one, 0]]


@pytest.mark.parametrize("kind", MODELS)
def test_an_event_sees_no_later_one(kind: type[SequenceModel]) -> None:
    model = new(kind)
    changed = some().item.clone()
    changed[:, -1] = 30
    before, after = model.states(some()), model.states(some()._replace(item=changed))
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


@pytest.mark.parametrize("kind", [SasRec, Hstu])
def test_padding_changes_nothing(kind: type[SequenceModel]) -> None:
    model = new(kind, num_events=NUM_EVENTS)
    whole = some()
    short = Stream(*(column[:1, 2:] for column in whole))
    first = Stream(*(column[:1] for column in whole))
    torch.testing.assert_close(model.scores(first, empty(first)), model.scores(short, empty(short)))


@pytest.mark.parametrize("kind", MODELS)
def test_no_score_names_the_unknown_item(kind: type[SequenceModel]) -> None:
    score = new(kind).scores(some(), empty(some()))
    assert score.shape == (2, NUM_ITEMS + 1)
    assert (score[:, 0] == -math.inf).all()
    assert score[:, 1:].isfinite().all()


@pytest.mark.parametrize("kind", MODELS)
def test_the_loss_falls(kind: type[SequenceModel]) -> None:
    model = new(kind).train()
    batch = Batch(some(), empty(some()), torch.tensor([[9, 10, 0], [12, 0, 0]]))
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        loss = model.loss(batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    best = model.eval().scores(some(), empty(some()))[0].topk(2).indices.tolist()
    assert sorted(best) == [9, 10]


@pytest.mark.parametrize("kind", MODELS)
def test_a_batch_without_targets_teaches_nothing(kind: type[SequenceModel]) -> None:
    model = new(kind).train()
    alone = stream([[0] * 6 + [4]], [[0] * 7])
    loss = model.loss(Batch(alone, empty(alone), torch.zeros(1, 3, dtype=torch.int64)))
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_targets_are_items_of_the_next_time() -> None:
    of = some()
    assert next_starts(of).tolist() == [[2, 2, 4, 4, 5, 7, 7], [1, 4, 4, 4, 5, 6, 7]]
    for _ in range(20):
        target = next_targets(of)
        assert (target[0, :2] == 0).all(), "padding has no target"
        assert target[0, 2:5].tolist()[:2] == [5, 5]
        assert int(target[0, 4]) in {6, 7}
        assert target[0, 5:].tolist() == [0, 0], "the newest time is followed by the label"
        assert set(target[1, :1].tolist()) <= {9, 8, 1}
        assert target[1, 1:].tolist() == [2, 2, 2, 3, 11, 0]


def test_negatives_stand_for_all_items() -> None:
    """Corrected by its expected count, each item weighs in the sum as if it stood there once."""
    model = new(Gru4Rec)
    with torch.no_grad():
        model.items.vector.weight.zero_()
        model.items.bias_I.zero_()
    target = torch.multinomial(model.items.share_I, 4_000, replacement=True)
    loss = float(model.items.sampled_softmax(torch.zeros(len(target), WIDTH), target).detach())
    expected_P = NUM_UNIFORM / NUM_ITEMS + NUM_IN_BATCH * model.items.share_I[target]
    others = NUM_ITEMS - 1
    assert loss == pytest.approx(float((1 + others * expected_P).log().mean()), rel=0.02)
    assert set(model.items.negatives(target).tolist()) <= set(range(1, NUM_ITEMS + 1))


def test_joined_streams_keep_the_order() -> None:
    of = some()
    older, newer = (Stream(*(c[:, part] for c in of)) for part in (slice(3), slice(3, 7)))
    assert joined(newer, older).item.tolist() == of.item.tolist()
