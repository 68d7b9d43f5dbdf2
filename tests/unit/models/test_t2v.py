"""The text-to-video transformer: shapes that it takes, what text and padding do, how it begins."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.config import load_config
from regen_dist.config.t2v import T2VModelConfig
from regen_dist.errors import DataError
from regen_dist.models.embedder import build_model
from regen_dist.models.t2v import TextToVideo, fold_latents, frame_places, token_positions, unfold_latents
from tests.helpers.tiny import tiny_t2v_model, wake

TEXT, TOKENS = 12, 5


def _model(**changes: Any) -> TextToVideo:
    """With everything open that starts closed."""
    torch.manual_seed(0)
    model = build_model(tiny_t2v_model(**changes))
    wake(model)
    return model


def _inputs(frames: int = 4, h: int = 4, w: int = 6, batch: int = 2) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, 8, frames, h, w, generator=generator)
    text = torch.randn(batch, TOKENS, TEXT, generator=generator)
    return x, torch.linspace(0.3, 1.0, batch), text, torch.ones(batch, TOKENS, dtype=torch.bool)


@pytest.mark.parametrize(("frames", "h", "w"), [(1, 4, 6), (2, 4, 6), (8, 2, 2), (14, 10, 4)])
def test_any_size_and_number_of_clips_is_taken(frames: int, h: int, w: int) -> None:
    """An image, and rows of 1, 4 and 7 clips: one model, no table to grow."""
    x, *rest = _inputs(frames, h, w)
    velocity = _model()(x, *rest)
    assert velocity.shape == x.shape
    assert velocity.dtype == torch.float32
    assert velocity.isfinite().all()


def test_tokens_fold_and_unfold() -> None:
    x, *_ = _inputs()
    tokens = fold_latents(x)
    assert tokens.shape == (2, 4 * 2 * 3, 32)
    assert torch.equal(tokens[0, 4].view(8, 2, 2), x[0, :, 0, 2:4, 2:4])  # frame 0, second row, second column
    assert torch.equal(unfold_latents(tokens, (4, 2, 3)), x)


def test_places_are_shares_of_the_frame() -> None:
    """The middle of a frame is told alike at any size and in every latent frame, corners are not."""
    small, large = (frame_places(grid, torch.device("cpu")).view(*grid, -1) for grid in ((2, 3, 5), (4, 9, 15)))
    torch.testing.assert_close(small[0, 1, 2], large[3, 4, 7])
    assert torch.equal(small[0], small[1])
    assert len({tuple(place.tolist()) for place in small[0].flatten(0, 1)}) == 15


def test_a_token_knows_where_in_its_frame_it_lies() -> None:
    """Equal tokens everywhere: without places, positions that are only relative leave them nearly alike."""
    model, (x, t, text, mask) = _model(), _inputs(frames=2)
    velocity = model(torch.ones_like(x), t, text, mask)
    corners = velocity[:, :, 0, :2, :2] - velocity[:, :, 0, 2:, 4:]
    with torch.no_grad():
        model.place.project.weight.zero_()
        model.place.project.bias.zero_()
    velocity = model(torch.ones_like(x), t, text, mask)
    without = velocity[:, :, 0, :2, :2] - velocity[:, :, 0, 2:, 4:]
    assert corners.abs().mean() > 3 * without.abs().mean()


def test_content_and_motion_of_a_clip_are_at_one_place() -> None:
    positions = token_positions((5, 2, 3), torch.device("cpu")).view(5, 2, 3, 3)
    assert positions[:, 0, 0, 0].tolist() == [0, 0, 1, 1, 2]
    assert torch.equal(positions[0], positions[1])
    assert positions[4, 1, 2].tolist() == [2, 1, 2]


def test_content_and_motion_are_told_apart() -> None:
    """The two frames of a clip changed for each other: another result, which the kind alone can make."""
    x, *rest = _inputs(frames=2)
    model = _model()
    swapped = model(x.flip(2), *rest).flip(2)
    assert not torch.allclose(swapped, model(x, *rest), atol=1e-3)
    torch.nn.init.zeros_(model.kind.table)
    torch.testing.assert_close(model(x.flip(2), *rest).flip(2), model(x, *rest), rtol=1e-4, atol=1e-4)


def test_a_fresh_model_predicts_zero() -> None:
    model = build_model(tiny_t2v_model())
    assert not model(*_inputs()).any()


def test_a_fresh_model_learns() -> None:
    """What is closed at the start opens: after a few steps every parameter has had a gradient."""
    model = build_model(tiny_t2v_model())
    x, *rest = _inputs()
    for _ in range(4):
        model.zero_grad()
        (model(x, *rest) - x).square().mean().backward()
        with torch.no_grad():
            for each in model.parameters():
                each.sub_(each.grad)
    silent = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert silent == []


def test_padding_changes_nothing() -> None:
    """Two captions of 5 and 3 tokens, padded to 5 and to 9 and filled with anything: the velocity of each alone."""
    model = _model()
    x, t, text, mask = _inputs()
    mask[1, 3:] = False
    alone = torch.cat([model(x[:1], t[:1], text[:1], mask[:1]), model(x[1:], t[1:], text[1:, :3], mask[1:, :3])])
    torch.testing.assert_close(model(x, t, text, mask), alone, rtol=1e-5, atol=1e-5)
    longer = torch.cat([text, torch.full((2, 4, TEXT), 30.0)], 1)
    padded = torch.cat([mask, torch.zeros(2, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(model(x, t, longer, padded), alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model(x, t, longer, padded.byte()), alone, rtol=1e-5, atol=1e-5)  # as caches keep it


def test_text_and_time_matter() -> None:
    model = _model()
    x, t, text, mask = _inputs()
    velocity = model(x, t, text, mask)
    assert not torch.allclose(model(x, t, text.flip(0), mask), velocity, atol=1e-3)
    assert not torch.allclose(model(x, t / 2, text, mask), velocity, atol=1e-3)


def test_a_time_for_each_frame() -> None:
    """The same time for all frames is the row's time; another one for one frame changes what the model says of all,
    and of the frames whose time it is most."""
    model = _model()
    x, t, text, mask = _inputs()
    velocity = model(x, t, text, mask)
    each = t[:, None].expand(2, 4).clone()
    torch.testing.assert_close(model(x, each, text, mask), velocity, rtol=1e-5, atol=1e-5)
    each[:, 0] = 0
    change = (model(x, each, text, mask) - velocity).abs().mean((0, 1, 3, 4))
    assert change.argmax() == 0
    assert (change > 1e-4).all()


def test_times_of_other_frames_are_refused() -> None:
    x, t, text, mask = _inputs()
    with pytest.raises(DataError, match="times of 3 latent frames, the row has 4"):
        _model()(x, t[:, None].expand(2, 3), text, mask)


def test_a_dropped_caption_stands_beside_others() -> None:
    """The null text has one token: in a padded batch beside a caption it gives what it gives alone, and no NaN."""
    model = _model()
    x, t, text, mask = _inputs()
    mask[0, 1:] = False
    velocity = model(x, t, text, mask)
    torch.testing.assert_close(velocity[:1], model(x[:1], t[:1], text[:1, :1], mask[:1, :1]), rtol=1e-5, atol=1e-5)
    assert velocity.isfinite().all()


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_backends_agree(backend: str) -> None:
    x, t, text, mask = _inputs()
    mask[1, 2:] = False
    expected = _model()(x, t, text, mask)
    torch.testing.assert_close(_model(attention__backend=backend)(x, t, text, mask), expected, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, recomputed = _model(), _model()
    recomputed.set_activation_checkpointing(True)
    for model in (plain, recomputed):
        model(*_inputs()).square().mean().backward()
    for (name, one), two in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        assert one.grad is not None, name
        assert two.grad is not None, name
        torch.testing.assert_close(two.grad, one.grad, rtol=0, atol=0, msg=name)


def test_weights_in_bf16_take_inputs_in_float32() -> None:
    """The result is float32, close to that of the same weights in float32."""
    model = _model()
    half = copy.deepcopy(model).bfloat16()
    velocity, expected = half(*_inputs()), model(*_inputs())
    assert velocity.dtype == torch.float32
    assert (velocity - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize(
    ("shape", "text", "message"),
    [
        ((1, 8, 2, 3, 4), TEXT, r"latents of 3x4 cells .* sides of the video must be multiples of 16"),
        ((1, 8, 2, 4, 5), TEXT, r"latents of 4x5 cells"),
        ((1, 4, 2, 4, 4), TEXT, r"\[batch, 8, frames, h, w\], found \[1, 4, 2, 4, 4\]; model.latent_channels"),
        ((1, 8, 2, 4, 4), TEXT + 1, r"\[batch, tokens, 12\], found \[1, 5, 13\]; model.text_width"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(shape: tuple[int, ...], text: int, message: str) -> None:
    mask = torch.ones(1, TOKENS, dtype=torch.bool)
    with pytest.raises(DataError, match=message):
        _model()(torch.zeros(shape), torch.ones(1), torch.zeros(1, TOKENS, text), mask)


@pytest.mark.parametrize(("preset", "fewest", "most"), [("5b", 4.8e9, 5.2e9), ("1b", 0.9e9, 1.1e9), ("nano", 2e6, 4e6)])
def test_presets_have_the_parameters_of_their_names(root: Path, preset: str, fewest: float, most: float) -> None:
    config = load_config(root / f"configs/t2v/{preset}.yaml").model
    assert isinstance(config, T2VModelConfig)
    with torch.device("meta"):
        model = build_model(config)
    assert fewest < sum(each.numel() for each in model.parameters()) < most


@torch.no_grad()
def test_text_is_padded_to_few_lengths_on_gpus_and_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths of 5, 63 and 64 tokens reach the kernel as 64; the velocity is that without padding."""
    from regen_dist.models import t2v

    model = build_model(tiny_t2v_model())
    wake(model)
    lengths: list[int] = []
    attend = t2v.cross_attention
    monkeypatch.setattr(t2v, "cross_attention", lambda q, k, *rest: lengths.append(k.shape[2]) or attend(q, k, *rest))  # type: ignore[func-returns-value]
    x, t, generator = torch.randn(2, 8, 2, 4, 4), torch.full((2,), 0.5), torch.Generator().manual_seed(0)
    for tokens in (5, 63, 64):
        text = torch.randn(2, tokens, 12, generator=generator)
        mask = torch.arange(tokens) < torch.tensor([[tokens], [2]])
        expected = model(x, t, text, mask)
        monkeypatch.setitem(t2v._TEXT_MULTIPLE, "cpu", 64)
        lengths.clear()
        torch.testing.assert_close(model(x, t, text, mask), expected, rtol=1e-4, atol=1e-5)
        assert set(lengths) == {64}
        monkeypatch.delitem(t2v._TEXT_MULTIPLE, "cpu")


def test_padded_texts_avoid_lengths_at_which_cudnn_gives_nan() -> None:
    """64 modulo 128, in its backward pass with a mask."""
    from regen_dist.models import t2v

    for tokens in (1, 64, 77, 128, 129, 300):
        text, mask = t2v.padded_text(torch.ones(1, tokens, 4), torch.ones(1, tokens), t2v._TEXT_MULTIPLE["cuda"])
        assert text.shape[1] == mask.shape[1]
        assert text.shape[1] % 128 == 0
