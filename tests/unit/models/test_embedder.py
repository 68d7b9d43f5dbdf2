"""Embedders as wholes: presets, shapes, unseen sizes and times, starts, variants for ablations, and reach."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.config import load_config
from regen_dist.models.decoder import (
    LocalMixing,
    conv_decoder_receptive_field,
    decoder_receptive_field,
    encoder_receptive_field,
    fold_tokens,
    unfold_tokens,
)
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.encoder import Latents
from regen_dist.models.linear import LinearDecoder
from tests.helpers.tiny import clips, tiny_model, wake

WINDOWS = {"pattern": "window", "window": [2, 2, 2]}

PRESETS = sorted(Path("configs/embedder").glob("*.yaml"))


def _regen(k: int = 4, **changes: object) -> Regen:
    torch.manual_seed(0)
    model = build_model(tiny_model(k, **changes))
    assert isinstance(model, Regen)
    wake(model)
    return model


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_every_preset_builds(path: Path, root: Path) -> None:
    """On the meta device, where the full size costs nothing."""
    config = load_config(root / path)
    with torch.device("meta"):
        model = build_model(config.model)
        latents = model.encode(torch.empty(1, 3, config.model.num_frames, *config.data.size))
    height, width = config.data.size
    assert latents.content.shape == latents.motion.shape == (1, 8, height // 8, width // 8)


def test_presets_exist() -> None:
    """The glob above found the presets, so that it cannot pass by finding none."""
    names = {path.stem for path in PRESETS}
    assert names >= {"nano", *(f"{kind}_k{k}" for kind in ("regen", "magvit2") for k in (4, 8, 16, 32))}


@torch.no_grad()
def test_training_decodes_the_frames_of_the_clip() -> None:
    """`forward` is `encode` and then `denoise` at the times 0, 1, 2, ..., and returns the clean latents."""
    model, video = _regen(), clips()
    noisy, t = torch.randn_like(video), torch.tensor([1.0, 0.3])
    prediction, latents = model(video, noisy, t)
    times = torch.arange(5.0).expand(2, -1)
    torch.testing.assert_close(prediction, model.denoise(noisy, t, model.encode(video), times))
    noise = Latents(torch.ones(2, 8, 4, 4), torch.ones(2, 8, 4, 4))
    perturbed, clean = model(video, noisy, t, noise)
    assert torch.equal(clean.content, latents.content)
    assert not torch.allclose(perturbed, prediction, atol=1e-3)


@torch.no_grad()
def test_latent_noise_leaves_an_image_an_image() -> None:
    """Noise on the latents in training must not turn an image's zero motion latent into some motion."""
    model, image = _regen(conditioning__first_frame_rule=False), clips(2, 1)
    noise = torch.randn(2, 8, 4, 4)
    zero = torch.zeros_like(noise)
    args = (image, torch.randn_like(image), torch.ones(2))
    with_noise, without = model(*args, Latents(noise, noise))[0], model(*args, Latents(noise, zero))[0]
    assert torch.equal(with_noise, without)


@torch.no_grad()
def test_the_decoder_knows_places_by_the_conditioning_alone() -> None:
    """There is no other positional embedding: exchanging two frames' times exchanges the frames."""
    model = _regen()
    latents = model.encode(clips(1))
    noisy, order = torch.randn(1, 3, 5, 32, 32), [3, 0, 4, 1, 2]
    times = torch.arange(5.0)[None]
    straight = model.denoise(noisy, torch.ones(1), latents, times)
    shuffled = model.denoise(noisy[:, :, order], torch.ones(1), latents, times[:, order])
    torch.testing.assert_close(shuffled, straight[:, :, order], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("local", [False, True])
def test_the_decoder_mixes_tokens_by_attention_and_neighbours_alone(local: bool) -> None:
    """With one layer of windows, nothing outside a window changes a pixel inside it, bit for bit, but through the
    neighbours that a local convolution sees: no other part of the decoder looks over the whole clip."""
    model = _regen(
        decoder__blocks=1, decoder__local=local, decoder__attention={"pattern": "window", "window": [2, 2, 2]}
    )
    noisy, conditioning = torch.randn(1, 3, 4, 32, 32), torch.randn(1, 4, 4, 4, 32)
    before = model.decoder(noisy, torch.ones(1), conditioning)
    noisy[:, :, 2:] *= -1
    conditioning[:, 2:] *= -1
    cells = 3 if local else 2  # the window's columns, and their neighbours
    noisy[..., 8 * cells :] *= -1
    conditioning[:, :, :, cells:] *= -1
    after = model.decoder(noisy, torch.ones(1), conditioning)
    assert torch.equal(before[:, :, :2, :, :16], after[:, :, :2, :, :16])
    assert not torch.equal(before[:, :, 2:], after[:, :, 2:])


@torch.no_grad()
def test_training_starts_from_the_linear_code() -> None:
    """The head of a fresh transformer is zero; its blocks are open, so that they learn from the first step on."""
    torch.manual_seed(0)
    model = build_model(tiny_model())
    assert isinstance(model, Regen)
    x, modulation = torch.randn(2, 80, 32), model.decoder.modulation(torch.randn(2, 32))
    assert not modulation.any()
    for block in model.decoder.blocks:
        assert not torch.allclose(block(x, modulation, (5, 4, 4)), x, atol=0.1)
    video, times = clips(), torch.arange(5.0).expand(2, -1)
    prediction, latents = model(video, torch.randn_like(video), torch.ones(2))
    assert torch.equal(prediction, model.linear(*latents, times))


@torch.no_grad()
def test_local_mixing_is_a_convolution_over_each_frame() -> None:
    """Of the definition: each token gets the weighted sum of the 3x3 tokens around it, in its own frame and channel."""
    torch.manual_seed(0)
    local, (t, h, w), width = LocalMixing(8, heads=2), (2, 3, 4), 8
    local.bias.normal_()
    x = torch.randn(1, 5 + t * h * w, width)
    grid = x[0, 5:].view(t, h, w, width)
    expected = x.clone()
    for frame, row, column in product(range(t), range(h), range(w)):
        total = local.bias.clone()
        for down, right in product((-1, 0, 1), (-1, 0, 1)):
            if 0 <= row + down < h and 0 <= column + right < w:
                total += local.weight[:, 0, down + 1, right + 1] * grid[frame, row + down, column + right]
        expected[0, 5 + (frame * h + row) * w + column] += total
    torch.testing.assert_close(local(x, (t, h, w)), expected)


def test_activation_checkpointing_changes_no_gradient() -> None:
    """The recomputed forward pass gives the very same gradients."""
    gradients: list[list[Tensor]] = []
    for enabled in (False, True):
        model = _regen()
        model.set_activation_checkpointing(enabled)
        video = clips()
        noisy = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
        model(video, noisy, torch.tensor([1.0, 0.5]))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert len(gradients[-1]) == len(list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_activation_checkpointing_recomputes() -> None:
    """With it on, every block runs once more in the backward pass: the switch reaches encoder and decoder."""
    counts = []
    for enabled in (False, True):
        model, calls = _regen(), []
        model.set_activation_checkpointing(enabled)
        for part in (*(block.out for block in model.decoder.blocks), model.encoder.layers[0].conv_in):
            part.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        video = clips()
        model(video, video, torch.ones(2))[0].sum().backward()
        counts.append(len(calls))
    assert counts == [3, 6]


def test_tokens_are_patches_of_one_frame() -> None:
    """Folding and unfolding are inverse, and token (t, y, x) holds the pixels of that patch."""
    video = clips(2, 3, 16, 24)
    tokens = fold_tokens(video)
    assert torch.equal(unfold_tokens(tokens, (3, 2, 3)), video)
    token = tokens[1].unflatten(0, (3, 2, 3))[2, 1, 0]
    assert torch.equal(token, video[1, :, 2, 8:16, 0:8].flatten())


@pytest.mark.parametrize("k", [4, 8, 16, 32])
def test_the_baseline_has_the_same_encoder_and_latent_budget(k: int) -> None:
    """What is compared is the decoder alone: same encoder parameters (from one seed, even the same values), the same
    latents, and a reconstruction of the clip's shape from them."""
    models = []
    for kind in ("regen", "magvit2"):
        torch.manual_seed(0)
        models.append(build_model(tiny_model(k, kind=kind)))
    regen, baseline = models
    assert isinstance(baseline, Baseline)
    theirs = baseline.encoder.state_dict()
    assert regen.encoder.state_dict().keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in regen.encoder.state_dict().items())
    clip = clips(2, k + 1, 16, 24)
    with torch.no_grad():
        latents = baseline.encode(clip)
        assert all(torch.equal(a, b) for a, b in zip(regen.encode(clip), latents, strict=True))
        assert baseline.reconstruct(latents, k + 1).shape == clip.shape
        assert baseline.reconstruct(baseline.encode(clip[:, :, :1]), 1).shape == (2, 3, 1, 16, 24)
        assert baseline(clip)[0].shape == clip.shape


@torch.no_grad()
def test_the_baselines_decoder_is_causal() -> None:
    """The first frame of a clip is decoded from the content latent alone, the later ones from both."""
    torch.manual_seed(0)
    model = build_model(tiny_model(8, kind="magvit2"))
    assert isinstance(model, Baseline)
    content, motion = model.encode(clips(1, 9))
    frames, other = (model.reconstruct(Latents(content, m), 9) for m in (motion, -motion))
    assert torch.equal(frames[:, :, 0], other[:, :, 0])
    assert torch.equal(frames[:, :, :1], model.reconstruct(Latents(content, torch.zeros_like(motion)), 1))
    assert not torch.allclose(frames[:, :, 1:], other[:, :, 1:])


# The embedders' variants for ablations: each takes what the default takes, and learns as a whole.


VARIANTS: dict[str, dict[str, Any]] = {
    "in_context": {"conditioning__kind": "in_context"},
    "in_context_alone": {"conditioning__kind": "in_context", "decoder__linear": False},
    "learned_time": {"conditioning__time": "learned"},
    "no_linear_code": {"decoder__linear": False},
    "window": {"decoder__attention": {"pattern": "window", "window": [2, 3, 3]}},
    "no_first_frame_rule": {"conditioning__first_frame_rule": False},
    "bare": {"conditioning__time": "learned", "conditioning__first_frame_rule": False, "decoder__linear": False},
}


def _variant(name: str, *, fresh: bool = False) -> Regen:
    torch.manual_seed(0)
    model = build_model(tiny_model(**VARIANTS[name]))
    assert isinstance(model, Regen)
    if not fresh:
        wake(model)
    return model


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_any_size_and_any_times_can_be_decoded(name: str) -> None:
    """Nothing is tied to a resolution, an aspect ratio (here one patch high), a number of frames, whole times or their
    order; past the end, and an image."""
    model = _variant(name)
    latents = model.encode(clips(2, 5, 8, 56))
    times = torch.tensor([0.0, 0.5, 2.25, 4.5, 1.0, 3.0]).expand(2, -1)
    noise = torch.randn(2, 3, 1, 8, 56).expand(-1, -1, 6, -1, -1)  # what differs is the time
    frames = model.denoise(noise, torch.ones(2), latents, times)
    assert frames.shape == (2, 3, 6, 8, 56)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    assert frames.diff(dim=2).abs().amax((0, 1, 3, 4)).min() > 1e-3  # no two of the times look alike
    image = clips(2, 1, 24, 40)
    assert model(image, torch.randn_like(image), torch.ones(2))[0].shape == image.shape


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_every_parameter(name: str) -> None:
    """There is none that is built and not used, the encoder's included."""
    model, video = _variant(name), clips()
    noisy = torch.randn(video.shape, generator=torch.Generator().manual_seed(1))
    (model(video, noisy, torch.tensor([1.0, 0.4]))[0] - video).square().mean().backward()
    dead = [name for name, each in model.named_parameters() if each.grad is None or not each.grad.any()]
    assert dead == []


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_a_batch_is_its_samples(name: str) -> None:
    """Samples do not see each other, and each has times of its own."""
    model, video = _variant(name), clips()
    noisy, times, t = torch.randn(2, 3, 2, 32, 32), torch.tensor([[0.0, 1.5], [4.0, 2.0]]), torch.tensor([1.0, 0.3])
    both = model(video, noisy, t, times=times)[0]
    for one in (slice(0, 1), slice(1, 2)):
        alone = model(video[one], noisy[one], t[one], times=times[one])[0]
        torch.testing.assert_close(both[one], alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["in_context_alone", "no_linear_code", "bare"])
@torch.no_grad()
def test_without_the_linear_code_a_fresh_decoder_says_zero(name: str) -> None:
    """Nothing of it is built beside the decoder; the encoder keeps its own."""
    model, video = _variant(name, fresh=True), clips()
    assert not any(isinstance(module, LinearDecoder) for module in model.modules())
    assert not any(key.startswith("linear.") for key in model.state_dict())
    prediction, latents = model(video, torch.randn_like(video), torch.ones(2))
    assert not prediction.any()
    assert latents.content.std() > 0.05


@torch.no_grad()
def test_the_baselines_linear_code_is_a_choice_too() -> None:
    """Causal convolutions alone are left, which decode clips and images."""
    torch.manual_seed(0)
    model = build_model(tiny_model(kind="magvit2", decoder__linear=False))
    assert isinstance(model, Baseline)
    assert not any(isinstance(module, LinearDecoder) for module in model.modules())
    assert not model(clips())[0].any()
    wake(model)
    for video in (clips(), clips(2, 1)):
        decoded = model(video)[0]
        assert decoded.shape == video.shape
        assert decoded.std() > 1e-3


@torch.no_grad()
def test_without_the_first_frame_rule_motion_shows_in_the_first_frame() -> None:
    """As pixels, of the decoder alone; with the rule, and one frame at a time, it does not."""
    told = {}
    for rule in (True, False):
        torch.manual_seed(0)
        model = build_model(tiny_model(conditioning__first_frame_rule=rule, decoder__linear=False))
        assert isinstance(model, Regen)
        wake(model)
        latents, noisy = model.encode(clips(1)), clips(1, 1)
        args = (noisy, torch.ones(1))
        other = latents._replace(motion=-latents.motion)
        told[rule] = [model.denoise(*args, each, torch.zeros(1, 1)) for each in (latents, other)]
    assert torch.equal(*told[True])
    assert not torch.allclose(*told[False], atol=1e-3)


# How far the parts of an embedder see: never further than `reach` says, and about as far.


SIDE = 24  # cells
AT = SIDE // 2
WINDOWED: dict[str, Any] = {"decoder__attention": {"pattern": "window", "window": [5, 2, 3]}, "decoder__blocks": 4}


def _changed_cells(before: Tensor, after: Tensor) -> Tensor:
    """Rows and columns of cells that differ, [n, 2], of pixels or latents [1, C, (T,) H, W]."""
    differs = (before != after).flatten(0, -3).any(0).float()
    scale = differs.shape[0] // SIDE
    return torch.nn.functional.max_pool2d(differs[None, None], scale)[0, 0].nonzero()


def _model(**changes: Any) -> Regen | Baseline:
    torch.manual_seed(0)
    model = build_model(tiny_model(**changes))
    wake(model)
    return model.eval()


def _spread(cells: Tensor) -> list[int]:
    return (cells - AT).abs().amax(0).tolist()


@torch.no_grad()
def test_an_encoder_sees_as_far_as_its_convolutions_reach() -> None:
    model = _model()
    video = clips(1, 5, 8 * SIDE, 8 * SIDE)
    other = video.clone()
    other[..., 8 * AT : 8 * AT + 8, 8 * AT : 8 * AT + 8] *= -1
    both = [torch.cat(model.encode(each), 1) for each in (video, other)]
    found, reach = _spread(_changed_cells(*both)), encoder_receptive_field(tiny_model().encoder)
    assert reach.step == (1, 1)
    assert all(limit - 1 <= far <= limit for far, limit in zip(found, reach.cells, strict=True))


@torch.no_grad()
def test_the_baselines_decoder_sees_as_far_as_its_convolutions_reach() -> None:
    model = _model(kind="magvit2")
    assert isinstance(model, Baseline)
    latents = torch.randn(2, 1, 8, SIDE, SIDE)
    other = latents.clone()
    other[..., AT, AT] *= -1
    found = _spread(_changed_cells(*(model.reconstruct(Latents(*each), 5) for each in (latents, other))))
    reach = conv_decoder_receptive_field(tiny_model().encoder)
    assert decoder_receptive_field(tiny_model(kind="magvit2")) == reach
    assert all(limit - 1 <= far <= limit for far, limit in zip(found, reach.cells, strict=True))


@torch.no_grad()
@pytest.mark.parametrize(("local", "cells"), [(False, (4, 7)), (True, (5, 8))])
def test_windows_see_no_further_than_their_reach(local: bool, cells: tuple[int, int]) -> None:
    """Two of the four blocks are shifted, with windows of 2 x 3 cells; a local convolution adds a cell each."""
    config = {**WINDOWED, "decoder__local": local}
    model = _model(**config)
    assert isinstance(model, Regen)
    reach = decoder_receptive_field(tiny_model(**config))
    assert reach == (cells, (2, 3))
    noisy = torch.randn(1, 3, 5, 8 * SIDE, 8 * SIDE)
    latents, times = Latents(*torch.randn(2, 1, 8, SIDE, SIDE)), torch.arange(5.0)[None]
    other = Latents(latents.content.clone(), latents.motion)
    other.content[..., AT, AT] *= -1
    found = _spread(_changed_cells(*(model.denoise(noisy, torch.ones(1), each, times) for each in (latents, other))))
    assert 2 < found[0] <= cells[0]
    assert 3 < found[1] <= cells[1]


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_full_attention_sees_everything(kind: str) -> None:
    assert (decoder_receptive_field(tiny_model(kind=kind)) is None) == (kind == "regen")
