"""The decoder reads present streams only, never later tokens, and the fusion is what it says."""

import pytest
import torch

from trainer.models.decoder import DecoderBlock, Fusion, fuse
from trainer.models.layers import Attention, StreamTokens

WIDTH, NUM_EVENTS = 8, 5
FUSIONS: tuple[Fusion, ...] = ("delta_sum", "sum", "mean", "gate")


def _streams(present: tuple[bool, bool, bool], seed: int = 0) -> tuple[StreamTokens, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        StreamTokens(
            torch.randn(2, NUM_EVENTS, WIDTH, generator=generator),
            torch.full((2, NUM_EVENTS), is_present),
        )
        for is_present in present
    )


@pytest.mark.parametrize("fusion", FUSIONS)
def test_one_stream_makes_an_ordinary_decoder_block(fusion: Fusion) -> None:
    torch.manual_seed(0)
    block = DecoderBlock(WIDTH, 2, fusion=fusion)
    x = torch.randn(2, 3, 2, WIDTH)
    memories = block.remember(_streams((True, False, False)))
    state, change, _, _ = block(x, None, memories)
    normed = block.norm(x).flatten(0, 1)
    mask = torch.ones(1, 2, 2, dtype=torch.bool).tril()
    after_self = x.flatten(1, 2) + block.attention(
        normed, block.attention.remember(normed, mask)
    ).view(2, -1, WIDTH)
    after_cross = after_self + block.recent.attention(block.recent.norm(after_self), memories[0])
    ordinary = after_cross + block.recent.feed_forward(after_cross)
    torch.testing.assert_close(state, ordinary.view_as(state))
    assert (change[..., 1:] == 0).all()
    assert (change[..., 0] > 0).all()


@pytest.mark.parametrize("fusion", FUSIONS)
def test_without_streams_only_self_attention_is_left(fusion: Fusion) -> None:
    torch.manual_seed(0)
    block = DecoderBlock(WIDTH, 2, fusion=fusion)
    x = torch.randn(2, 1, 1, WIDTH)
    one, _, _, _ = block(x, None, block.remember(_streams((False, False, False), seed=1)))
    other, _, _, _ = block(x, None, block.remember(_streams((False, False, False), seed=2)))
    assert torch.equal(one, other)


def test_what_an_absent_stream_holds_does_not_matter() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(WIDTH, 2, fusion="delta_sum")
    x = torch.randn(2, 1, 1, WIDTH)
    recent, mid, lifelong = _streams((True, True, False))
    noise = StreamTokens(100 * torch.randn(2, NUM_EVENTS, WIDTH), lifelong.mask_BN)
    one, _, _, _ = block(x, None, block.remember((recent, mid, lifelong)))
    other, _, _, _ = block(x, None, block.remember((recent, mid, noise)))
    assert torch.equal(one, other)


def test_fusions_differ_by_their_residual() -> None:
    x = torch.ones(1, 1, 2)
    read = torch.stack((x + 1, x + 2, x + 4))
    all_present = torch.ones(3, 1, 1, 1)
    assert fuse(x, read, all_present, fusion="delta_sum").unique().item() == 1 + 1 + 2 + 4
    assert fuse(x, read, all_present, fusion="sum").unique().item() == 3 + 1 + 2 + 4
    mean = fuse(x, read, all_present, fusion="mean").unique().item()
    assert mean == pytest.approx((3 + 1 + 2 + 4) / 3)


def test_token_by_token_equals_all_at_once() -> None:
    torch.manual_seed(0)
    block = DecoderBlock(WIDTH, 2, fusion="delta_sum")
    memories = block.remember(_streams((True, True, False)))
    x = torch.randn(2, 4, 3, WIDTH)
    together, _, _, _ = block(x, None, memories)
    past = None
    for position in range(3):
        state, _, kept, _ = block(x[:, :, position : position + 1], past, memories)
        past = kept if past is None else torch.cat((past, kept), dim=2)
        torch.testing.assert_close(state[:, :, 0], together[:, :, position])


def test_attention_without_keys_answers_zero_and_has_finite_gradients() -> None:
    attention = Attention(WIDTH, 2)
    source = torch.randn(2, 4, WIDTH, requires_grad=True)
    mask = torch.tensor([[False] * 4, [True] * 4]).unsqueeze(1)
    answer = attention(torch.randn(2, 3, WIDTH), attention.remember(source, mask))
    assert (answer[0] == 0).all()
    assert (answer[1] != 0).any()
    answer.sum().backward()
    assert source.grad is not None
    assert torch.isfinite(source.grad).all()
