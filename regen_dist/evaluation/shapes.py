"""Detector for clips of moving shapes, without learning: it finds the shape by its colour, identifies it by its
moments, and reads its direction from the path of its centroid.

It uses the possible content of the clips of `regen_dist.data.synthetic.shapes`, but not the origin of a clip: the
source, an embedder or a generator. Blurred or noisy clips are still readable; a clip without colour reads as nothing.

Legend: T frames, H x W pixels, M moments.
"""

from __future__ import annotations

from functools import cache, lru_cache
from math import pi, sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.data.synthetic.shapes import COLOURS, DIRECTIONS, SHAPES

Floats = npt.NDArray[np.floating[Any]]
UInt8s = npt.NDArray[np.uint8]

_LEAST_CHROMA = 40.0  # of 255: below this, nothing in a clip counts as coloured
_TOP_SHARE, _CORE = 0.01, 0.8  # the pixels that decide the colour: nearly as saturated as the most saturated ones
_COVERED, _TRACE = 0.4, 0.1  # share of a pixel from which it belongs to the shape, and to its edge
_NEAR = 2  # pixels around the shape in which its edge counts
_LEAST_PATH = 0.08  # share of the side: below this, nothing moves; the slowest clips move twice as far
_BLURS = (0.0, 0.7, 1.2)  # standard deviations in pixels: how unsharp a shape may be
_CENTRE = 0.35  # radius of the centre, where a ring has its hole


class Reading(NamedTuple):
    """Attributes that a clip shows, in the words of `shapes`; None where one cannot be read."""

    colour: str | None
    shape: str | None
    direction: str | None


class _DetectedShape(NamedTuple):
    """The shape in one frame: its moments [M], its radius and its centroid (x, y) in pixels."""

    frame: int
    moments: Floats
    radius: float
    centroid: tuple[float, float]


def read(frames: UInt8s, path_share: float = 1.0) -> Reading:
    """Read a clip, uint8 RGB [T, H, W, 3]. The shape must be visible in half of the frames; a single frame has no
    direction. `path_share` is the share of the drawn path that these frames show: it shortens the shortest path that
    counts as a motion."""
    video = frames.astype(np.float32)
    colour = _colour(video)
    if colour is None:
        return Reading(None, None, None)
    seen = [one for number, each in enumerate(_coverage(video, colour)) if (one := _detect(number, each)) is not None]
    if 2 * len(seen) < len(frames):
        return Reading(colour, None, None)
    return Reading(colour, _shape(seen), _direction(seen, len(frames), min(frames.shape[1:3]) * path_share))


def _colour(video: Floats) -> str | None:
    """Named colour nearest in hue to the most saturated pixels of a clip. A blur mixes in only grey, without a hue."""
    chroma = _chroma(video).reshape(-1, 3)
    strength = np.linalg.norm(chroma, axis=1)
    top = float(np.quantile(strength, 1 - _TOP_SHARE)) if strength.size else 0.0
    if top < _LEAST_CHROMA:
        return None
    core = chroma[strength >= _CORE * top].mean(0)
    tones = {name: _chroma(np.array(rgb, np.float32)) for name, rgb in COLOURS.items()}
    return max(tones, key=lambda name: float(core @ tones[name] / np.linalg.norm(tones[name])))


def _chroma(rgb: Floats) -> Floats:
    """Remove the grey part of a colour, which leaves nothing of the backgrounds."""
    rest: Floats = rgb - rgb.mean(-1, keepdims=True)
    return rest


def _coverage(video: Floats, colour: str) -> Floats:
    """Share of each pixel that the shape of this colour covers: [T, H, W]."""
    tone = _chroma(np.array(COLOURS[colour], np.float32))
    covered: Floats = np.clip(_chroma(video) @ tone / (tone @ tone), 0, 1).astype(np.float32)
    return covered


def _detect(number: int, coverage: Floats) -> _DetectedShape | None:
    """The largest connected shape of a frame, coverage [H, W]; None where there is none."""
    cv2 = _opencv()
    count, labels, stats, _ = cv2.connectedComponentsWithStats((coverage > _COVERED).astype(np.uint8))
    if count < 2:  # the background counts as one
        return None
    largest = 1 + int(np.argmax(stats[1:, cv2.CC_STAT_AREA]))
    cross = cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
    near = cv2.dilate((labels == largest).astype(np.uint8), cross, iterations=_NEAR)
    return _measure(number, np.where((near > 0) & (coverage > _TRACE), coverage, 0))


def _measure(number: int, shape: Floats) -> _DetectedShape:
    """Moments about the centroid, with the radius of the circle of the same area as the unit of length."""
    area, height, width = float(shape.sum()), *shape.shape
    x, y = np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32)
    centre_x, centre_y, radius = float(shape.sum(0) @ x) / area, float(shape.sum(1) @ y) / area, sqrt(area / pi)
    x, y = ((x - centre_x) / radius)[None, :], ((y - centre_y) / radius)[:, None]
    rho = x * x + y * y
    parts = np.stack([rho, rho**2, y**3 + 0 * x, x * x * y, x**4 + y**4 - 6 * x * x * y * y, rho < _CENTRE**2])
    return _DetectedShape(number, (parts * shape).sum((1, 2)) / area, radius, (centre_x, centre_y))


@lru_cache(maxsize=64)
def _templates(radius: int) -> tuple[tuple[str, ...], Floats]:
    """Names and moments [N, M] of every shape at a radius in pixels, sharp and less so."""
    half = 2 * radius + 6
    at = np.arange(-half, half + 1, dtype=np.float32)
    names, moments = [], []
    for name, (draw, _) in SHAPES.items():
        sharp = draw(at[None, :], at[:, None], float(radius))
        for blur in _BLURS:
            drawn = _opencv().GaussianBlur(sharp, (0, 0), blur) if blur else sharp
            names.append(name)
            moments.append(_measure(0, np.where(drawn > _TRACE, drawn, 0)).moments)
    return tuple(names), np.array(moments)


def _shape(seen: list[_DetectedShape]) -> str:
    """The shape whose moments are nearest to the median ones, each in units of its spread over all shapes."""
    names, templates = _templates(max(2, round(float(np.median([one.radius for one in seen])))))
    found = np.median([one.moments for one in seen], axis=0)
    return names[int(np.linalg.norm((templates - found) / templates.std(0), axis=1).argmin())]


def _direction(seen: list[_DetectedShape], num_frames: int, side: float) -> str | None:
    """The direction nearest to the straight line through the centroids; None where it is too short for one."""
    if len(seen) < 2:
        return None
    move = np.polyfit([one.frame for one in seen], [one.centroid for one in seen], 1)[0] * (num_frames - 1)
    if np.linalg.norm(move) < _LEAST_PATH * side:
        return None
    return max(DIRECTIONS, key=lambda name: float(move @ np.array(DIRECTIONS[name])))


@cache
def _opencv() -> Any:
    """OpenCV, imported late because it is slow to import and most of the library does not need it."""
    import cv2

    cv2.setNumThreads(1)  # the processes already share the cores
    return cv2
