"""Both embedders as wholes: presets, shapes, unseen sizes and times, how they start."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from regen_dist.config import load_config
from regen_dist.models.decoder import LocalMixing, fold_tokens, unfold_tokens
from regen_dist.models.embedder import Baseline, Regen, build_model
from regen_dist.models.encoder import Latents
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


@pytest.mark.parametrize("pattern", ["full", "window"])
@pytest.mark.parametrize("size", [(8, 56), (48, 24)])
@torch.no_grad()
def test_one_call_decodes_an_unseen_size_at_times_between_frames(size: tuple[int, int], pattern: str) -> None:
    """Nothing in the decoder is tied to a resolution, an aspect ratio, a number of frames or whole times."""
    model = _regen(decoder__attention={"pattern": pattern, "window": [2, 3, 3]})
    latents = model.encode(clips(2, 5, *size))
    times = torch.tensor([0.0, 0.5, 2.25, 4.0, 4.5, 1.0, 3.0]).expand(2, -1)
    frames = model.denoise(torch.randn(2, 3, 7, *size), torch.ones(2), latents, times)
    assert frames.shape == (2, 3, 7, *size)
    assert frames.dtype == torch.float32
    assert frames.isfinite().all()
    assert frames.std() > 1e-3


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
