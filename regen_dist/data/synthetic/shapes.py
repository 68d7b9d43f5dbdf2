"""Moving shapes: attributes, drawing, captions. One coloured shape moves on a straight line over a grey background.

The attributes are chosen so that a detector without learning can recognise them, also after encoding and at 32 x 32
pixels: all colours are saturated and all backgrounds are not, so colour alone separates shape from background; the
shapes differ in their moments (corners, a hole, arms, an asymmetry), and have the same area at the same size.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from math import pi, sqrt
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from regen_dist.config.run import SEED_END
from regen_dist.data.video.colour import Primaries, Transfer
from regen_dist.data.video.conversion import BT709_MATRIX
from regen_dist.data.video.reader import VideoInfo, VideoReader
from regen_dist.data.video.transcode import StreamTags, encode_frames, prepare_encoder
from regen_dist.errors import DataError

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

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
    """Attributes of a clip: a name from each of COLOURS, SHAPES, SIZES, DIRECTIONS, SPEEDS and BACKGROUNDS."""

    colour: str
    shape: str
    size: str
    direction: str
    speed: str
    background: str


@dataclass(frozen=True)
class Scene:
    """Scene to draw. Lengths in pixels; points are (x, y) of the shape's centroid, pixel centres at halves.

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
    """Extent of a shape from its centroid, in radii."""

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
    """Return the covered share of a pixel whose centre is `inside` the edge by this many pixels (negative: outside)."""
    ramp: Floats = np.clip(inside + np.float32(0.5), 0, 1)
    return ramp


SHAPES: dict[str, tuple[Callable[[Floats, Floats, float], Floats], Extent]] = {
    "circle": (_circle, Extent(1, 1, 1)),
    "square": (_square, Extent(_SQUARE, _SQUARE, _SQUARE)),
    "triangle": (_triangle, Extent(_POINT * sqrt(3) / 2, _POINT, _POINT / 2)),
    "cross": (_cross, Extent(_ARM, _ARM, _ARM)),
    "ring": (_ring, Extent(_RING, _RING, _RING)),
}


def place_shape(
    attributes: Attributes, side: int, frames: int, *, draws: tuple[float, float, float, float], turn: int
) -> Scene:
    """Create a scene whose shape stays completely inside the frame.

    Args:
        attributes: the attributes to show.
        side: side of the frame, in pixels.
        frames: number of frames, the first and the last position included.
        draws: numbers in [0, 1) that choose radius, length of the path, and the start in the room that the path leaves.
        turn: orientation of the background.
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
    """Return a start in [0, side) such that start and end keep their distances to both borders."""
    low, high = before + max(0.0, -move), side - after - max(0.0, move)
    return low + (high - low) * draw


def draw_frames(scene: Scene) -> UInt8s:
    """Draw the clip, uint8 RGB [frames, side, side, 3]; identical on every machine, without inexact functions."""
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
    """Draw the grey levels [side, side] of a background. `turn` is the quarter turns of a gradient; stripes lie or
    stand, squares change places."""
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


# --- captions: several phrasings of the same attributes, and their parser ---

_SENTENCES = (
    "a {size} {colour} {shape} moves {speed} {direction} over a {background} background",
    "over a {background} background, a {size} {colour} {shape} glides {speed} {direction}",
    "there is a {size} {colour} {shape} on a {background} background, moving {speed} {direction}",
    "a {size} {shape} in {colour} slides {direction} {speed} in front of a {background} background",
)
_SPEEDS = {"slow": ("slowly", "at a slow pace"), "fast": ("quickly", "fast")}
_DIRECTIONS = {
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "left": ("to the left", "leftwards"),
    "right": ("to the right", "rightwards"),
    "up-left": ("up and to the left", "towards the upper left"),
    "up-right": ("up and to the right", "towards the upper right"),
    "down-left": ("down and to the left", "towards the lower left"),
    "down-right": ("down and to the right", "towards the lower right"),
}
WORDINGS = len(_SENTENCES) * 2 * 2  # with two phrases for every speed and direction

# What a word says: (attribute, value). A direction is said by up to two words.
_MEANINGS: dict[str, tuple[str, str]] = {
    **{name: ("colour", name) for name in COLOURS},
    **{name: ("shape", name) for name in SHAPES},
    **{name: ("size", name) for name in SIZES},
    **{name: ("background", name) for name in BACKGROUNDS},
    **dict.fromkeys(("slow", "slowly"), ("speed", "slow")),
    **dict.fromkeys(("fast", "quickly"), ("speed", "fast")),
    **dict.fromkeys(("up", "upwards", "upper"), ("vertical", "up")),
    **dict.fromkeys(("down", "downwards", "lower"), ("vertical", "down")),
    **dict.fromkeys(("left", "leftwards"), ("horizontal", "left")),
    **dict.fromkeys(("right", "rightwards"), ("horizontal", "right")),
}
_WORDS = re.compile(r"[a-z]+")


def caption(attributes: Attributes, wording: int) -> str:
    """Return one of WORDINGS phrasings, `wording` in [0, WORDINGS)."""
    phrases, sentence = divmod(wording, len(_SENTENCES))
    return _SENTENCES[sentence].format(
        colour=attributes.colour,
        shape=attributes.shape,
        size=attributes.size,
        background=attributes.background,
        speed=_SPEEDS[attributes.speed][phrases % 2],
        direction=_DIRECTIONS[attributes.direction][phrases // 2],
    )


def parse_caption(text: str) -> Attributes:
    """Parse the attributes in a caption, in any order; raise DataError if one is missing or occurs twice."""
    words: dict[str, set[str]] = {}
    for word in _WORDS.findall(text.lower()):
        if word in _MEANINGS:
            attribute, value = _MEANINGS[word]
            words.setdefault(attribute, set()).add(value)
    values = {name: min(found) for name, found in words.items()}
    ways = [values.pop(name) for name in ("vertical", "horizontal") if name in values]
    if ways:
        values["direction"] = "-".join(ways)
    names = Attributes.__dataclass_fields__
    unclear = [name for name, found in words.items() if len(found) > 1] + [name for name in names if name not in values]
    if unclear:
        raise DataError(
            f"{text!r} does not say exactly one {', one '.join(unclear)}; a caption is like {caption(_EXAMPLE, 0)!r}, "
            f"with the colours {', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, the backgrounds "
            f"{', '.join(BACKGROUNDS)}"
        )
    return Attributes(**values)


_EXAMPLE = Attributes("red", "triangle", "small", "up-left", "slow", "grey")


# --- clip number n: a pure function of options and n, so that each clip can be made independently ---
#
# The combinations of colour, shape and direction are split in two: what `held-out` shows, `train` never does,
# whatever the seeds of the two are. Every pair of colour, shape and direction stays in `train`, so that held-out
# combinations ask for putting together what is known, not for what was never seen.

Split = Literal["all", "train", "held-out"]
DRAWING_VERSION = 3  # raise it when the same options would show or say something else
_SCENE_STREAM, _COMBINATION_STREAM = 0x7363656E, 0x636F6D62  # set the draws apart from other uses of a seed
_MAX_HELD_OUT = 0.5


@dataclass(frozen=True)
class SyntheticOptions:
    """Options of `regen shards synthetic`.

    `number` clips of a `split`, drawn by `seed`; `side` in pixels, `crf` x264's constant rate factor,
    `held_out_share` of all combinations, over `backgrounds` alone. A shard is closed at `samples_per_shard` or
    `shard_mb` megabytes.
    """

    number: int
    seed: int
    side: int = 64
    frames: int = 33
    fps: float = 24.0
    crf: int = 8
    split: Split = "all"
    held_out_share: float = 0.15
    backgrounds: tuple[str, ...] = BACKGROUNDS
    samples_per_shard: int = 1024
    shard_mb: int = 256

    def __post_init__(self) -> None:
        rules = {
            f"--number {self.number}: must be above 0": self.number < 1,
            f"--seed {self.seed}: must be in 0 to 2**63 - 1": not 0 <= self.seed < SEED_END,
            f"--side {self.side}: must be even and at least 32, or shapes look alike": self.side < 32 or self.side % 2,
            f"--frames {self.frames}: must be at least 2, or nothing moves": self.frames < 2,
            f"--fps {self.fps}: must be in 1 to 240": not 1 <= self.fps <= 240,
            f"--crf {self.crf}: must be 0 (best) to 51": not 0 <= self.crf <= 51,
            f"--split {self.split}: must be one of {', '.join(get_args(Split))}": self.split not in get_args(Split),
            f"--held-out-share {self.held_out_share}: must be in 0 to {_MAX_HELD_OUT}": not 0
            <= self.held_out_share
            <= _MAX_HELD_OUT,
            f"--backgrounds {','.join(self.backgrounds)}: must be some of {', '.join(BACKGROUNDS)}, each once": (
                not self.backgrounds
                or not set(self.backgrounds) <= set(BACKGROUNDS)
                or len(set(self.backgrounds)) < len(self.backgrounds)
            ),
            f"--samples-per-shard {self.samples_per_shard}: must be above 0": self.samples_per_shard < 1,
            f"--shard-mb {self.shard_mb}: must be above 0": self.shard_mb < 1,
        }
        wrong = [message for message, broken in rules.items() if broken]
        if not wrong and not self.combinations:
            wrong = [f"--split {self.split} with --held-out-share {self.held_out_share}: no combination is left"]
        if wrong:
            raise DataError("; ".join(wrong))

    @property
    def combinations(self) -> tuple[Combination, ...]:
        train, held_out = split_combinations(self.held_out_share)
        return {"all": train + held_out, "train": train, "held-out": held_out}[self.split]

    @property
    def content(self) -> str:
        """Return the hash of everything that determines the clips' bytes; part of their keys, which are thus unique."""
        facts = {name: value for name, value in asdict(self).items() if name not in _ARRANGEMENT}
        return hashlib.blake2b(repr((DRAWING_VERSION, facts)).encode(), digest_size=4).hexdigest()


_ARRANGEMENT = frozenset({"number", "samples_per_shard", "shard_mb"})


class Combination(NamedTuple):
    """Attributes that decide whether a clip is held out."""

    colour: str
    shape: str
    direction: str


class SyntheticClip(NamedTuple):
    """Finished clip: number, attributes, caption, the bytes of an mp4 file and its properties."""

    number: int
    scene: Scene
    caption: str
    data: bytes
    info: VideoInfo


@lru_cache(maxsize=8)
def split_combinations(held_out_share: float) -> tuple[tuple[Combination, ...], tuple[Combination, ...]]:
    """Split all combinations into (train, held out) by hashes of their words.

    Combinations are held out in the order of their hashes until the share is reached, passing over those that would
    take the last one of a pair of colour, shape and direction out of train.
    """
    ordered = sorted(
        (Combination(*words) for words in product(COLOURS, SHAPES, DIRECTIONS)),
        key=lambda words: hashlib.blake2b(" ".join(words).encode(), digest_size=8).digest(),
    )
    left = Counter(pair for combination in ordered for pair in _pairs(combination))
    wanted = round(held_out_share * len(ordered))
    held_out: list[Combination] = []
    for combination in ordered:
        pairs = _pairs(combination)
        if len(held_out) < wanted and all(left[pair] > 1 for pair in pairs):
            held_out.append(combination)
            left.subtract(pairs)
    return tuple(one for one in ordered if one not in held_out), tuple(held_out)


def _pairs(words: Combination) -> list[tuple[str, str]]:
    return [(words.colour, words.shape), (words.colour, words.direction), (words.shape, words.direction)]


def describe_scene(number: int, options: SyntheticOptions) -> tuple[Scene, str]:
    """Return the scene of clip `number` (from 0) of the split, and its caption, without drawing."""
    draws = _uniform(options.seed, _SCENE_STREAM, number, 9).tolist()
    size, speed, background, turn, wording, radius, length, x, y = draws
    attributes = Attributes(
        **_combination(number, options)._asdict(),
        size=list(SIZES)[int(size * len(SIZES))],
        speed=list(SPEEDS)[int(speed * len(SPEEDS))],
        background=options.backgrounds[int(background * len(options.backgrounds))],
    )
    scene = place_shape(attributes, options.side, options.frames, draws=(radius, length, x, y), turn=int(turn * TURNS))
    return scene, caption(attributes, int(wording * WORDINGS))


def make_clip(number: int, options: SyntheticOptions) -> SyntheticClip:
    """Encode clip `number` as an H.264 file; the same bytes in every process."""
    scene, text = describe_scene(number, options)
    rate = Fraction(options.fps).limit_denominator(1001)
    tags = StreamTags(rate, 1 / rate, BT709_MATRIX, Primaries.BT709, Transfer.IEC61966_2_1)  # those of `to_yuv`
    data = encode_frames(_to_encode(draw_frames(scene), rate), tags, options.crf)
    with VideoReader(data) as reader:
        info = reader.info()
    if info.frames != options.frames:
        raise DataError(
            f"clip {number}: {options.frames} frames went in, {info.frames} came out"
            "; install the pinned PyAV (`make venv`)"
        )
    return SyntheticClip(number, scene, text, data, info)


def _combination(number: int, options: SyntheticOptions) -> Combination:
    """Return the combination of a clip: each occurs once before any repeats, in a new random order each time."""
    among = options.combinations
    turn, place_ = divmod(number, len(among))
    return among[_shuffled(options.seed, turn, len(among))[place_]]


@lru_cache(maxsize=8)
def _shuffled(seed: int, turn: int, count: int) -> tuple[int, ...]:
    return tuple(np.argsort(_uniform(seed, _COMBINATION_STREAM, turn, count), kind="stable").tolist())


def _uniform(seed: int, stream: int, counter: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Draw numbers in [0, 1) from a stateless, counter-based generator."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))
    return generator.random(count)


def _to_encode(frames: UInt8s, rate: Fraction) -> Iterator[VideoFrame]:
    from av.video.frame import VideoFrame

    for number, image in enumerate(frames):
        frame = VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = number, 1 / rate
        yield prepare_encoder(frame, None)
