"""Settings of a generation of videos, and the positions of their frames in the clips of a row."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import get_args

import numpy as np

from regen_dist.config.run import SEED_END, SPATIAL_COMPRESSION, SamplerName
from regen_dist.config.t2v import SIDE_MULTIPLE
from regen_dist.errors import ConfigError
from regen_dist.inference.frames import HIGHEST_FPS, LONGEST_FRAME_S
from regen_dist.inference.latent_space import LatentSpace
from regen_dist.inference.long_video import Positions
from regen_dist.inference.sampler import TextToVideoModel

DEFAULT_SIZE = (192, 320)  # paper, Sec. 4
_HIGHEST_GUIDANCE = 1000  # far above any use; a larger one overflows, and the weights would be blamed
_DIGITS = 6  # decimals of a position: 24 frames at 30 a second must not end at 32.99999…


@dataclass(frozen=True)
class GenerationSettings:
    """Settings of a generation, apart from the prompts.

    Args:
        height, width: size in pixels, multiples of 16.
        frames: frames of each video; 1 makes images.
        fps: frames a second of the videos.
        steps: number of sampler steps.
        guidance: scale of classifier-free guidance; 1 is none.
        sampler: `euler`, `heun` or `dpmpp_2m` (second order).
        decode_steps: sampling steps of the embedder's decoder.
        seed: seed of all noise.
        negative: negative prompt that guidance leads away from; None is the empty caption.

    Raises:
        ConfigError: at least one value is invalid; the message lists all of them.
    """

    height: int
    width: int
    frames: int
    fps: float
    steps: int
    guidance: float
    sampler: SamplerName
    decode_steps: int = 1
    seed: int = 0
    negative: str | None = None

    def __post_init__(self) -> None:
        floats = [name for name in ("fps", "guidance") if not isfinite(getattr(self, name))]
        if floats:  # the other checks need finite values
            raise ConfigError("; ".join(f"{name} is {getattr(self, name)}; it must be finite" for name in floats))
        least = {"frames": 1, "steps": 1, "decode_steps": 1, "guidance": 0, "seed": 0}
        problems = [
            f"{name} is {getattr(self, name):g}; it must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if self.guidance > _HIGHEST_GUIDANCE:
            problems.append(f"guidance is {self.guidance:g}; it must be at most {_HIGHEST_GUIDANCE}")
        if self.sampler not in get_args(SamplerName):
            problems.append(f"sampler is {self.sampler!r}; it can be {', '.join(get_args(SamplerName))}")
        if self.seed >= SEED_END:
            problems.append(f"seed is {self.seed}; it must be at most 2**63 - 1")
        if not 1 / LONGEST_FRAME_S <= self.fps <= HIGHEST_FPS:
            problems.append(f"fps is {self.fps:g}; it must be above 0, from 1/{LONGEST_FRAME_S} to {HIGHEST_FPS}")
        if self.height % SIDE_MULTIPLE or self.width % SIDE_MULTIPLE or min(self.height, self.width) < 1:
            nearest = (max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE for side in (self.height, self.width))
            problems.append(
                f"size is {self.height}x{self.width}; sides are multiples of {SIDE_MULTIPLE}, the nearest is "
                f"{'x'.join(map(str, nearest))}"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_image(self) -> bool:
        return self.frames == 1

    @property
    def cells(self) -> tuple[int, int]:
        """Size of a frame in latent cells, (h, w)."""
        return self.height // SPATIAL_COMPRESSION, self.width // SPATIAL_COMPRESSION


def resolve_settings(
    model: TextToVideoModel,
    *,
    size: tuple[int, int] | None = None,
    frames: int | None = None,
    fps: float | None = None,
    steps: int | None = None,
    guidance: float | None = None,
    sampler: SamplerName | None = None,
    decode_steps: int = 1,
    seed: int = 0,
    negative: str | None = None,
) -> GenerationSettings:
    """Fill in settings that are not given from the model's training: the largest size of its caches (the paper's where
    none is recorded), its longest row, its frame rate, and the sampling in its config."""
    flow, space = model.config.diffusion, model.space
    height, width = size or size_for(space)
    longest = longest_row(model) * space.num_frames or 1
    return GenerationSettings(
        height=height, width=width, frames=longest if frames is None else frames,
        fps=space.fps if fps is None else fps, steps=flow.steps if steps is None else steps,
        guidance=flow.guidance if guidance is None else guidance, sampler=sampler or flow.sampler,
        decode_steps=decode_steps, seed=seed, negative=negative,
    )  # fmt: skip


def longest_row(model: TextToVideoModel) -> int:
    """Number of clips in the longest row that the model was trained on; 0 for a model trained on images only."""
    return max(model.config.clips, default=0)


def size_for(space: LatentSpace) -> tuple[int, int]:
    """Default (height, width): the largest size of the caches; that of the paper where none is recorded."""
    return next(iter(trained_sizes(space)), DEFAULT_SIZE)


def trained_sizes(space: LatentSpace) -> list[tuple[int, int]]:
    """The (height, width) of the videos in the caches, the largest first; empty where none is recorded."""
    sizes = space.facts.get("sizes") or space.facts["preprocessing"].get("buckets") or []
    return sorted({(int(height), int(width)) for height, width in sizes}, key=lambda size: (-size[0] * size[1], size))


def frame_positions(settings: GenerationSettings, space_fps: float, before: int = 0) -> Positions:
    """Positions of the output's frames, in frames of the training videos, counted from the first clip's first frame.
    Where they continue `before` frames of the row, they begin one output frame after the last of those."""
    first = before - 1 + space_fps / settings.fps if before else 0.0
    positions: Positions = np.round(first + np.arange(settings.frames) * space_fps / settings.fps, _DIGITS)
    return positions


def clips_of(settings: GenerationSettings, space: LatentSpace, before: int = 0) -> int:
    """Number of clips in a row, including the `before` clips that it continues."""
    return clips_for(frame_positions(settings, space.fps, before * space.num_frames), space.num_frames)


def clips_for(positions: Positions, num_frames: int) -> int:
    """Number of clips of `num_frames` frames needed to reach the last position: clip i takes the positions from
    i * num_frames to below (i + 1) * num_frames, which extends past its own last frame by less than one frame."""
    return int(positions[-1] // num_frames) + 1
