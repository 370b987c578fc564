"""The indexer is distilled apart from all else, and top-K of enough keys is full attention."""

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.conftest import small_model, small_training
from trainer.batches import BatchSource
from trainer.dataset import EventLog, label_groups
from trainer.models.gems import Gems
from trainer.models.indexer import (
    DISTIL,
    FULL,
    TOP_K,
    IndexedBranch,
    IndexerConfig,
    divergence,
    recall_of_mass,
    summed_logits,
)
from trainer.models.layers import StreamTokens
from trainer.train import new_model, train, training_stages
from trainer.vocabulary import Vocabulary

WIDTH, NUM_KEYS, NUM_QUERIES = 16, 12, 3


def made_up_branch(**changes: object) -> IndexedBranch:
    torch.manual_seed(0)
    return IndexedBranch(WIDTH, 2, IndexerConfig(key_width=4, **changes))  # type: ignore[arg-type]


def made_up_stream(num_padding: int = 3) -> StreamTokens:
    mask = torch.arange(NUM_KEYS) >= num_padding
    return StreamTokens(torch.randn(2, NUM_KEYS, WIDTH), mask.expand(2, -1))


@pytest.mark.parametrize("top_k", [NUM_KEYS, 100])
@pytest.mark.parametrize("relu", [False, True])
def test_top_k_of_all_keys_is_full_attention(top_k: int, relu: bool) -> None:  # noqa: FBT001 - drawn
    branch = made_up_branch(top_k=top_k, relu=relu).eval()
    memory, query = branch.remember(made_up_stream()), torch.randn(2, NUM_QUERIES, WIDTH)
    branch.stage = FULL
    full, _ = branch.read(query, memory)
    branch.stage = TOP_K
    top, _ = branch.read(query, memory)
    torch.testing.assert_close(top, full)


def test_fewer_keys_are_those_of_the_highest_score() -> None:
    """The slow way: full attention, with all but the K best keys masked by hand."""
    branch = made_up_branch(top_k=4).eval()
    stream, query = made_up_stream(), torch.randn(2, NUM_QUERIES, WIDTH)
    memory = branch.remember(stream)
    branch.stage = TOP_K
    top, _ = branch.read(query, memory)
    assert memory.index_key_BNX is not None
    score = branch.indexer(query, memory.index_key_BNX)
    for number in range(NUM_QUERIES):
        best = score[:, number].masked_fill(~stream.mask_BN, -torch.inf).topk(4, dim=1)[1]
        chosen = torch.zeros_like(stream.mask_BN).scatter(1, best, value=True)
        one = memory._replace(mask_B1QN=chosen[:, None, None, :])
        slow = branch.attention(query[:, number : number + 1], one)
        torch.testing.assert_close(top[:, number : number + 1], slow)


@pytest.mark.parametrize("relu", [False, True])
def test_scores_are_the_weighted_sum_over_heads(relu: bool) -> None:  # noqa: FBT001 - drawn
    indexer = made_up_branch(relu=relu).indexer
    query, source = torch.randn(1, NUM_QUERIES, WIDTH), torch.randn(1, NUM_KEYS, WIDTH)
    score = indexer(query, indexer.remember(source))
    for q in range(NUM_QUERIES):
        weight, asked = indexer.weight(query[0, q]), indexer.query(query[0, q]).view(2, 4)
        for n in range(NUM_KEYS):
            dots = (asked * indexer.key(source[0, n]).view(2, 4)).sum(dim=1) / 4**0.5
            slow = (weight * (dots.relu() if relu else dots)).sum()
            torch.testing.assert_close(score[0, q, n], slow)


@pytest.mark.parametrize("stage", [FULL, DISTIL, TOP_K])
def test_padding_changes_nothing(stage: Literal[1, 2, 3]) -> None:
    branch = made_up_branch(top_k=5).train()
    branch.stage = stage
    stream, query = made_up_stream(), torch.randn(2, NUM_QUERIES, WIDTH)
    answer, loss = branch.read(query, branch.remember(stream))
    tokens = torch.cat((100 * torch.randn(2, 4, WIDTH), stream.tokens_BND), dim=1)
    mask = torch.nn.functional.pad(stream.mask_BN, (4, 0))
    padded, padded_loss = branch.read(query, branch.remember(StreamTokens(tokens, mask)))
    torch.testing.assert_close(padded, answer)
    torch.testing.assert_close(padded_loss, loss)


@pytest.mark.parametrize("stage", [DISTIL, TOP_K])
def test_without_keys_the_answer_is_zero_and_gradients_are_finite(stage: Literal[2, 3]) -> None:
    branch = made_up_branch(top_k=5).train()
    branch.stage = stage
    tokens = torch.randn(2, NUM_KEYS, WIDTH, requires_grad=True)
    mask = torch.zeros(2, NUM_KEYS, dtype=torch.bool)
    query = torch.randn(2, NUM_QUERIES, WIDTH)
    answer, loss = branch.read(query, branch.remember(StreamTokens(tokens, mask)))
    assert (answer == 0).all()
    assert float(loss.detach()) == 0
    (answer.sum() + loss).backward()
    assert tokens.grad is not None
    assert torch.isfinite(tokens.grad).all()


@pytest.mark.parametrize("stage", [DISTIL, TOP_K])
def test_gradients_of_the_two_losses_never_meet(log: EventLog, stage: Literal[2, 3]) -> None:
    model, source = _fresh(log)
    model.train().set_stage(stage)
    groups = label_groups(log).select(np.arange(100, 108))
    batch = source.batch(groups, num_targets=3, rng=np.random.default_rng(1))
    likelihood, reading = model._likelihood(batch)
    likelihood.sum().backward(retain_graph=True)
    indexer = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert indexer
    assert {name for name in indexer if _has_gradient(model, name)} == set()
    assert _has_gradient(model, "blocks.0.mid.attention.query.weight")
    model.zero_grad()
    reading.index_loss.backward()
    learned = {name for name, _ in model.named_parameters() if _has_gradient(model, name)}
    assert learned
    assert learned <= indexer


@pytest.mark.parametrize("direction", ["teacher", "student"])
def test_the_divergence_is_what_its_name_says(direction: Literal["teacher", "student"]) -> None:
    student, teacher = torch.randn(1, 2, 4), torch.randn(1, 2, 4)
    mask = torch.ones(1, 1, 4, dtype=torch.bool)
    value = divergence(student, teacher, mask, direction=direction)
    p, q = teacher.softmax(2), student.softmax(2)
    first, second = (p, q) if direction == "teacher" else (q, p)
    torch.testing.assert_close(value, (first * (first / second).log()).sum(2).mean())
    assert float(divergence(teacher, teacher, mask, direction=direction)) == pytest.approx(0)


def test_distilling_finds_the_keys_that_the_teacher_looks_at() -> None:
    branch = made_up_branch(top_k=3).train()
    branch.stage = DISTIL
    optimiser = torch.optim.Adam(branch.indexer.parameters(), lr=0.02)

    def drawn() -> tuple[Tensor, StreamTokens]:
        return 3 * torch.randn(2, NUM_QUERIES, WIDTH), made_up_stream()

    @torch.no_grad()
    def recall() -> float:
        torch.manual_seed(7)
        shares = []
        for _ in range(30):
            query, stream = drawn()
            memory = branch.remember(stream)
            assert memory.index_key_BNX is not None
            score = branch.indexer(query, memory.index_key_BNX)
            teacher = summed_logits(branch.attention, query, memory)
            mask = stream.mask_BN.unsqueeze(1)
            shares.append(float(recall_of_mass(score, teacher, mask, k=3).mean()))
        return float(np.mean(shares))

    before = recall()
    torch.manual_seed(1)
    for _ in range(300):
        query, stream = drawn()
        _, loss = branch.read(query, branch.remember(stream))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert recall() > before + 0.5 * (1 - before)


def test_a_training_goes_through_the_three_stages(log: EventLog) -> None:
    trained = train(log, small_training(model=small_model(mid_attention="indexer"), epochs=2.0))
    branches = [block.mid for block in trained.model._decoder_blocks()]
    assert [branch.stage for branch in branches] == [TOP_K]
    fresh, _ = _fresh(log)
    assert [stage.begin for stage in training_stages(fresh)] == [0.0, 0.6, 0.85]
    assert training_stages(_fresh(log, mid_attention="full")[0]) == []


@pytest.mark.parametrize(("mid_attention", "stage"), [("indexer", TOP_K), ("measured", FULL)])
def test_serving_uses_what_the_configuration_names(
    log: EventLog, mid_attention: str, stage: int
) -> None:
    model, _ = _fresh(log, mid_attention=mid_attention)
    assert [block.mid.stage for block in model.for_serving()._decoder_blocks()] == [stage]


def _fresh(log: EventLog, **changes: object) -> tuple[Gems, BatchSource]:
    settings: dict[str, object] = {"mid_attention": "indexer", **changes}
    config = small_training(model=small_model(indexer=IndexerConfig(top_k=4), **settings))
    vocabulary = Vocabulary.of(log, split_ms=10**15)
    torch.manual_seed(0)
    model = new_model(log, vocabulary, config, tables_ms=10**15)
    source = BatchSource.of(log, vocabulary, num_recent=8, num_mid=24, num_older=32)
    return model, source


def _has_gradient(model: Gems, name: str) -> bool:
    gradient = dict(model.named_parameters())[name].grad
    return gradient is not None and bool((gradient != 0).any())
