"""Counter-based noise and timestep densities: functions of their key alone, with the published distributions."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from regen_dist.config.embedder import DensityConfig
from regen_dist.diffusion import noise
from regen_dist.diffusion.noise import CHUNK, NoiseStream, gaussian, latent_gaussian, philox, uniforms
from regen_dist.diffusion.path import SMALLEST, timesteps
from regen_dist.errors import DataError

# Random123's known answers for Philox4x32-10 (file kat_vectors of the reference implementation).
KNOWN_ANSWERS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def _words(text: str) -> tuple[Tensor, ...]:
    return tuple(torch.tensor([int(word, 16)]) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    """The generator is Philox4x32-10 and no lookalike."""
    found = philox(_words(counter), _words(key))  # type: ignore[arg-type]
    assert " ".join(f"{int(word):08x}" for word in found) == expected


IDS = torch.tensor([3, 77, 2**62 - 1])
TIMES = torch.tensor([[0.0, 1.0, 2.0, 2.5]] * 3)


def _whole(**changes: object) -> Tensor:
    return gaussian(**{"seed": 5, "sample_ids": IDS, "times": TIMES, "size": (24, 40), **changes})  # type: ignore[arg-type]


def test_shape_and_repeatability() -> None:
    """Float32 [B, C, T, H, W], the same at every call, whatever torch's own generator did meanwhile."""
    first = _whole()
    torch.randn(7)
    assert first.shape == (3, 3, 4, 24, 40)
    assert first.dtype == torch.float32
    assert torch.equal(first, _whole())
    assert torch.equal(first, _whole(channels=4)[:, :3])


def test_tilings_get_cuts_of_one_noise() -> None:
    """The noise of a tile is a cut from the whole frame's noise, bit for bit, wherever the tile lies."""
    whole = _whole()
    for top, left, height, width in ((0, 0, 8, 8), (8, 16, 16, 24), (3, 5, 7, 1), (23, 39, 1, 1)):
        tile = _whole(size=(height, width), origin=(top, left))
        assert torch.equal(tile, whole[..., top : top + height, left : left + width])


def test_a_frame_larger_than_the_working_chunk_has_no_seam() -> None:
    """Pixels are worked on in pieces; where a piece ends must not show."""
    side = int(CHUNK**0.5) + 9
    large = gaussian(1, IDS[:1], TIMES[:1, :1], (side, side))
    tile = gaussian(1, IDS[:1], TIMES[:1, :1], (20, side), origin=(side - 20, 0))
    assert torch.equal(large[..., -20:, :], tile)


def test_batches_do_not_matter() -> None:
    """A sample's noise is the same alone, in another order, and beside other samples: so on any rank."""
    whole = _whole()
    order = [2, 0, 1]
    assert torch.equal(_whole(sample_ids=IDS[order], times=TIMES[order]), whole[order])
    for place in range(3):
        assert torch.equal(_whole(sample_ids=IDS[place, None], times=TIMES[place, None]), whole[place, None])


def test_times_are_keys_and_not_places() -> None:
    """Any subset of frames in any order gets its rows; windows that overlap in time share noise there."""
    whole, order = _whole(), [3, 1]
    assert torch.equal(_whole(times=TIMES[:, order]), whole[:, :, order])
    twice = _whole(times=torch.tensor([[1.0, 1.0]] * 3))
    assert torch.equal(twice[:, :, 0], twice[:, :, 1])
    assert torch.equal(_whole(times=TIMES.double()), whole)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 6},
        {"seed": 2**62},
        {"draw": 1},
        {"stream": NoiseStream.LATENT_CONTENT},
        {"stream": NoiseStream.LATENT_MOTION},
        {"sample_ids": IDS + 1},
        {"times": TIMES + 0.5},
        {"times": TIMES - 8},
        {"origin": (1, 0)},
        {"origin": (0, 1)},
    ],
    ids=lambda change: "-".join(change),
)
def test_every_part_of_the_key_matters(change: dict[str, object]) -> None:
    """Another seed, step, stream, sample, time or place gives noise that is unrelated at every pixel."""
    whole, other = _whole(), _whole(**change)
    assert (whole == other).double().mean() < 1e-3
    correlation = (whole * other).mean()
    assert abs(correlation) < 5 / whole.numel() ** 0.5


def test_moments_of_a_standard_normal() -> None:
    """Mean, variance, skewness and kurtosis lie within five standard errors of a normal's, for each channel."""
    noise = gaussian(0, torch.arange(4), torch.arange(8.0).expand(4, -1), (64, 64), channels=4)
    for channel in noise.unbind(1):
        x, count = channel.double().flatten(), channel.numel()
        assert abs(x.mean()) < 5 * (1 / count) ** 0.5
        assert abs(x.var() - 1) < 5 * (2 / count) ** 0.5
        assert abs((x**3).mean()) < 5 * (15 / count) ** 0.5
        assert abs((x**4).mean() - 3) < 5 * (96 / count) ** 0.5
        assert 4 < x.abs().max() < 6


def test_no_correlation_between_neighbours() -> None:
    """Channels, frames, rows, columns and samples that follow each other are uncorrelated, their squares too."""
    noise = gaussian(0, torch.arange(4), torch.arange(8.0).expand(4, -1), (64, 64), channels=4).double()
    for axis in range(5):
        for values in (noise, noise.square() - 1):
            before, after = (
                values.narrow(axis, 0, values.shape[axis] - 1),
                values.narrow(axis, 1, values.shape[axis] - 1),
            )
            spread = values.square().mean()
            assert abs((before * after).mean() / spread) < 5 / before.numel() ** 0.5


def test_uniforms() -> None:
    """Four numbers a sample, in (0, 1), keyed by seed, sample, draw and stream, evenly spread."""
    ids = torch.arange(20_000)
    numbers = uniforms(1, ids, 7, NoiseStream.TIMESTEP)
    assert numbers.shape == (20_000, 4)
    assert numbers.min() > 0
    assert numbers.max() < 1
    assert torch.equal(numbers[11:13], uniforms(1, ids[11:13], 7, NoiseStream.TIMESTEP))
    for other in (
        uniforms(2, ids, 7, NoiseStream.TIMESTEP),
        uniforms(1, ids, 8, NoiseStream.TIMESTEP),
        uniforms(1, ids, 7, NoiseStream.PIXELS),
    ):
        assert abs(((numbers - 0.5) * (other - 0.5)).mean() * 12) < 5 / numbers.numel() ** 0.5
    shares = torch.histc(numbers, 10, 0, 1) / numbers.numel()
    assert (shares - 0.1).abs().max() < 5 * (0.09 / numbers.numel()) ** 0.5


class TestLatentNoise:
    """Noise of rows of latent frames."""

    @staticmethod
    def _row(frames: int = 4, channels: int = 8, size: tuple[int, int] = (4, 6), **changes: object) -> Tensor:
        return latent_gaussian(5, IDS, frames, channels, size, **changes)  # type: ignore[arg-type]

    def test_shape_and_repeatability(self) -> None:
        assert self._row().shape == (3, 8, 4, 4, 6)
        assert self._row().dtype == torch.float32
        assert torch.equal(self._row(), self._row())

    def test_what_a_longer_or_larger_row_shares(self) -> None:
        """The first frames whatever follows, the top left cells of a larger grid, the first of up to as many channels
        as make a plane more; a plane more is other noise."""
        whole = self._row()
        assert torch.equal(self._row(frames=9)[:, :, :4], whole)
        assert torch.equal(self._row(size=(7, 9))[..., :4, :6], whole)
        assert torch.equal(self._row(channels=6), whole[:, :6])
        assert not torch.equal(self._row(channels=4)[:, :, 1], whole[:, :4, 1])

    def test_samples_are_their_own(self) -> None:
        """In any batch; other seeds, steps and samples give other noise."""
        assert torch.equal(latent_gaussian(5, IDS[1:2], 4, 8, (4, 6)), self._row()[1:2])
        for other in (
            self._row(draw=1),
            self._row(stream=NoiseStream.LATENT_CONTENT),
            latent_gaussian(6, IDS, 4, 8, (4, 6)),
        ):
            assert (other == self._row()).double().mean() < 1e-3

    def test_standard_normal_and_independent(self) -> None:
        """Of all channels and frames; no two of them are correlated."""
        noise = latent_gaussian(0, torch.arange(64), 3, 6, (8, 8)).double()
        count = noise.numel()
        assert abs(noise.mean()) < 5 * count**-0.5
        assert abs(noise.var() - 1) < 5 * (2 / count) ** 0.5
        planes = noise.permute(1, 2, 0, 3, 4).reshape(18, -1)
        correlation = torch.corrcoef(planes) - torch.eye(18)
        assert correlation.abs().max() < 5 / planes.shape[1] ** 0.5

    def test_one_frame_is_what_embedders_are_trained_with(self) -> None:
        """Planes of four channels one after the other: runs that trained with noise on their latents go on with it."""
        planes = torch.arange(2).expand(3, -1)
        old = gaussian(5, IDS, planes, (4, 6), channels=4, draw=3, stream=NoiseStream.LATENT_MOTION)
        new = self._row(frames=1, channels=7, draw=3, stream=NoiseStream.LATENT_MOTION)
        assert torch.equal(new[:, :, 0], old.transpose(1, 2).flatten(1, 2)[:, :7])


class TestFarAway:
    """Places, times and samples that do not fit 32 bits: no two of them share noise, and none is silently another."""

    @staticmethod
    def _frame(time: float, **changes: object) -> Tensor:
        return gaussian(1, IDS[:1], torch.tensor([[time]], dtype=torch.float64), (4, 6), **changes)  # type: ignore[arg-type]

    @pytest.mark.parametrize("time", [2.0**22, 2.0**23, 2.0**31, 2.0**40])
    def test_times_past_four_million_frames(self, time: float) -> None:
        """Where ticks of 1/1024 of a frame pass 32 bits: another frame's noise is not met again."""
        far = self._frame(time)
        for near in (0.0, 2.0**22, time - 2.0**22, time - 1 / 1024, time + 1 / 1024):
            if near != time:
                assert (far == self._frame(near)).double().mean() < 0.05
        assert torch.equal(far, self._frame(time))

    def test_streams_stay_apart_there(self) -> None:
        """What ticks have beyond 32 bits does not reach the stream's bits."""
        frames = [self._frame(time, stream=stream) for time in (2.0**22, 2.0**24) for stream in NoiseStream]
        for place, frame in enumerate(frames):
            assert all((frame == other).double().mean() < 0.05 for other in frames[:place])

    def test_the_last_pixels_that_have_a_key(self) -> None:
        """A corner of a frame of 65536 x 65536, four thousand million pixels; of one pixel more, nothing."""
        last = (1 << 16) - 2
        corner = self._frame(3.0, origin=(last - 2, last - 4))
        assert torch.equal(
            corner[..., 1:, 2:], gaussian(1, IDS[:1], torch.tensor([[3.0]]), (3, 4), origin=(last - 1, last - 2))
        )
        assert not torch.equal(corner, self._frame(3.0))
        for origin in ((1 << 16, 0), (0, (1 << 16) - 5), (-1, 0)):
            with pytest.raises(DataError, match="rows and columns from 0 to 65535"):
                self._frame(3.0, origin=origin)

    def test_samples_past_32_bits(self) -> None:
        ids = torch.tensor([5, 5 + 2**32, 5 + 2**40, 2**62])
        noise = gaussian(1, ids, torch.zeros(4, 1), (16, 16))
        for place in range(4):
            assert torch.equal(gaussian(1, ids[place, None], torch.zeros(1, 1), (16, 16))[0], noise[place])
            assert all((noise[place] == noise[other]).double().mean() < 0.01 for other in range(place))

    def test_latent_frames_past_a_million(self) -> None:
        """Planes of a row are keyed by whole frames, 1024 ticks each."""
        planes = torch.tensor([[2**22 - 1, 2**22, 2**22 + 1]]).expand(3, -1)
        noise = gaussian(5, IDS, planes, (4, 6), channels=4, stream=NoiseStream.LATENT_ROW)
        row = latent_gaussian(5, IDS, 1, 4, (4, 6))
        assert all((noise[:, :, place] == row[:, :, 0]).double().mean() < 0.05 for place in range(3))


def test_a_gpu_draws_a_sample_in_one_portion() -> None:
    """What a CPU cuts up for its cache: 8 portions of a clip of 192 x 320 there, and 1 on a GPU. The numbers are the
    same however they are cut."""
    places = 192 * 320
    cpu, gpu = (list(noise._portions(2, 5, places, torch.device(name))) for name in ("cpu", "cuda"))
    assert [(rows, stop - start) for rows, start, stop in gpu] == [(slice(0, 1), places), (slice(1, 2), places)]
    assert len(cpu) == 2 * -(-places // CHUNK)


def test_a_long_video_is_drawn_in_portions_on_a_gpu_too() -> None:
    """132 frames of 1080 x 1920 pixels: in one portion some 24 GB."""
    numbers = [132 * (stop - start) for _, start, stop in noise._portions(1, 132, 1080 * 1920, torch.device("cuda"))]
    assert max(numbers) <= 1 << 24
    assert sum(numbers) == 132 * 1080 * 1920


def test_portions_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn as a GPU does, bit for bit as a CPU does."""
    cut = gaussian(5, IDS, TIMES, (96, 100))
    portions = noise._portions
    monkeypatch.setattr(noise, "_portions", lambda samples, t, n, _: portions(samples, t, n, torch.device("cuda")))
    assert torch.equal(gaussian(5, IDS, TIMES, (96, 100)), cut)


# Timestep densities are the distributions that they are named after.


COUNT = 20_000
NUMBERS = uniforms(0, torch.arange(COUNT), 0, NoiseStream.TIMESTEP)


def _quantiles(config: DensityConfig, quantiles: list[float]) -> Tensor:
    """Times for given quantiles, of samples that are not at pure noise."""
    return timesteps(config, torch.tensor([[quantile, 0.999] for quantile in quantiles]))


@pytest.mark.parametrize("share", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_share_at_pure_noise(kind: str, share: float) -> None:
    """`pure_noise` of the samples start at exactly 1, the others below; all times lie in (0, 1]."""
    t = timesteps(DensityConfig(kind=kind, pure_noise=share), NUMBERS)
    assert t.shape == (COUNT,)
    assert abs((t == 1).double().mean() - share) <= 5 * math.sqrt(share * (1 - share) / COUNT)
    assert t.min() >= SMALLEST > 0
    assert t.max() <= 1


def test_uniform_quantiles() -> None:
    """The quantile is the time, but for the smallest ones."""
    expected = torch.tensor([SMALLEST, 0.1, 0.5, 0.9])
    torch.testing.assert_close(_quantiles(DensityConfig(kind="uniform"), [1e-5, 0.1, 0.5, 0.9]), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-1.2, 1.0), (0.8, 0.5)])
def test_logit_normal_quantiles(mean: float, std: float) -> None:
    """The logit of the median is the mean, and one deviation on either side lies at the normal's quantiles."""
    found = _quantiles(DensityConfig(mean=mean, std=std), [0.158655, 0.5, 0.841345])
    torch.testing.assert_close(found.logit(), torch.tensor([mean - std, mean, mean + std]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["uniform", "logit_normal"])
def test_shift_moves_every_time_towards_noise(kind: str) -> None:
    """A larger shift moves no time towards the data, keeps the order, and is t -> s t / (1 + (s - 1) t)."""
    quantiles = [i / 50 for i in range(1, 50)]
    times = [_quantiles(DensityConfig(kind=kind, shift=shift), quantiles) for shift in (0.5, 1.0, 2.0, 4.0)]
    for smaller, larger in itertools.pairwise(times):
        assert (larger > smaller).all()
        assert (larger.diff() > 0).all()
    torch.testing.assert_close(times[3], 4 * times[1] / (1 + 3 * times[1]))


def test_a_shift_of_the_row_comes_after_that_of_the_config() -> None:
    """Both are one shift of their product; at pure noise nothing moves."""
    config = DensityConfig(shift=2.0, pure_noise=0.25)
    both = timesteps(config, NUMBERS, 1.5)
    torch.testing.assert_close(both, timesteps(DensityConfig(shift=3.0, pure_noise=0.25), NUMBERS))
    assert torch.equal(both == 1, timesteps(config, NUMBERS) == 1)
