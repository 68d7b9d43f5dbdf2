"""Captions of moving shapes: several phrasings of the same facts, and reading any of them back."""

from __future__ import annotations

import re

from regen_dist.data.making.shapes import BACKGROUNDS, COLOURS, SHAPES, SIZES, Attributes
from regen_dist.errors import DataError

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
    """One of WORDINGS phrasings, `wording` in [0, WORDINGS)."""
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
    """What a caption says, in whatever order; DataError when it does not say each attribute exactly once."""
    said: dict[str, set[str]] = {}
    for word in _WORDS.findall(text.lower()):
        if word in _MEANINGS:
            attribute, value = _MEANINGS[word]
            said.setdefault(attribute, set()).add(value)
    values = {name: min(found) for name, found in said.items()}
    ways = [values.pop(name) for name in ("vertical", "horizontal") if name in values]
    if ways:
        values["direction"] = "-".join(ways)
    names = Attributes.__dataclass_fields__
    unclear = [name for name, found in said.items() if len(found) > 1] + [name for name in names if name not in values]
    if unclear:
        raise DataError(
            f"{text!r} does not say exactly one {', one '.join(unclear)}; a caption is like {caption(_EXAMPLE, 0)!r}, "
            f"with the colours {', '.join(COLOURS)}, the shapes {', '.join(SHAPES)}, the backgrounds "
            f"{', '.join(BACKGROUNDS)}"
        )
    return Attributes(**values)


_EXAMPLE = Attributes("red", "triangle", "small", "up-left", "slow", "grey")
