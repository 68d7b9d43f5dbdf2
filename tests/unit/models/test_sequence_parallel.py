"""Rows of tokens as models see them: whole by default, and parts of the right shapes where they are counted."""

from __future__ import annotations

import pytest
import torch

from regen_dist.config.embedder import AttentionConfig
from regen_dist.models.attention import attention
from regen_dist.models.decoder import GenerativeDecoder
from regen_dist.models.embedder import build_model
from regen_dist.models.flops import count_flops, count_row_flops
from regen_dist.models.sequence_parallel import WHOLE, Rows, SimulatedSequenceParallel, row_lengths, share_rows
from regen_dist.models.t2v import _of_groups
from tests.helpers.tiny import tiny_model, tiny_t2v_model


@pytest.mark.parametrize(("length", "size"), [(80, 2), (75, 4), (3, 3), (2, 5), (1, 3)])
def test_parts_make_the_row_and_are_even(length: int, size: int) -> None:
    lengths = row_lengths(length, size)
    assert (sum(lengths), len(lengths)) == (length, size)
    assert max(lengths) - min(lengths) <= 1
    assert lengths == sorted(lengths, reverse=True)


def test_alone_nothing_is_copied() -> None:
    """The default costs nothing: the very tensors come back."""
    share, x = Rows().share(12), torch.zeros(1, 2, 12, 4)
    assert share is WHOLE
    assert share.to_heads(x, x)[0] is x
    assert share.to_tokens(x) is x
    assert share.whole(x) is x
    assert x[:, :, share.own].shape == x.shape


@pytest.mark.parametrize(("length", "own"), [(12, 4), (13, 5)])
def test_shapes_of_a_pretended_share(length: int, own: int) -> None:
    """Tokens of all heads to all tokens of own heads, and back; gradients find their way."""
    share = SimulatedSequenceParallel(3).share(length)
    x = torch.randn(2, 6, length, 4)[:, :, share.own].requires_grad_()
    q, k = share.to_heads(x, x)
    assert x.shape == (2, 6, own, 4)
    assert q.shape == k.shape == (2, 2, length, 4)
    back = share.to_tokens(q + k)
    assert back.shape == x.shape
    assert share.whole(back.flatten(2)[:, :own]).shape[1] == length
    back.sum().backward()
    assert x.grad is not None


def test_windows_are_cut_from_the_whole_row() -> None:
    """Attention works on all tokens of the grid, and on a share of the heads."""
    grid, config = (3, 4, 5), AttentionConfig(pattern="window", window=(2, 2, 2))
    share = SimulatedSequenceParallel(2).share(60)
    x = torch.randn(1, 4, 30, 8)
    assert attention(x, x, x, grid, config, True, share).shape == x.shape


def test_every_row_of_a_model_is_shared() -> None:
    """The decoder of the embedder, the whole model of text to video; nothing of the baseline."""
    rows = SimulatedSequenceParallel(2)
    models = [build_model(each) for each in (tiny_model(), tiny_t2v_model(), tiny_model(kind="magvit2"))]
    for model in models:
        share_rows(model, rows)
    shared = [sum(getattr(part, "rows", None) is rows for part in model.modules()) for model in models]
    assert shared == [1, 1, 0]


@pytest.mark.parametrize(
    ("size", "index", "frames"), [(1, 0, (0, 5)), (2, 0, (0, 3)), (2, 1, (2, 5)), (5, 3, (3, 4)), (8, 7, (4, 5))]
)
def test_conditioning_is_made_of_the_frames_that_a_rank_has_tokens_of(
    monkeypatch: pytest.MonkeyPatch, size: int, index: int, frames: tuple[int, int]
) -> None:
    """Five frames of 4 x 4 tokens."""
    decoder = GenerativeDecoder(tiny_model().decoder)
    rows = SimulatedSequenceParallel(size)
    lengths = row_lengths(80, size)
    share = rows.share(80)
    share.own = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
    monkeypatch.setattr(rows, "share", lambda length: share)
    decoder.rows = rows
    assert decoder.own_frames((5, 4, 4)) == slice(*frames)


@pytest.mark.parametrize(
    ("size", "index", "groups"), [(1, 0, 5), (5, 3, 1), (2, 0, 5), (2, 1, 5), (8, 7, 5), (3, 1, 27)]
)
def test_groups_of_tokens_have_the_modulation_of_their_frame(size: int, index: int, groups: int) -> None:
    """Five frames of 4 x 4 tokens; a part of 40 tokens is five groups of 8, one of 10 tokens five of 2."""
    share, lengths = SimulatedSequenceParallel(size).share(80), row_lengths(80, size)
    share.own = slice(sum(lengths[:index]), sum(lengths[: index + 1]))
    frames = torch.arange(5.0)[None, :, None, None]
    found = _of_groups(frames, (5, 4, 4), share)
    assert found.shape[1] == groups
    own = frames.repeat_interleave(16, 1)[:, share.own]
    assert torch.equal(found.repeat_interleave(own.shape[1] // groups, 1), own)


def test_a_rank_keeps_the_modulation_of_its_own_tokens_alone() -> None:
    """Rows with given frames, where every frame has its own."""
    model, kept = tiny_t2v_model(width=64, heads=8, blocks=1), {"activation_checkpointing": True, "given_frames": True}
    one, eight = (
        count_row_flops(model, 16, (16, 16), 5, sequence_parallel=size, **kept).activation_bytes for size in (1, 8)
    )
    assert eight < 0.13 * one


def test_operations_are_those_of_the_sample_and_what_is_done_twice_is_told() -> None:
    """Ranks that share a clip all run its encoder; of text to video they share all but the text's part."""
    model, text = tiny_model(), tiny_t2v_model()
    clips = [count_flops(model, (32, 32), sequence_parallel=size) for size in (1, 2)]
    rows = [count_row_flops(text, 4, (8, 8), 5, sequence_parallel=size) for size in (1, 2)]
    for one, two in (clips, rows):
        assert one.forward_flops == two.forward_flops
        assert one.recomputed_flops == 0
    again = [two.recomputed_flops / two.num_forward_flops for _, two in (clips, rows)]
    assert again[0] == pytest.approx(3 * clips[0].forward_flops["encoder"] / clips[0].num_forward_flops, rel=0.35)
    assert 0 < again[1] < 0.5
