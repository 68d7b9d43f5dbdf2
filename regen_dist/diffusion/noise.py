"""Random numbers as a pure function of their purpose: a counter-based generator, Philox4x32-10 (Salmon et al., SC
2011).

No state, no order: the noise of a pixel depends on (seed, sample id, frame time, y, x) alone. The same video therefore
gets the same noise whatever the batch it is in, the rank that holds it, the tile or the window that is being decoded,
and resuming needs no saved generator.

Legend: B batch, C channels (up to 4), T frames, H rows, W columns. Words are 32-bit, held in int64 tensors.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import IntEnum

import torch
from torch import Tensor
from torch.profiler import record_function

from regen_dist.errors import DataError

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
TICKS_PER_FRAME = 1024  # frame times are keyed in steps of 1/1024 of a frame
STREAM_BITS = 8  # bits of the stream, in the word that it shares with the ticks' bits beyond 32
LONGEST_SIDE = 1 << 16
PLANE = 4  # normals that one call of the generator gives
CHUNK = 1 << 13  # counters at a time, so that the rounds stay in a CPU's cache
_GPU_NUMBERS = 1 << 24  # counters at a time on a GPU, of some 90 bytes each


class NoiseStream(IntEnum):
    """Purpose of random numbers; one sample's streams are independent of each other."""

    PIXELS = 0
    TIMESTEP = 1
    LATENT_CONTENT = 2
    LATENT_MOTION = 3
    LATENT_ROW = 4
    TEXT = 5
    FRAMES = 6
    GIVEN = 7
    PERCEPTUAL = 8


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10: four counter words and two key words (int64 tensors that broadcast, values below 2**32) to four
    random words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for step in range(ROUNDS):
        product0, product1 = (
            c0 * MULTIPLIERS[0],
            c2 * MULTIPLIERS[1],
        )  # wraps modulo 2**64, which keeps both halves' bits
        c0, c2 = ((product1 >> 32) & MASK) ^ c1 ^ k0, ((product0 >> 32) & MASK) ^ c3 ^ k1
        c1, c3 = product1 & MASK, product0 & MASK
        if step + 1 < ROUNDS:
            k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def _mix(z: Tensor) -> Tensor:
    """The finaliser of SplitMix64 (Steele et al., 2014) on int64 tensors: spreads every bit over all bits."""
    z = (z ^ _shift(z, 30)) * -0x40A7B892E31B1A47
    z = (z ^ _shift(z, 27)) * -0x6B2FB644ECCEEE15
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def sample_keys(seed: int, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the two key words of each sample. seed below 2**63, sample_ids int64 [B] to two int64 [B]."""
    mixed = _mix(_mix(sample_ids.long() + 1) ^ seed)
    return mixed & MASK, _shift(mixed, 32)


def _uniform(word: Tensor) -> Tensor:
    """Map a word to float32 in (0, 1): the centre of one of 2**23 cells, so neither end is ever reached."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


def _normals(words: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Map four words to four standard normals (Box and Muller, 1958)."""
    out: tuple[Tensor, ...] = ()
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log(_uniform(first)))
        angle = _uniform(second) * (2.0 * math.pi)
        out += (radius * torch.cos(angle), radius * torch.sin(angle))
    return out


def uniforms(seed: int, sample_ids: Tensor, draw: int, stream: NoiseStream) -> Tensor:
    """Four uniform numbers in (0, 1) for each sample and draw: sample_ids [B] to float32 [B, 4]."""
    zero = torch.zeros_like(sample_ids)
    words = philox((zero, zero, zero + (draw & MASK), zero + int(stream)), sample_keys(seed, sample_ids))
    return torch.stack([_uniform(word) for word in words], -1)


def gaussian(
    seed: int,
    sample_ids: Tensor,
    times: Tensor,
    size: tuple[int, int],
    *,
    channels: int = 3,
    origin: tuple[int, int] = (0, 0),
    draw: int = 0,
    stream: NoiseStream = NoiseStream.PIXELS,
) -> Tensor:
    """Standard normal noise of a video, keyed by (seed, sample id, frame time, y, x).

    Args:
        seed: seed of the run, below 2**63.
        sample_ids: int64 [B].
        times: times of the frames, counted in the video's own frames, real, [B, T]; equal times get equal noise.
        size: H, W of the part that is wanted.
        channels: up to 4.
        origin: row and column of the part's first pixel in the whole frame: the noise of a tile is a cut from the whole
            frame's noise.
        draw: the training step, or 0.
        stream: purpose of the noise.

    Returns:
        float32 [B, channels, T, H, W].

    Raises:
        DataError: a row or column of 65536 or more.
    """
    with record_function("noise"):  # its name in a profile
        return _gaussian(seed, sample_ids, times, size, channels, origin, draw, stream)


def _gaussian(
    seed: int,
    sample_ids: Tensor,
    times: Tensor,
    size: tuple[int, int],
    channels: int,
    origin: tuple[int, int],
    draw: int,
    stream: NoiseStream,
) -> Tensor:
    ticks = torch.round(times.double() * TICKS_PER_FRAME).long()  # [B, T]
    low, last = ticks & MASK, int(stream) | (((ticks >> 32) & (MASK >> STREAM_BITS)) << STREAM_BITS)
    (height, width), device = size, sample_ids.device
    place = _places(size, origin, device)
    keys = sample_keys(seed, sample_ids)
    out = torch.empty(*ticks.shape, channels, height * width, device=device)  # [B, T, C, H*W]
    for rows, start, stop in _portions(len(ticks), ticks.shape[1], place.numel(), device):
        part = place[None, None, start:stop]  # [1, 1, n]
        key = (keys[0][rows, None, None], keys[1][rows, None, None])
        counter = (part, low[rows, :, None], torch.full_like(part, draw & MASK), last[rows, :, None])
        out[rows, :, :, start:stop] = torch.stack(_normals(philox(counter, key))[:channels], 2)
    video: Tensor = out.unflatten(-1, (height, width))  # [B, T, C, H, W]
    return video.transpose(1, 2)


def _portions(samples: int, frames: int, places: int, device: torch.device) -> Iterator[tuple[slice, int, int]]:
    """Yield the portions that are drawn at a time, as (samples, first place, end). On a CPU a portion fits into its
    cache. On a GPU, where every portion starts more than a hundred kernels, it takes about 1.5 GB."""
    at_once = CHUNK if device.type == "cpu" else max(CHUNK, _GPU_NUMBERS // frames)
    for sample in range(samples):
        for start in range(0, places, max(at_once, 1)):
            yield slice(sample, sample + 1), start, min(start + at_once, places)


def _places(size: tuple[int, int], origin: tuple[int, int], device: torch.device) -> Tensor:
    """Return one word per pixel, [H*W]: half of its bits for the row, half for the column."""
    if any(start < 0 or start + length > LONGEST_SIDE for start, length in zip(origin, size, strict=True)):
        raise DataError(
            f"noise is keyed by rows and columns from 0 to {LONGEST_SIDE - 1}; asked for {size[0]}x{size[1]} pixels "
            f"from row {origin[0]}, column {origin[1]}: resize the video"
        )
    rows, columns = (torch.arange(n, device=device) + start for n, start in zip(size, origin, strict=True))
    return ((rows[:, None] << 16) | columns).flatten()


def latent_gaussian(
    seed: int,
    sample_ids: Tensor,
    num_frames: int,
    channels: int,
    size: tuple[int, int],
    *,
    draw: int = 0,
    stream: NoiseStream = NoiseStream.LATENT_ROW,
) -> Tensor:
    """Standard normal noise of latent frames, keyed by (seed, sample id, frame, channel, y, x).

    The first frames are the same however many follow, and a smaller grid's noise is a cut from a larger one's. The key
    holds the number of planes of four channels: with 5 to 8 channels the noise is another than with 4, but the first
    channels of 5 and of 8 are the same.

    Args:
        seed: seed of the run, below 2**63.
        sample_ids: int64 [B].
        num_frames: F, latent frames.
        channels: C, any number.
        size: h, w in latent cells.
        draw: the training step, or 0.
        stream: purpose of the noise.

    Returns:
        float32 [B, C, F, h, w].
    """
    planes = -(-channels // PLANE)  # the generator gives four channels a plane
    places = torch.arange(num_frames * planes, device=sample_ids.device).expand(len(sample_ids), -1)
    noise = gaussian(seed, sample_ids, places, size, channels=PLANE, draw=draw, stream=stream)  # [B, 4, F*planes, h, w]
    frames = noise.unflatten(2, (num_frames, planes)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)  # [B, F, 4*planes, h, w]
    row: Tensor = frames[:, :, :channels].transpose(1, 2)
    return row
