"""Noise is a function of its keys on every device."""

from __future__ import annotations

import torch

from regen_dist.diffusion.noise import NoiseStream, gaussian, uniforms

IDS = torch.tensor([5, 2**40])


def test_noise_on_a_gpu_is_that_of_the_cpu(device: torch.device) -> None:
    times = torch.arange(3.0).expand(2, -1)
    expected = gaussian(7, IDS, times, (9, 130), draw=3)
    found = gaussian(7, IDS.to(device), times.to(device), (9, 130), draw=3)
    assert found.device.type == "cuda"
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)  # logarithms and sines differ by device


def test_uniforms_on_a_gpu_are_those_of_the_cpu_bit_for_bit(device: torch.device) -> None:
    found = uniforms(7, IDS.to(device), 3, NoiseStream.TIMESTEP)
    assert torch.equal(found.cpu(), uniforms(7, IDS, 3, NoiseStream.TIMESTEP))
