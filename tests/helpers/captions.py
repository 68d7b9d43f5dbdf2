"""Captions of moving shapes, without the videos."""

from __future__ import annotations

import random
from functools import cache

from regen_dist.data.synthetic.shapes import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    SHAPES,
    SIZES,
    SPEEDS,
    WORDINGS,
    Attributes,
    caption,
)


@cache
def captioned_scenes(number: int) -> tuple[tuple[Attributes, str], ...]:
    """Scenes and what is said of each: always the same."""
    drawn = random.Random(0)
    kinds = [list(names) for names in (COLOURS, SHAPES, SIZES, DIRECTIONS, SPEEDS, BACKGROUNDS)]
    scenes = [Attributes(*(drawn.choice(names) for names in kinds)) for _ in range(number)]
    return tuple((scene, caption(scene, drawn.randrange(WORDINGS))) for scene in scenes)
