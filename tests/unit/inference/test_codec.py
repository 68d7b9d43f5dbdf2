"""The codec: clips to latents and back, at any times, from overlapping windows and from tiles of a frame."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regen_dist.config import save_config
from regen_dist.diffusion.noise import gaussian
from regen_dist.distributed.engine import PlainEngine
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, ConfigError, DataError
from regen_dist.inference import codec as codec_module
from regen_dist.inference.codec import Codec, Window, axis_cuts, blend_weights, plan_windows
from regen_dist.models.decoder import ReceptiveField
from regen_dist.models.embedder import build_model
from regen_dist.models.encoder import Latents
from regen_dist.training.run import build_task
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.tiny import clips, tiny_run, wake

CPU = torch.device("cpu")


def _codec(**changes: Any) -> Codec:
    config = tiny_run(**changes)
    torch.manual_seed(0)
    model = build_model(config.model)
    wake(model)
    for name, parameter in model.named_parameters():
        if parameter.shape[0] == 3 * 64:  # what gives pixels: estimates stay inside [-1, 1], where nothing is clamped
            parameter.data.mul_(0.02 if name.startswith("linear") else 0.1)
    return Codec(model, config, CPU)


def _one(latents: Latents, clip: int) -> Latents:
    return Latents(*(latent[clip : clip + 1] for latent in latents))


def _times(*times: float) -> Tensor:
    return torch.tensor(times, dtype=torch.float64)


def test_decode_equals_one_window() -> None:
    """Clips decoded each by itself are windows decoded alone, with the noise of their sample, seed and place."""
    codec = _codec()
    latents, times = codec.encode(clips(2)), _times(0, 1.5, 4)
    both = codec.decode(latents, times, steps=2, seed=9, sample_ids=[5, 6], starts=[0.0, 8.0])
    assert both.shape == (2, 3, 3, 32, 32)
    assert both.dtype == torch.float32
    for clip, (start, sample_id) in enumerate([(0.0, 5), (8.0, 6)]):
        window = Window(_one(latents, clip), start, 5)
        alone = codec.decode_windows([window], times + start, steps=2, seed=9, sample_id=sample_id)
        assert torch.equal(both[clip : clip + 1], alone)


def test_what_the_noise_is_keyed_by_shows() -> None:
    """Another seed, sample or place in the video gives another reconstruction; the same ones the same, bit for bit."""
    codec = _codec()
    latents, times = codec.encode(clips(1)), _times(0, 1, 2)
    given: dict[str, Any] = {"seed": 1, "sample_ids": [2], "starts": [3.0]}
    frames = codec.decode(latents, times, **given)
    assert torch.equal(codec.decode(latents, times, **given), frames)
    for change in ({"seed": 2}, {"sample_ids": [3]}, {"starts": [4.0]}):
        assert not torch.allclose(codec.decode(latents, times, **{**given, **change}), frames, atol=1e-4)


@pytest.fixture
def pair() -> tuple[Codec, list[Window]]:
    """Two windows of five frames that share frame 4."""
    codec = _codec()
    latents = codec.encode(clips(2))
    return codec, [Window(_one(latents, 0), 0.0, 5), Window(_one(latents, 1), 4.0, 5)]


def test_overlapping_windows_are_blended(pair: tuple[Codec, list[Window]]) -> None:
    """In one step: frames of one window alone are as if it were decoded alone (from the same noise, which is keyed by
    the time in the video), and the shared frame is the mean of both estimates."""
    codec, (first, second) = pair
    together = codec.decode_windows([first, second], torch.arange(9.0), seed=3)
    left = codec.decode_windows([first], torch.arange(5.0), seed=3)
    right = codec.decode_windows([second], torch.arange(4.0, 9.0), seed=3)
    assert together.shape == (1, 3, 9, 32, 32)
    assert together.abs().max() < 1
    torch.testing.assert_close(together[:, :, :4], left[:, :, :4])
    torch.testing.assert_close(together[:, :, 5:], right[:, :, 1:])
    torch.testing.assert_close(together[:, :, 4], (left[:, :, 4] + right[:, :, 0]) / 2)
    assert not torch.allclose(left[:, :, 4], right[:, :, 0], atol=1e-3)


def test_the_estimates_are_blended_at_every_step(pair: tuple[Codec, list[Window]]) -> None:
    """With two steps the windows already agree after the first: not the same as blending two finished decodings."""
    codec, (first, second) = pair
    together = codec.decode_windows([first, second], torch.arange(9.0), steps=2)
    left = codec.decode_windows([first], torch.arange(5.0), steps=2)
    assert (together[:, :, :4] - left[:, :, :4]).abs().max() > 1e-5


def test_the_blend_of_equal_estimates_is_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights of all windows sum to one at every time, between frames and past the end too."""
    codec = _codec()
    target = torch.full((1, 3, 1, 32, 32), 0.25)
    monkeypatch.setattr(codec.model, "denoise", lambda x, t, latents, times: target.expand_as(x))
    latents = codec.encode(clips(3))
    windows = [Window(_one(latents, clip), start, 5) for clip, start in enumerate((0.0, 3.0, 6.0))]
    frames = codec.decode_windows(windows, _times(0, 0.5, 3, 3.7, 4, 6.1, 7, 10, 10.5), steps=3)
    torch.testing.assert_close(frames, torch.full_like(frames, 0.25))


def test_the_noise_does_not_depend_on_grouping(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a window starts from is the video's noise at its frames' absolute times, whichever other windows and times
    are decoded with it, and also for a part of the frame's size."""
    codec = _codec()
    seen: list[tuple[Tensor, Tensor]] = []

    def denoise(x: Tensor, t: Tensor, latents: Latents, times: Tensor) -> Tensor:
        seen.append((x, times))
        return torch.zeros_like(x)

    monkeypatch.setattr(codec.model, "denoise", denoise)
    latents = codec.encode(clips(2))
    windows = [Window(_one(latents, 0), 0.0, 5), Window(_one(latents, 1), 3.0, 5)]
    for group, times in ((windows, torch.arange(8.0)), (windows[1:], torch.arange(3.0, 8.0)), (windows, _times(7, 3))):
        seen.clear()
        codec.decode_windows(group, times, seed=4, sample_id=11)
        starts = [window.start for window in group]
        for start, (x, local) in zip(starts[-len(seen) :], seen, strict=True):
            expected = gaussian(4, torch.tensor([11]), local + start, (32, 32))
            assert torch.equal(x, expected)
            tile = gaussian(4, torch.tensor([11]), local + start, (8, 16), origin=(24, 16))
            assert torch.equal(x[..., 24:, 16:], tile)


def test_times_between_and_past_the_frames() -> None:
    """Any times: half frames, finer ones, a little past the end; finite, inside [-1, 1], and each its own picture."""
    codec = _codec()
    frames = codec.decode(codec.encode(clips(1)), _times(0, 0.25, 0.5, 3.999, 4.5), steps=2)
    assert frames.shape == (1, 3, 5, 32, 32)
    assert frames.isfinite().all()
    assert frames.abs().max() <= 1
    assert all(not torch.equal(frames[:, :, a], frames[:, :, a + 1]) for a in range(4))


def test_an_image() -> None:
    """One frame in, one frame out."""
    codec = _codec()
    latents = codec.encode(clips(2, 1))
    assert codec.decode(latents, _times(0)).shape == (2, 3, 1, 32, 32)


@pytest.mark.parametrize("shape", [(1, 3, 4, 32, 32), (1, 3, 5, 30, 32), (3, 5, 32, 32)])
def test_clips_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    """The model's own DataError reaches the caller."""
    with pytest.raises(DataError):
        _codec().encode(torch.zeros(shape))


def test_no_steps_are_refused() -> None:
    """Zero steps would be noise."""
    codec = _codec()
    with pytest.raises(ConfigError, match="at least 1"):
        codec.decode(codec.encode(clips(1)), _times(0), steps=0)


def test_bf16_gives_float32_close_to_that_of_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """A codec works in the precision that it was trained in, and still takes and gives float32."""
    monkeypatch.setattr("regen_dist.observe.hardware.has_native_bf16", lambda: True)
    exact, rounded = _codec(), _codec(engine__precision="bf16")
    video = clips(1)
    a, b = (codec.decode(codec.encode(video), _times(0, 2, 4)) for codec in (exact, rounded))
    assert a.dtype == b.dtype == torch.float32
    assert next(rounded.model.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(a, b, rtol=0, atol=0.1)
    monkeypatch.setattr("regen_dist.observe.hardware.has_native_bf16", lambda: False)
    emulated = _codec(engine__precision="bf16")
    assert next(emulated.model.parameters()).dtype == torch.float32  # bf16 would take 30 times as long
    torch.testing.assert_close(emulated.decode(emulated.encode(video), _times(0, 2, 4)), a)


class TestBaseline:
    """The convolutional baseline behind the same interface."""

    def test_frames(self) -> None:
        """Whole frames, in any order, from a window anywhere in the video: rows of one reconstruction."""
        codec = _baseline()
        latents = codec.encode(clips(1))
        with torch.no_grad():
            whole = codec.model.reconstruct(latents, 5).clamp(-1, 1)  # type: ignore[operator]
        assert torch.equal(codec.decode(latents, _times(3, 0)), whole[:, :, [3, 0]])
        frames = codec.decode_windows([Window(latents, 8.0, 5)], _times(8, 12))
        assert torch.equal(frames, whole[:, :, [0, 4]])

    @pytest.mark.parametrize("time", [0.5, 3.99, -1.0, 5.0])
    def test_times_that_are_no_frames_are_refused(self, time: float) -> None:
        """It knows the clip's frames and nothing between or beyond: an error, not the nearest frame."""
        codec = _baseline()
        with pytest.raises(ConfigError, match=r"the frames 0 to 4 of a clip alone"):
            codec.decode(codec.encode(clips(1)), _times(time))

    def test_more_steps_are_refused(self) -> None:
        """It decodes in one pass; asking for more is a mistake that is told."""
        codec = _baseline()
        with pytest.raises(ConfigError, match=r"one pass; found 4 steps, use 1"):
            codec.decode(codec.encode(clips(1)), _times(0), steps=4)


def _baseline() -> Codec:
    config = tiny_run(model__kind="magvit2")
    torch.manual_seed(0)
    model = build_model(config.model)
    wake(model)
    return Codec(model, config, CPU)


class TestLoad:
    """From a run folder."""

    @pytest.fixture
    def run(self, tmp_path: Path) -> tuple[Path, PlainEngine]:
        config = tiny_run(tmp_path)
        engine = PlainEngine(config, Ranks(), build_task(config, CPU).build)
        for average in engine.ema.values():
            average.add_(0.01)
        save_config(config, config.folder)
        write_checkpoint(config.folder, 7, engine.pieces(), engine.shapes())
        return config.folder, engine

    def test_averaged_weights_by_default(self, run: tuple[Path, PlainEngine]) -> None:
        """EMA weights unless those of the last step are asked for; every parameter, bit for bit."""
        folder, engine = run
        ema, plain = Codec.load(folder, device=CPU), Codec.load(folder, "plain", device=CPU)
        for name, parameter in ema.model.named_parameters():
            assert torch.equal(parameter.flatten(), engine.ema[name])
        masters = dict(engine.named_masters())
        for name, parameter in plain.model.named_parameters():
            assert torch.equal(parameter.flatten(), masters[name])
        assert (ema.num_frames, ema.temporal_compression, ema.latent_channels, ema.kind) == (5, 4, 8, "regen")

    def test_no_run_and_no_checkpoint(self, tmp_path: Path) -> None:
        """Both are told apart, with the way out."""
        with pytest.raises(ConfigError, match="not a run folder"):
            Codec.load(tmp_path / "nothing")
        save_config(tiny_run(tmp_path), tmp_path / "fresh")
        with pytest.raises(CheckpointError, match=r"no checkpoint yet; train it with `regen train`"):
            Codec.load(tmp_path / "fresh")


# Windows cover every frame, and their weights are a partition of unity.


@pytest.mark.parametrize(
    ("frames", "clip", "overlap", "starts"),
    [
        (1, 9, 1, [0]),
        (5, 9, 1, [0]),
        (9, 9, 1, [0]),
        (17, 9, 1, [0, 8]),
        (20, 9, 1, [0, 8, 11]),
        (18, 9, 0, [0, 9]),
        (10, 9, 4, [0, 1]),
        (19, 9, 4, [0, 5, 10]),
    ],
)
def test_plan(frames: int, clip: int, overlap: int, starts: list[int]) -> None:
    assert plan_windows(frames, clip, overlap) == starts


def test_every_frame_is_covered_and_windows_are_full() -> None:
    for clip in (5, 9, 17):
        for overlap in range(clip):
            for frames in range(1, 60):
                starts = plan_windows(frames, clip, overlap)
                covered = {frame for start in starts for frame in range(start, start + clip)}
                assert covered >= set(range(frames))
                assert starts == sorted(set(starts))
                assert frames < clip or starts[-1] + clip == frames
                assert all(b - a <= clip - overlap for a, b in pairwise(starts))


@pytest.mark.parametrize(("frames", "clip", "overlap"), [(0, 9, 1), (9, 0, 0), (30, 9, 9), (30, 9, -1)])
def test_plan_refuses(frames: int, clip: int, overlap: int) -> None:
    with pytest.raises(ConfigError, match=r"frames"):
        plan_windows(frames, clip, overlap)


@pytest.mark.parametrize("overlap", [0, 1, 2, 4, 8])
@pytest.mark.parametrize("frames", [1, 6, 9, 20, 41])
def test_weights_are_a_partition_of_unity(frames: int, overlap: int) -> None:
    starts = plan_windows(frames, 9, overlap)
    times = torch.arange(0, frames - 1 + 1e-6, 0.125, dtype=torch.float64)
    weights = blend_weights(starts, 9, times)
    assert weights.shape == (len(starts), len(times))
    torch.testing.assert_close(weights.sum(dim=0), torch.ones_like(times))
    assert (weights >= 0).all()
    for row, start in zip(weights, starts, strict=True):
        outside = (times < start) | (times > start + 8)
        if overlap > 0:
            assert (row[outside] == 0).all()


def test_one_shared_frame_is_halved() -> None:
    weights = blend_weights([0, 8], 9, torch.tensor([0.0, 7.5, 8.0, 8.5, 16.0]))
    assert weights.tolist() == [[1, 1, 0.5, 0, 0], [0, 0, 0.5, 1, 1]]


def test_ramp_is_linear_over_the_shared_frames() -> None:
    weights = blend_weights([0, 5], 9, torch.tensor([4.0, 5.0, 6.0, 7.0, 8.0, 9.0]))
    torch.testing.assert_close(weights[1], torch.tensor([0, 0.125, 0.375, 0.625, 0.875, 1]))


def test_times_beyond_the_windows_go_to_the_nearest() -> None:
    weights = blend_weights([0, 9], 9, torch.tensor([-1.0, 8.2, 8.8, 20.0]))
    assert weights.tolist() == [[1, 1, 0, 0], [0, 0, 1, 1]]


def test_integer_times_give_float_weights() -> None:
    assert blend_weights([0], 9, torch.arange(9)).dtype == torch.float32


@pytest.mark.parametrize("overlap", [0, 1, 2, 3, 8])
def test_a_fade_reaches_past_the_clips_and_stays_a_partition(overlap: int) -> None:
    starts, times = [place * (17 - overlap) for place in range(4)], torch.arange(0, 17 + 3 * (17 - overlap) - 0.9, 0.5)
    weights = blend_weights(starts, 17, times, fade=2)
    torch.testing.assert_close(weights.sum(dim=0), torch.ones(len(times)))
    largest_step = weights.diff(dim=1).abs().max()
    assert float(largest_step) <= 0.5 / 5 + 1e-6  # no faster than a ramp over five frames
    if overlap >= 5:
        torch.testing.assert_close(weights, blend_weights(starts, 17, times))  # wide enough by itself


def test_a_fade_over_one_shared_frame() -> None:
    weights = blend_weights([0, 16], 17, torch.arange(13.0, 20.0), fade=2)
    torch.testing.assert_close(weights[1], torch.tensor([0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0]))


# Tiles of a frame give what the whole frame gives; where they cannot, they are refused.


TOLERANCE = 1e-5  # in float32: convolutions of another size may add in another order
HEIGHT, WIDTH = 80, 168
WINDOWED: dict[str, Any] = {"model__decoder__attention": {"pattern": "window", "window": [5, 2, 3]}}


@pytest.mark.parametrize("tile", [64, 100])
def test_latents_of_tiles_are_those_of_whole_frames(tile: int) -> None:
    """Of clips and of images, of batches; also where tiles do not divide the sides."""
    for video in (clips(2, 5, HEIGHT, WIDTH), clips(1, 1, HEIGHT, WIDTH)):
        codec = _codec(**WINDOWED)
        whole = codec.encode(video)
        codec.use_tiles(tile)
        for part, other in zip(codec.encode(video), whole, strict=True):
            torch.testing.assert_close(part, other, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (2, 3), (4, 1)])
def test_frames_of_tiles_are_those_of_whole_frames(blocks: int, steps: int) -> None:
    """From windows that overlap, at several steps: the noise and the estimates are the whole frame's."""
    codec = _codec(model__decoder__blocks=blocks, **WINDOWED)
    latents = codec.encode(clips(2, 5, HEIGHT, WIDTH))
    windows = [Window(type(latents)(*(part[i, None] for part in latents)), 4.0 * i, 5) for i in range(2)]
    whole = codec.decode_windows(windows, torch.arange(9.0), steps=steps, seed=3)
    codec.use_tiles(64)
    tiled = codec.decode_windows(windows, torch.arange(9.0), steps=steps, seed=3)
    assert whole.abs().max() < 1
    torch.testing.assert_close(tiled, whole, rtol=0, atol=TOLERANCE)


def test_the_baselines_tiles() -> None:
    codec = _codec(model__kind="magvit2")
    latents, times = codec.encode(clips(1, 5, HEIGHT, WIDTH)), torch.arange(5.0)
    whole = codec.decode(latents, times)
    codec.use_tiles(64)
    torch.testing.assert_close(codec.decode(latents, times), whole, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_without_what_is_around_them_tiles_show(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """So the two tests above see a difference where there is one."""
    codec = _codec(model__kind=kind, **WINDOWED)
    video = clips(1, 5, HEIGHT, WIDTH)
    latents = codec.encode(video)
    whole = codec.decode(latents, torch.arange(5.0))
    codec.use_tiles(64)
    for name, step in (("encoder_receptive_field", (1, 1)), ("decoder_receptive_field", (2, 3))):
        monkeypatch.setattr(codec_module, name, lambda config, step=step: ReceptiveField((0, 0), step))
    assert (codec.encode(video).motion - latents.motion).abs().max() > 1e-3
    assert (codec.decode(latents, torch.arange(5.0)) - whole).abs().max() > 1e-3


def test_whole_frames_again() -> None:
    codec = _codec(**WINDOWED)
    video = clips(1, 5, 64, 64)
    whole = codec.encode(video)
    codec.use_tiles(64)
    codec.use_tiles(None)
    assert torch.equal(codec.encode(video).motion, whole.motion)


def test_full_attention_is_refused() -> None:
    """It sees the whole frame: a tile cannot give what the whole frame gives."""
    with pytest.raises(ConfigError, match=r"attends over whole frames .*pattern=full.* leave the tiles out"):
        _codec().use_tiles(256)


def test_a_tile_too_small() -> None:
    with pytest.raises(ConfigError, match="a tile of 8 pixels; it must have at least 64 a side"):
        _codec(**WINDOWED).use_tiles(8)


def test_clips_that_do_not_fit_are_refused_before_they_are_cut() -> None:
    codec = _codec(**WINDOWED)
    codec.use_tiles(64)
    with pytest.raises(DataError, match="multiples of 8, found 130x264"):
        codec.encode(torch.zeros(1, 3, 5, 130, 264))


@pytest.mark.parametrize(
    ("length", "tile", "reach", "step"), [(33, 8, 5, 1), (33, 8, 5, 3), (5, 8, 9, 4), (16, 1, 0, 8)]
)
def test_cuts_keep_every_cell_once_and_read_what_it_depends_on(length: int, tile: int, reach: int, step: int) -> None:
    every = list(axis_cuts(length, tile, reach, step))
    assert [cell for cut in every for cell in range(cut.start, cut.stop)] == list(range(length))
    for cut in every:
        assert cut.first % step == 0
        assert cut.first <= max(cut.start - reach, 0)
        assert cut.last >= min(cut.stop + reach, length)
        assert cut.last in (length, cut.last // step * step)
