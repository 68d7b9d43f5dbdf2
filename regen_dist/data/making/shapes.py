"""Moving shapes: what they can be, and drawing them. One shape of one colour moves on a straight line over a background
without colour.

What a scene shows is chosen so that a detector without learning can read it back, also after encoding and at 32 x 32
pixels: all colours are saturated and all backgrounds are not, so colour alone tells shape from background; the shapes
differ in their moments (corners, a hole, arms, an asymmetry), and have the same area at the same size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import pi, sqrt
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

UInt8s = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.floating[Any]]  # float32 all through

# At least 110 apart from each other in RGB, and 48 in the plane of chroma, where all backgrounds lie at its centre.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 20, 30),
    "orange": (255, 125, 0),
    "yellow": (255, 235, 20),
    "green": (15, 150, 35),
    "cyan": (0, 215, 225),
    "blue": (25, 55, 225),
    "purple": (125, 25, 175),
    "pink": (255, 105, 185),
}
# Radius of the circle of the same area, as a share of the frame's side.
SIZES = {"small": 0.17, "medium": 0.2, "large": 0.24}
# Length of the whole path, as a share of the frame's side: from, to.
SPEEDS = {"slow": (0.11, 0.13), "fast": (0.19, 0.22)}
_SLANT = sqrt(0.5)
# Unit vectors: x to the right, y down.
DIRECTIONS: dict[str, tuple[float, float]] = {
    "up": (0.0, -1.0),
    "up-right": (_SLANT, -_SLANT),
    "right": (1.0, 0.0),
    "down-right": (_SLANT, _SLANT),
    "down": (0.0, 1.0),
    "down-left": (-_SLANT, _SLANT),
    "left": (-1.0, 0.0),
    "up-left": (-_SLANT, -_SLANT),
}
BACKGROUNDS = ("black", "grey", "white", "gradient", "striped", "checkered")
SIZE_SPREAD = 0.03  # a shape is this share larger or smaller than its size says
TURNS = 4  # ways in which a background can lie
_MARGIN = 0.015  # share of the side that is kept free between shape and border


@dataclass(frozen=True)
class Attributes:
    """What a clip shows, in words: a name from each of COLOURS, SHAPES, SIZES, DIRECTIONS, SPEEDS and BACKGROUNDS."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    background: str


@dataclass(frozen=True)
class Scene:
    """A clip to draw. Lengths in pixels; points are (x, y) of the shape's centroid, pixel centres at halves.

    `radius` is that of the circle of the same area, `turn` (below TURNS) how the background lies.
    """

    attributes: Attributes
    side: int
    frames: int
    radius: float
    start: tuple[float, float]
    end: tuple[float, float]
    turn: int


class Extent(NamedTuple):
    """How far a shape reaches from its centroid, in radii."""

    side: float
    top: float
    bottom: float


# Of all shapes, for radius 1, so area pi.
_SQUARE = sqrt(pi) / 2  # half a side
_POINT = sqrt(4 * pi / (3 * sqrt(3)))  # an equal-sided triangle's corner from its centroid
_ARM = sqrt(9 * pi / 5) / 2  # half the length of a cross of two bars, each three times as long as wide
_HOLE = 0.55  # radius of a ring's hole over that of the ring
_RING = 1 / sqrt(1 - _HOLE**2)


def _circle(x: Floats, y: Floats, radius: float) -> Floats:
    return _ramp(radius - np.sqrt(x * x + y * y))


def _square(x: Floats, y: Floats, radius: float) -> Floats:
    half = _SQUARE * radius
    return _ramp(half - np.abs(x)) * _ramp(half - np.abs(y))


def _triangle(x: Floats, y: Floats, radius: float) -> Floats:
    """On its base."""
    base = _POINT / 2 * radius  # every edge is this far from the centroid
    return _ramp(base - np.maximum(y, np.abs(x) * np.float32(sqrt(3) / 2) - y / 2))


def _cross(x: Floats, y: Floats, radius: float) -> Floats:
    arm = _ARM * radius
    long_x, short_x = _ramp(arm - np.abs(x)), _ramp(arm / 3 - np.abs(x))
    long_y, short_y = _ramp(arm - np.abs(y)), _ramp(arm / 3 - np.abs(y))
    return long_x * short_y + short_x * long_y - short_x * short_y


def _ring(x: Floats, y: Floats, radius: float) -> Floats:
    distance = np.sqrt(x * x + y * y)
    return _ramp(_RING * radius - distance) - _ramp(_HOLE * _RING * radius - distance)


def _ramp(inside: Floats) -> Floats:
    """Share of a pixel that is covered, its centre being `inside` the edge by so many pixels (negative: outside)."""
    ramp: Floats = np.clip(inside + np.float32(0.5), 0, 1)
    return ramp


SHAPES: dict[str, tuple[Callable[[Floats, Floats, float], Floats], Extent]] = {
    "circle": (_circle, Extent(1, 1, 1)),
    "square": (_square, Extent(_SQUARE, _SQUARE, _SQUARE)),
    "triangle": (_triangle, Extent(_POINT * sqrt(3) / 2, _POINT, _POINT / 2)),
    "cross": (_cross, Extent(_ARM, _ARM, _ARM)),
    "ring": (_ring, Extent(_RING, _RING, _RING)),
}


def place(
    attributes: Attributes, side: int, frames: int, *, draws: tuple[float, float, float, float], turn: int
) -> Scene:
    """A scene whose shape stays wholly inside the frame.

    Args:
        attributes: what it shows.
        side: of the frame, in pixels.
        frames: from the first position to the last.
        draws: numbers in [0, 1) that choose radius, length of the path, and the start in the room that the path leaves.
        turn: how the background lies.
    """
    radius = SIZES[attributes.size] * side * (1 + SIZE_SPREAD * (2 * draws[0] - 1))
    shortest, longest = SPEEDS[attributes.speed]
    length = (shortest + (longest - shortest) * draws[1]) * side
    move_x, move_y = (length * part for part in DIRECTIONS[attributes.direction])
    extent, margin = SHAPES[attributes.shape][1], _MARGIN * side
    x = _start(side, margin + extent.side * radius, margin + extent.side * radius, move_x, draws[2])
    y = _start(side, margin + extent.top * radius, margin + extent.bottom * radius, move_y, draws[3])
    return Scene(attributes, side, frames, radius, (x, y), (x + move_x, y + move_y), turn)


def _start(side: int, before: float, after: float, move: float, draw: float) -> float:
    """Where to start in [0, side) so that start and end keep their distances to both borders."""
    low, high = before + max(0.0, -move), side - after - max(0.0, move)
    return low + (high - low) * draw


def draw_frames(scene: Scene) -> UInt8s:
    """The clip: uint8 RGB [frames, side, side, 3]. The same bytes on every machine: no function that rounds freely."""
    attributes = scene.attributes
    steps = np.linspace(0, 1, scene.frames)[:, None]
    centres = np.arange(scene.side) + 0.5
    x = (centres - (scene.start[0] + steps * (scene.end[0] - scene.start[0]))).astype(np.float32)
    y = (centres - (scene.start[1] + steps * (scene.end[1] - scene.start[1]))).astype(np.float32)
    coverage = SHAPES[attributes.shape][0](x[:, None, :], y[:, :, None], scene.radius)[..., None]
    behind = _background(attributes.background, scene.side, scene.turn)[None, :, :, None]
    colour = np.array(COLOURS[attributes.colour], np.float32)
    frames: UInt8s = np.rint(behind + coverage * (colour - behind)).astype(np.uint8)
    return frames


def _background(name: str, side: int, turn: int) -> Floats:
    """Grey levels [side, side]. `turn` is the quarter turns of a gradient; stripes lie or stand, squares change
    places."""
    if name in _PLAIN:
        return np.full((side, side), _PLAIN[name], np.float32)
    if name == "gradient":
        levels = np.repeat(np.linspace(40, 216, side, dtype=np.float32)[:, None], side, axis=1)
        return np.rot90(levels, turn)
    bars = np.arange(side) * 8 // side
    rows = bars[:, None] if name == "checkered" or turn % 2 == 0 else 0 * bars[:, None]
    columns = bars if name == "checkered" or turn % 2 == 1 else 0 * bars
    return np.where((rows + columns + turn // 2) % 2, np.float32(156), np.float32(96))


_PLAIN = {"black": 0.0, "grey": 128.0, "white": 255.0}
