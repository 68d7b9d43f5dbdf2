"""Long videos, clip by clip: every frame once, no seam of the machinery's own, bounded memory."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from regen_dist.errors import ConfigError, DataError
from regen_dist.evaluation.reconstruct import TrivialCodec
from regen_dist.inference.codec import Codec, Window, window_weights
from regen_dist.inference.frames import Frame, pad_sides
from regen_dist.inference.long_video import (
    DecodePlan,
    Positions,
    Speed,
    decode_stream,
    encode_groups,
    make_plan,
    output_positions,
)
from regen_dist.models.embedder import build_model
from regen_dist.models.encoder import Latents
from tests.helpers.tiny import tiny_run


class PooledCodec:
    """Keeps every frame of a clip, average-pooled 4 x 4, and is linear between frames: windows do not show."""

    kind = "regen"

    def __init__(self, num_frames: int = 9, bias: float = 0.0) -> None:
        self.num_frames = num_frames
        self.bias = bias  # added once for each window's number, so that neighbours disagree
        self.batches: list[int] = []
        self.times: list[Tensor] = []

    def encode(self, clips: Tensor) -> Latents:
        assert clips.shape[2] in (1, self.num_frames)
        assert clips.shape[3] % 8 == clips.shape[4] % 8 == 0
        self.batches.append(len(clips))
        content = torch.nn.functional.avg_pool3d(clips, (1, 4, 4))
        return Latents(content, torch.zeros_like(content))

    def decode_windows(self, windows: list[Window], times: Tensor, *, steps: int, seed: int, sample_id: int) -> Tensor:
        self.times.append(times)
        weights = window_weights(windows, times)
        return sum(  # type: ignore[return-value]
            (self._decode(window, times) * row[:, None, None] for window, row in zip(windows, weights, strict=True)),
            start=torch.zeros(()),
        )

    def _decode(self, window: Window, times: Tensor) -> Tensor:
        local = (times - window.start).clamp(0, window.length - 1)
        low = local.long().clamp(max=max(window.length - 2, 0))
        high = (low + 1).clamp(max=window.length - 1)
        frames = window.latents.content
        mixed = torch.lerp(frames[:, :, low], frames[:, :, high], (local - low)[:, None, None].float())
        return mixed.repeat_interleave(4, dim=3).repeat_interleave(4, dim=4) + self.bias * window.start


def blocks(num_frames: int, height: int = 16, width: int = 24) -> list[Frame]:
    """Frames constant over 4 x 4 blocks, which PooledCodec keeps exactly; brightness runs with time."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 100, (-(-height // 4), -(-width // 4), 3))
    fine = coarse.repeat(4, 0).repeat(4, 1)[:height, :width]
    return [(fine + t).astype(np.uint8) for t in range(num_frames)]


def run(
    codec: PooledCodec | TrivialCodec,
    frames: list[Frame],
    plan: DecodePlan,
    *tracks: Positions,
    speed: Speed | None = None,
) -> list[list[Frame]]:
    speed = speed or Speed()
    groups = encode_groups(codec, frames, plan, speed)
    done: list[list[Frame]] = [[] for _ in tracks]
    for batch in decode_stream(codec, groups, plan, tracks, sides=frames[0].shape[:2], steps=1, speed=speed):
        for track, finished in zip(done, batch, strict=True):
            track.extend(finished)
    return done


@pytest.mark.parametrize("group", [1, 2, 4])
@pytest.mark.parametrize("overlap", [0, 1, 2, 5, 8])
@pytest.mark.parametrize("num_frames", [1, 2, 8, 9, 10, 17, 18, 40])
def test_every_frame_comes_back_in_order(num_frames: int, overlap: int, group: int) -> None:
    frames = blocks(num_frames)
    plan = make_plan(num_frames, 9, overlap=overlap, group=group)
    (done,) = run(PooledCodec(), frames, plan, output_positions(np.arange(num_frames) / 25, None))
    np.testing.assert_array_equal(np.stack(done), np.stack(frames))


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("cuts", [(1,), (9,), (8, 10, 29), (20, 39)])
def test_no_clip_shows_two_shots(cuts: tuple[int, ...], group: int) -> None:
    """Shots shorter and longer than a clip: the mean of a clip never holds a frame of another shot, nor is any frame
    between two frames blended across a cut."""
    shots = [sum(frame >= cut for cut in cuts) for frame in range(40)]
    frames = [np.full((8, 8, 3), 60 * shot, np.uint8) for shot in shots]
    plan = make_plan(40, 9, group=group, fade=2, cuts=cuts)
    own, dense = np.arange(40.0), np.arange(0, 39.01, 0.25)
    for codec in (TrivialCodec("mean", 9), PooledCodec()):
        done, between = run(codec, frames, plan, own, dense)
        np.testing.assert_array_equal(np.stack(done), np.stack(frames))
        np.testing.assert_array_equal(np.stack(between), np.stack([frames[int(time)] for time in dense]))


def test_a_short_shot_has_no_borders_of_clips() -> None:
    """The clip of a shot of five frames is padded, and does not reach into the next one; a cut is a step apart."""
    plan = make_plan(30, 9, cuts=(5,))
    assert plan.starts == (0, 5, 13, 21)
    crosses = plan.crosses()
    assert [frame for frame, step in enumerate(crosses) if step] == [12, 13, 20, 21]
    assert [frame for frame, step in enumerate(crosses) if step is None] == [4]
    assert make_plan(30, 9, cuts=()).crosses() == make_plan(30, 9).crosses()


@pytest.mark.parametrize("sides", [(13, 22), (8, 8), (5, 3), (16, 17)])
def test_any_sides(sides: tuple[int, int]) -> None:
    frames = [np.full((*sides, 3), 10 * t, np.uint8) for t in range(11)]
    (done,) = run(PooledCodec(), frames, make_plan(11, 9), np.arange(11.0))
    np.testing.assert_array_equal(np.stack(done), np.stack(frames))


@pytest.mark.parametrize("overlap", [1, 3])
def test_groups_do_not_matter(overlap: int) -> None:
    """Blended in one group or cross-faded between groups: the same frames, also where neighbours disagree."""
    frames, times = blocks(60), np.arange(0, 59.01, 0.5)
    runs = [
        np.stack(run(PooledCodec(bias=0.01), frames, make_plan(60, 9, overlap=overlap, group=group), times)[0]).astype(
            int
        )
        for group in (1, 3, 100)
    ]
    assert len(runs[0]) == len(times)
    for other in runs[1:]:
        assert np.abs(other - runs[0]).max() <= 1  # rounding


def test_shares_are_a_partition_of_unity() -> None:
    positions = np.arange(0, 99.01, 0.25)
    for overlap, group, fade in ((0, 3, 0), (1, 3, 0), (4, 3, 0), (7, 3, 0), (1, 1, 2), (2, 1, 12)):
        plan = make_plan(100, 9, overlap=overlap, group=group, fade=fade)
        total = sum(plan.share(group, positions) for group in plan.groups)
        torch.testing.assert_close(total, torch.ones(len(positions)))


def test_two_tracks_and_times_between_frames() -> None:
    frames = blocks(20)
    own, double = np.arange(20.0), np.arange(0, 19.01, 0.5)
    first, second = run(PooledCodec(), frames, make_plan(20, 9), own, double)
    np.testing.assert_array_equal(np.stack(first), np.stack(frames))
    np.testing.assert_array_equal(np.stack(second[::2]), np.stack(frames))
    assert len(second) == 39


def test_dense_times_are_decoded_at_the_spacing_of_training() -> None:
    codec = PooledCodec()
    run(codec, blocks(17), make_plan(17, 9), np.arange(0, 16.01, 0.25))
    assert len(codec.times) == 4
    assert all(torch.allclose(times.diff(), torch.ones(1, dtype=torch.float64)) for times in codec.times)


def test_sparse_times() -> None:
    frames = blocks(60)
    (done,) = run(PooledCodec(), frames, make_plan(60, 9, group=1), np.arange(0, 60, 20.0))
    np.testing.assert_array_equal(np.stack(done), np.stack(frames[::20]))


def test_memory_does_not_grow_with_the_video() -> None:
    """The source is read only as far as the group that is being decoded."""
    num_read = 0

    def frames() -> Iterator[Frame]:
        nonlocal num_read
        for frame in blocks(400):
            num_read += 1
            yield frame

    plan = make_plan(400, 9, group=2)
    codec, speed = PooledCodec(), Speed()
    num_done = 0
    for (done,) in decode_stream(
        codec,
        encode_groups(codec, frames(), plan, speed),
        plan,
        [np.arange(400.0)],
        sides=(16, 24),
        steps=1,
        speed=speed,
    ):
        num_done += len(done)
        assert num_read - num_done <= 17
    assert num_done == 400
    assert max(codec.batches) <= 2
    assert speed.frames_decoded >= 400
    assert speed.encode_s > 0 < speed.decode_s


def test_latents_of_an_image_are_counted_once() -> None:
    for num_frames, parts in ((1, 1), (9, 2)):
        speed = Speed()
        list(encode_groups(TrivialCodec("mean", 9), blocks(num_frames), make_plan(num_frames, 9), speed))
        assert speed.latent_values == parts * 3 * 16 * 24


def test_a_video_that_ends_early() -> None:
    with pytest.raises(DataError, match="ends after frame 11"):
        run(PooledCodec(), blocks(12), make_plan(20, 9), np.arange(20.0))


def test_positions_of_any_rate() -> None:
    constant = np.arange(10) / 25
    np.testing.assert_array_equal(output_positions(constant, None), np.arange(10))
    np.testing.assert_allclose(output_positions(constant, 25), np.arange(10), atol=1e-9)
    np.testing.assert_allclose(output_positions(constant, 50), np.arange(19) / 2, atol=1e-9)
    np.testing.assert_allclose(output_positions(constant, 12.5), np.arange(5) * 2, atol=1e-9)
    np.testing.assert_allclose(output_positions(constant, 60)[1], 25 / 60)
    variable = np.array([0.0, 0.1, 0.3, 0.4])
    np.testing.assert_allclose(output_positions(variable, 10), [0, 1, 1.5, 2, 3], atol=1e-9)
    np.testing.assert_array_equal(output_positions(np.zeros(1), 60), [0])


@pytest.mark.parametrize("fps", [23.976, 24, 30, 60, 240])
def test_times_in_milliseconds_lose_no_frame(fps: float) -> None:
    """As in Matroska and WebM, where the last frame may be noted a little before its time."""
    for count in range(1, 100):
        found = output_positions(np.round(np.arange(count) / fps, 3), fps)
        assert len(found) == count
        assert found[-1] == pytest.approx(count - 1, abs=0.15)


@pytest.mark.parametrize("fps", [0.0, -1.0, float("nan")])
def test_rates_that_are_none(fps: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        output_positions(np.arange(3.0), fps)


def test_group_of_none() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        make_plan(10, 9, group=0)


def test_padding_repeats_the_edge() -> None:
    padded = pad_sides(np.arange(3 * 5 * 3, dtype=np.uint8).reshape(3, 5, 3))
    assert padded.shape == (8, 8, 3)
    np.testing.assert_array_equal(padded[7, 7], padded[2, 4])


@pytest.mark.parametrize("num_frames", [17, 33, 60])
def test_groups_do_not_matter_to_a_fade(num_frames: int) -> None:
    """Frames past a clip's end belong to two groups; every frame comes back once, whatever the grouping."""
    frames, times = blocks(num_frames), np.arange(0, num_frames - 0.99, 0.5)
    runs = [
        np.stack(run(PooledCodec(bias=0.01), frames, make_plan(num_frames, 9, group=group, fade=2), times)[0]).astype(
            int
        )
        for group in (1, 3, 100)
    ]
    assert len(runs[0]) == len(times)
    for other in runs[1:]:
        assert np.abs(other - runs[0]).max() <= 1  # rounding


# Encoding and decoding a video holds no more of it when it is longer: neither tensors nor frames.


SIDES = (16, 24)
GROUP = 2


class Held(NamedTuple):
    """At most, while a video passed through."""

    tensor_bytes: int
    frames: int


class Tensors(TorchDispatchMode):
    """Counts the bytes of all tensors that were made inside of it and still live; views count again."""

    def __init__(self) -> None:
        super().__init__()
        self._living, self.most = WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        self._living.update({each: each.nbytes for each in tree_leaves(made) if isinstance(each, Tensor)})
        self.most = max(self.most, sum(self._living.values()))
        return made


class Source:
    """Frames of a video, and how many of them live at most."""

    def __init__(self, count: int) -> None:
        self._count, self._living, self.most = count, weakref.WeakValueDictionary[int, Frame](), 0

    def __iter__(self) -> Iterator[Frame]:
        for number in range(self._count):
            frame = np.full((*SIDES, 3), number % 256, np.uint8)
            self._living[number] = frame
            self.most = max(self.most, len(self._living))
            yield frame


@pytest.fixture(scope="module")
def codec() -> Codec:
    config = tiny_run()
    return Codec(build_model(config.model), config, torch.device("cpu"))


def _held(codec: Codec, count: int, *, keep_windows: bool = False) -> Held:
    source, plan, done = Source(count), make_plan(count, codec.num_frames, group=GROUP), 0
    with Tensors() as tensors:
        groups = encode_groups(codec, source, plan, Speed())
        kept = list(groups) if keep_windows else groups
        for (finished,) in decode_stream(codec, kept, plan, [np.arange(float(count))], sides=SIDES, steps=1):
            done += len(finished)
    assert done == count
    return Held(tensors.most, source.most)


def test_memory_does_not_grow_with_the_length(codec: Codec) -> None:
    """More than twice the frames: the same tensors at most, and no more frames than a group of windows has."""
    short, long = _held(codec, 17), _held(codec, 41)
    assert short.tensor_bytes > GROUP * 9 * 3 * SIDES[0] * SIDES[1]
    assert long.tensor_bytes <= short.tensor_bytes
    assert short.frames <= long.frames <= GROUP * codec.num_frames + 2


def test_what_is_kept_is_seen(codec: Codec) -> None:
    """So the test above would see it."""
    short, long = (_held(codec, count, keep_windows=True) for count in (17, 41))
    assert long.tensor_bytes > short.tensor_bytes


def test_a_part_of_a_very_long_video_is_planned_at_once() -> None:
    """A day at 60 frames a second: the share of a group is found without a look at every window."""
    plan = make_plan(24 * 3600 * 60, 17, group=4)
    group = range(len(plan.starts) - 8, len(plan.starts) - 4)
    positions = np.arange(float(plan.starts[group[0]]), float(plan.starts[group[-1]] + 17))
    shares = plan.share(group, positions)
    assert shares[1:-1].tolist() == [1.0] * (len(positions) - 2)
    assert (shares[0], shares[-1]) == (0.5, 0.5)
