"""The detector reads what was drawn: also encoded, blurred and noisy; and reads nothing where there is nothing."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from regen_dist.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    Attributes,
    SyntheticOptions,
    draw_frames,
    make_clip,
    place_shape,
)
from regen_dist.data.video.conversion import frame_to_rgb
from regen_dist.data.video.reader import VideoReader
from regen_dist.evaluation import shapes
from regen_dist.evaluation.shapes import Reading, read
from tests.helpers.datasets import render_scene

UInt8s = npt.NDArray[np.uint8]
NUMBER = 32  # of clips, among which every value of every attribute is met
EMPTY = np.full((5, 32, 32, 3), 128, np.uint8)


def _options(side: int, frames: int = 5) -> SyntheticOptions:
    return SyntheticOptions(number=1, seed=3, side=side, frames=frames)


def _wanted(attributes: Attributes) -> Reading:
    return Reading(attributes.colour, attributes.shape, attributes.direction)


def _blurred(frames: UInt8s, sigma: float) -> UInt8s:
    return np.stack([cv2.GaussianBlur(frame, (0, 0), sigma) for frame in frames]).astype(np.uint8)


def _noisy(frames: UInt8s, sigma: float) -> UInt8s:
    noise = np.random.default_rng(0).normal(0, sigma, frames.shape)
    return np.clip(frames + noise, 0, 255).astype(np.uint8)


CHANGES: dict[str, Callable[[UInt8s], UInt8s]] = {
    "as drawn": lambda frames: frames,
    "blurred": lambda frames: _blurred(frames, 1.2),
    "noisy": lambda frames: _noisy(frames, 8),
    "blurred and noisy": lambda frames: _noisy(_blurred(frames, 1.2), 8),
    "darker": lambda frames: (frames * 0.8).astype(np.uint8),
    "in a wider frame": lambda frames: np.pad(frames, ((0, 0), (0, 0), (16, 8), (0, 0)), constant_values=100),
}


@pytest.mark.parametrize(("side", "count"), [(32, NUMBER), (64, NUMBER // 4)])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_drawn_clips(side: int, count: int, change: Callable[[UInt8s], UInt8s]) -> None:
    clips = [render_scene(number, _options(side)) for number in range(count)]
    assert [read(change(frames)) for frames, _ in clips] == [_wanted(attributes) for _, attributes in clips]


def test_these_clips_show_everything() -> None:
    """What the test above reads has every value of every attribute."""
    seen = [render_scene(number, _options(32, 2))[1] for number in range(NUMBER)]
    for name, values in {
        "colour": COLOURS, "shape": SHAPES, "direction": DIRECTIONS, "size": SIZES, "speed": SPEEDS,
        "background": BACKGROUNDS,
    }.items():  # fmt: skip
        assert {getattr(each, name) for each in seen} == set(values), name


@pytest.mark.parametrize("side", [32, 64])
def test_encoded_clips(side: int) -> None:
    for number in range(8):
        clip = make_clip(number, _options(side))
        with VideoReader(clip.data) as reader:
            frames = np.stack([frame_to_rgb(frame) for _, frame in reader.frames(range(clip.info.frames))])
        assert read(frames) == _wanted(clip.scene.attributes), clip.caption


@pytest.mark.parametrize("frames", [EMPTY, _noisy(EMPTY, 8), EMPTY[:0]], ids=["grey", "noisy", "no frames"])
def test_nothing_is_read_where_nothing_is_shown(frames: UInt8s) -> None:
    assert read(frames) == Reading(None, None, None)


def test_what_stands_still_has_no_direction() -> None:
    frames, attributes = render_scene(0, _options(32))
    still = np.repeat(frames[:1], 5, axis=0)
    assert read(still) == read(_noisy(still, 8)) == read(frames[:1]) == _wanted(attributes)._replace(direction=None)


def test_half_a_path_needs_half_the_motion() -> None:
    """The slowest clips move less than the shortest path that counts for whole ones."""
    wanted = Attributes("red", "circle", "large", "left", "slow", "black")
    frames = draw_frames(place_shape(wanted, 32, 34, draws=(0.5, 0.0, 0.5, 0.5), turn=0))
    assert read(frames).direction == "left"
    assert read(frames[17:]).direction is None
    assert read(frames[17:], path_share=0.5).direction == "left"


def test_a_shape_that_is_seldom_seen_is_not_told() -> None:
    """Its colour still is; where it stands in half of the frames, the rest is too."""
    frames, attributes = render_scene(1, _options(32, frames=5))
    hidden = frames.copy()
    hidden[:3] = 128
    assert read(hidden) == Reading(attributes.colour, None, None)
    hidden[2] = frames[2]
    assert read(hidden) == _wanted(attributes)


def test_specks_of_the_same_colour_do_not_matter() -> None:
    frames, attributes = render_scene(2, _options(64))
    spotted = frames.copy()
    spotted[:, 2:4, 2:4] = COLOURS[attributes.colour]
    assert read(spotted) == _wanted(attributes)


def test_a_path_with_gaps_is_read() -> None:
    frames, attributes = render_scene(3, _options(32, frames=9))
    frames[1:4] = 128
    assert read(frames) == _wanted(attributes)


def test_templates_are_made_once_for_a_radius() -> None:
    frames, _ = render_scene(4, _options(32))
    read(frames)
    made = shapes._templates.cache_info().misses
    read(frames)
    assert shapes._templates.cache_info().misses == made
