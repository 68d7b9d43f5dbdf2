"""Latents in context: tokens in front of the pixels', at ordinary positions; what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.models.conditioning import InContextConditioning, sinusoids
from regen_dist.models.embedder import Regen, build_model
from regen_dist.models.encoder import Latents
from regen_dist.models.flops import count_flops
from tests.helpers.tiny import clips, tiny_model, wake

H, W = 3, 4


def _config(**changes: Any) -> Any:
    return tiny_model(conditioning__kind="in_context", **changes)


def _regen() -> Regen:
    torch.manual_seed(0)
    model = build_model(_config())
    assert isinstance(model, Regen)
    wake(model)
    return model


def _latents(seed: int = 0) -> Latents:
    generator = torch.Generator().manual_seed(seed)
    return Latents(*(torch.randn(2, 8, H, W, generator=generator) for _ in range(2)))


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
