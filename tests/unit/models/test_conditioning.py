"""Latent conditioning: real-valued time, by a SIREN, learned vectors or tokens in context; the first-frame rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.models.conditioning import InContextConditioning, LatentConditioning, TimeTable, sinusoids
from regen_dist.models.embedder import Regen, build_model
from regen_dist.models.encoder import Latents
from regen_dist.models.flops import count_flops
from tests.helpers.tiny import clips, tiny_model, wake

TIMES = ["siren", "learned"]


def _conditioning(k: int = 8, rule: bool = True, time: str = "siren") -> LatentConditioning:
    torch.manual_seed(0)
    return LatentConditioning(tiny_model(k, conditioning__first_frame_rule=rule, conditioning__time=time)).eval()


def _latents(seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    return Latents(*(torch.randn(2, 8, 3, 4, generator=generator) for _ in range(2)))


def _at(conditioning: LatentConditioning, latents: Latents, times: list[float]) -> Tensor:
    with torch.no_grad():
        return conditioning(latents, torch.tensor([times, times]))


def test_shape() -> None:
    """One embedding of the transformer's width for every latent cell and decoded frame."""
    assert _at(_conditioning(), _latents(), [0.0, 1.5, 8.0]).shape == (2, 3, 3, 4, 32)


@pytest.mark.parametrize("time", TIMES)
def test_an_image_and_the_first_frame_of_a_clip_are_conditioned_alike(time: str) -> None:
    """First-frame rule: at t = 0 C_e does not depend on the motion latent, so image and clip agree; without the rule
    they do not; later frames do depend on it."""
    clip = _latents()
    image = Latents(clip.content, torch.zeros_like(clip.motion))
    ruled, free = _conditioning(rule=True, time=time), _conditioning(rule=False, time=time)
    assert torch.equal(_at(ruled, clip, [0.0]), _at(ruled, image, [0.0]))
    torch.testing.assert_close(_at(ruled, clip, [0.0, 1, 2])[:, :1], _at(ruled, image, [0.0]))
    assert not torch.allclose(_at(free, clip, [0.0]), _at(free, image, [0.0]), atol=1e-2)
    assert not torch.allclose(_at(ruled, clip, [1.0]), _at(ruled, image, [1.0]), atol=1e-2)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("moment", [0.0, 1.0, 2.5, 8.0])
def test_continuous_in_time(moment: float, time: str) -> None:
    """C_e has no jump: at the first frame, where the motion latent fades in, at frames, between and at the end."""
    conditioning, latents, step = _conditioning(time=time), _latents(), 1e-3
    near = _at(conditioning, latents, [moment - step, moment, moment + step])
    frames = _at(conditioning, latents, [0.0, 1.0])
    frame_change = (frames[:, 1] - frames[:, 0]).abs().max()
    assert frame_change > 0.05
    assert near.diff(dim=1).abs().max() < 20 * step * frame_change


@pytest.mark.parametrize("time", TIMES)
def test_times_are_coordinates_and_not_places_in_a_list(time: str) -> None:
    """Any subset of the frames, in any order, gets the rows of the full C_e."""
    conditioning, latents = _conditioning(time=time), _latents()
    full = _at(conditioning, latents, [float(t) for t in range(9)])
    for subset in ([0, 2, 5], [7, 1], [3]):
        torch.testing.assert_close(_at(conditioning, latents, [float(t) for t in subset]), full[:, subset])


def test_samples_have_times_of_their_own() -> None:
    """Each sample of a batch is conditioned at its own times."""
    conditioning, latents = _conditioning(), _latents()
    with torch.no_grad():
        both = conditioning(latents, torch.tensor([[0.5], [6.0]]))
    torch.testing.assert_close(both[:1], _at(conditioning, latents, [0.5])[:1])
    torch.testing.assert_close(both[1:], _at(conditioning, latents, [6.0])[1:])


def test_cells_are_conditioned_by_their_own_latents_alone() -> None:
    """C_e is content-aware and local: another cell's latents do not change a cell's embedding."""
    conditioning, latents = _conditioning(), _latents()
    other = Latents(*(latent.clone() for latent in latents))
    for latent in other:
        latent[:, :, 0, 0] += 1
    different = (_at(conditioning, latents, [3.0]) - _at(conditioning, other, [3.0])).abs().amax((0, 1, 4)) > 1e-4
    assert different[0, 0]
    assert different.sum() == 1


@torch.no_grad()
def test_learned_vectors_are_interpolated_between_frames_and_held_beyond_them() -> None:
    """At a frame its own vector, bit for bit."""
    torch.manual_seed(0)
    table = TimeTable(8, 16)
    frames = table(torch.arange(9.0)[None])[0]
    assert torch.equal(frames, table.vectors)
    found = table(torch.tensor([[2.25, 7.5, 8.0, 9.5, -0.5]]))[0]
    torch.testing.assert_close(found[0], 0.75 * frames[2] + 0.25 * frames[3])
    torch.testing.assert_close(found[1], (frames[7] + frames[8]) / 2)
    assert torch.equal(found[2:], frames[[8, 8, 0]])


def test_learned_time_differs_from_the_siren_in_its_first_layer_alone() -> None:
    """The layers behind it have the same shapes and, from one seed of their own, do the same."""
    siren, learned = _conditioning(), _conditioning(time="learned")
    shapes = [{name: each.shape for name, each in model.named_parameters()} for model in (siren, learned)]
    assert {name for name in {*shapes[0], *shapes[1]} if shapes[0].get(name) != shapes[1].get(name)} == {
        "wave.weight", "wave.bias", "wave.vectors",
    }  # fmt: skip
    rest = {name: each for name, each in siren.state_dict().items() if not name.startswith("wave.")}
    learned.load_state_dict(rest, strict=False)
    learned.wave = siren.wave
    times = [0.0, 1.5, 8.0]
    assert torch.equal(_at(learned, _latents(), times), _at(siren, _latents(), times))


@torch.no_grad()
def test_both_times_begin_as_large() -> None:
    """What the layers behind them take has the spread of a sine's values, whichever it is."""
    torch.manual_seed(0)
    for time in TIMES:
        wave = LatentConditioning(tiny_model(8, conditioning__time=time, conditioning__width=256)).wave
        assert 0.5 < wave(torch.arange(9.0)[None]).std() < 0.8


# Latents in context: tokens in front of the pixels', at ordinary positions; what they cost.


H, W = 3, 4


def _config(**changes: Any) -> Any:
    return tiny_model(conditioning__kind="in_context", **changes)


def _regen() -> Regen:
    torch.manual_seed(0)
    model = build_model(_config())
    assert isinstance(model, Regen)
    wake(model)
    return model


@torch.no_grad()
def test_each_latent_cell_is_one_token_at_its_place() -> None:
    """Content before motion, in row-major order; what is not position is a function of the cell's latent alone."""
    torch.manual_seed(0)
    conditioning, latents = InContextConditioning(_config()), _latents()
    told = conditioning(latents, torch.tensor([[0.0, 2.5], [1.0, 4.0]]))
    assert told.positions.shape == (2, 2, H, W, 32)
    assert told.tokens.shape == (2, 2 * H * W, 32)
    places = sinusoids(torch.tensor([[-2.0, -1.0]]), H, W, 32)[0]
    y, x = 2, 1
    parts = zip((conditioning.content, conditioning.motion), latents, strict=True)
    for kind, (project, latent) in enumerate(parts):
        token = told.tokens[1].unflatten(0, (2, H, W))[kind, y, x]
        torch.testing.assert_close(token, project(latent[1, :, y, x]) + places[kind, y, x])


def test_every_place_has_an_embedding_of_its_own() -> None:
    """Frames, rows and columns, and times between frames; all as large."""
    times = torch.tensor([[-2.0, -1.0, 0.0, 0.5, 1.0, 7.0, 32.0]])
    found = sinusoids(times, 5, 6, 32).flatten(0, 3)
    distances = torch.cdist(found, found) + 10 * torch.eye(len(found))
    assert distances.min() > 0.1
    torch.testing.assert_close(found.square().sum(-1), torch.full((7 * 5 * 6,), 16.0))


def test_times_are_real_numbers() -> None:
    """An embedding moves continuously with the time, and rows and columns stay as they are."""
    near = sinusoids(torch.tensor([[2.999, 3.0, 3.001]]), H, W, 32)
    assert 0 < near.diff(dim=1).abs().max() < 2e-3
    moved = near.diff(dim=1).abs().amax((0, 1, 2, 3)) > 0
    assert moved.nonzero().max() < 10  # a third of 16 pairs, rounded down: 5


def test_any_width_can_be_told() -> None:
    for width in (2, 7, 30, 33):
        assert sinusoids(torch.zeros(1, 2), H, W, width).shape == (1, 2, H, W, width)


@torch.no_grad()
def test_tokens_of_the_context_are_told_apart_by_their_positions_alone() -> None:
    """In another order they say the same; without them the decoder says something else."""
    model = _regen()
    noisy, latents = torch.randn(2, 3, 3, 8 * H, 8 * W), _latents()
    told = model.conditioning(latents, torch.tensor([[0.0, 1.5, 4.0]] * 2))
    straight = model.decoder(noisy, torch.ones(2), *told)
    order = torch.randperm(told.tokens.shape[1], generator=torch.Generator().manual_seed(1))
    turned = model.decoder(noisy, torch.ones(2), told.positions, told.tokens[:, order])
    assert straight.shape == noisy.shape
    torch.testing.assert_close(turned, straight, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.decoder(noisy, torch.ones(2), told.positions), straight, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("latent", ["content", "motion"])
def test_every_latent_cell_reaches_every_pixel_token(latent: str) -> None:
    """In the first block already, whose attention sees them all: nothing ties a cell to pixels but its position."""
    model, latents = _regen(), _latents()
    changed = latents._replace(**{latent: getattr(latents, latent).clone()})
    getattr(changed, latent)[:, :, 0, 0] += 1

    def first_block(seen: Latents) -> Tensor:
        told = model.conditioning(seen, torch.tensor([[0.0, 3.0]] * 2))
        x = torch.cat([told.tokens, told.positions.flatten(1, 3)], 1)
        grid, modulation = (2, H, W), model.decoder.modulation(model.decoder.timestep(torch.ones(2)))
        return model.decoder.blocks[0](x, modulation, grid)[:, 2 * H * W :]  # type: ignore[no-any-return]

    difference = (first_block(latents) - first_block(changed)).abs().amax((0, 2))
    assert difference.shape == (2 * H * W,)
    assert (difference > 1e-6).all()


def test_activation_checkpointing_changes_no_gradient() -> None:
    gradients = []
    for enabled in (False, True):
        model, video = _regen(), clips()
        model.set_activation_checkpointing(enabled)
        model(video, video.flip(0), torch.tensor([1.0, 0.5]))[0].square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(a is not None and torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_operations_equal_the_formula() -> None:
    """Latent tokens go through every block and the head, where they are dropped, and through no patch embedding."""
    config, cells, frames = _config(temporal_compression=4), 4 * 6, 5
    width, hidden, tokens = 32, 64, (5 + 2) * cells
    counted = count_flops(config, (32, 48))
    multiplications = 2 * tokens * (4 * width**2 + 2 * width * hidden + 2 * width * tokens)  # two blocks
    multiplications += 2 * frames * cells * 9 * width  # their local convolutions
    multiplications += (frames * cells + tokens) * width * 192  # embedding and head
    multiplications += 256 * width + width**2 + (6 + 2 + 1) * width**2  # the timestep's way in
    assert counted.forward_flops["decoder"] == 2 * multiplications
    assert counted.forward_flops["conditioning"] == 2 * 2 * cells * 8 * width
    without = count_flops(tiny_model(), (32, 48))
    assert counted.forward_flops["decoder"] > without.forward_flops["decoder"]
    assert counted.activation_bytes > without.activation_bytes
