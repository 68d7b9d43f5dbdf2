"""Which clip of moving shapes is number n: a pure function of options and n, so any of any number can be made alone.

The combinations of colour, shape and direction are split in two: what `held-out` shows, `train` never does, whatever
the seeds of the two are. Every pair of colour, shape and direction stays in `train`, so that held-out combinations ask
for putting together what is known, not for what was never seen.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import product
from typing import Literal, NamedTuple, get_args

import av
import numpy as np

from regen_dist.data.making.shape_captions import WORDINGS, caption
from regen_dist.data.making.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    TURNS,
    Attributes,
    Scene,
    UInt8s,
    draw_frames,
    place,
)
from regen_dist.data.video.reader import VideoInfo, VideoReader
from regen_dist.data.video.transcode import StreamTags, encode_frames, prepare
from regen_dist.errors import DataError

Split = Literal["all", "train", "held-out"]
DRAWING_VERSION = 2  # raise it when the same options would show or say something else
_SCENE_STREAM, _COMBINATION_STREAM = 0x7363656E, 0x636F6D62  # set the draws apart from other uses of a seed
_BT601 = 6  # colour matrix, primaries and transfer: what RGB is turned into without being told
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
            f"--seed {self.seed}: must be in 0 to 2**63 - 1": not 0 <= self.seed < 1 << 63,
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
        """What the split may show."""
        train, held_out = split_combinations(self.held_out_share)
        return {"all": train + held_out, "train": train, "held-out": held_out}[self.split]

    @property
    def content(self) -> str:
        """Hash of what decides the bytes of the clips: part of their keys, so that different clips never share one."""
        facts = {name: value for name, value in asdict(self).items() if name not in _ARRANGEMENT}
        return hashlib.blake2b(repr((DRAWING_VERSION, facts)).encode(), digest_size=4).hexdigest()


_ARRANGEMENT = frozenset({"number", "samples_per_shard", "shard_mb"})


class Combination(NamedTuple):
    """What decides whether a clip is held out."""

    colour: str
    shape: str
    direction: str


class Clip(NamedTuple):
    """A finished clip: number, what it shows, how that is said, the bytes of an mp4 file and what is in it."""

    number: int
    scene: Scene
    caption: str
    data: bytes
    info: VideoInfo


@lru_cache(maxsize=8)
def split_combinations(held_out_share: float) -> tuple[tuple[Combination, ...], tuple[Combination, ...]]:
    """All combinations as (train, held out); a hash of its words decides where each one goes.

    Combinations are held out in the order of their hashes until the share is reached, passing over those that would
    take the last one of a pair of colour, shape and direction out of train.
    """
    ordered = sorted((Combination(*words) for words in product(COLOURS, SHAPES, DIRECTIONS)), key=_hash)
    left = Counter(pair for combination in ordered for pair in _pairs(combination))
    wanted = round(held_out_share * len(ordered))
    held_out: list[Combination] = []
    for combination in ordered:
        pairs = _pairs(combination)
        if len(held_out) < wanted and all(left[pair] > 1 for pair in pairs):
            held_out.append(combination)
            left.subtract(pairs)
    return tuple(one for one in ordered if one not in held_out), tuple(held_out)


def _hash(combination: Combination) -> bytes:
    return hashlib.blake2b(" ".join(combination).encode(), digest_size=8).digest()


def _pairs(words: Combination) -> list[tuple[str, str]]:
    return [(words.colour, words.shape), (words.colour, words.direction), (words.shape, words.direction)]


def describe(number: int, options: SyntheticOptions) -> tuple[Scene, str]:
    """What clip `number` (from 0) of the split shows, and its caption. Nothing is drawn."""
    draws = _uniform(options.seed, _SCENE_STREAM, number, 9).tolist()
    size, speed, background, turn, wording, radius, length, x, y = draws
    attributes = Attributes(
        **_combination(number, options)._asdict(),
        size=list(SIZES)[int(size * len(SIZES))],
        speed=list(SPEEDS)[int(speed * len(SPEEDS))],
        background=options.backgrounds[int(background * len(options.backgrounds))],
    )
    scene = place(attributes, options.side, options.frames, draws=(radius, length, x, y), turn=int(turn * TURNS))
    return scene, caption(attributes, int(wording * WORDINGS))


def render(number: int, options: SyntheticOptions) -> tuple[UInt8s, Attributes]:
    """Clip `number` before encoding: uint8 RGB [frames, side, side, 3], and what it shows."""
    scene, _ = describe(number, options)
    return draw_frames(scene), scene.attributes


def make_clip(number: int, options: SyntheticOptions) -> Clip:
    """Clip `number` as an H.264 file; the same bytes in every process."""
    scene, text = describe(number, options)
    data = encode_frames(_to_encode(draw_frames(scene), _rate(options)), _tags(options), options.crf)
    with VideoReader(data) as reader:
        info = reader.info()
    if info.frames != options.frames:
        raise DataError(f"clip {number}: {options.frames} frames went in, {info.frames} came out")
    return Clip(number, scene, text, data, info)


def _combination(number: int, options: SyntheticOptions) -> Combination:
    """Each combination once before any comes again, in an order drawn anew each time."""
    among = options.combinations
    turn, place_ = divmod(number, len(among))
    return among[_shuffled(options.seed, turn, len(among))[place_]]


@lru_cache(maxsize=8)
def _shuffled(seed: int, turn: int, count: int) -> tuple[int, ...]:
    return tuple(np.argsort(_uniform(seed, _COMBINATION_STREAM, turn, count), kind="stable").tolist())


def _uniform(seed: int, stream: int, counter: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """Numbers in [0, 1) from a counter-based generator: no state."""
    generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, counter]))
    return generator.random(count)


def _to_encode(frames: UInt8s, rate: Fraction) -> Iterator[av.VideoFrame]:
    for number, image in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(image, format="rgb24")
        frame.pts, frame.time_base = number, 1 / rate
        yield prepare(frame, None)


def _rate(options: SyntheticOptions) -> Fraction:
    return Fraction(options.fps).limit_denominator(1001)


def _tags(options: SyntheticOptions) -> StreamTags:
    rate = _rate(options)
    return StreamTags(rate, 1 / rate, _BT601, _BT601, _BT601)
