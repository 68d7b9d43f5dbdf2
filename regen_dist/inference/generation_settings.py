"""What is asked of a generation, and where the frames of its videos lie."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from regen_dist.config.section import SPATIAL_COMPRESSION, SamplerName
from regen_dist.config.t2v import LATENT_PATCH
from regen_dist.errors import ConfigError
from regen_dist.inference.long import Positions
from regen_dist.inference.space_files import LatentSpace
from regen_dist.inference.text_to_video import TextToVideoModel

SIDE_MULTIPLE = LATENT_PATCH * SPATIAL_COMPRESSION  # pixels: a token is 2 x 2 cells of 8 x 8
DEFAULT_SIZE = (192, 320)  # paper, Sec. 4
_DIGITS = 6  # of a position: 24 frames at 30 a second must not end at 32.99999…


@dataclass(frozen=True)
class GenerationSettings:
    """Everything that is asked of a generation but the prompts.

    Args:
        height, width: in pixels, multiples of 16.
        frames: of each video; 1 makes images.
        fps: frames a second of the videos.
        steps: of the sampler.
        guidance: scale of classifier-free guidance; 1 is none.
        sampler: `euler`, `heun` or `dpmpp_2m` (second order).
        decode_steps: sampling steps of the embedder's decoder.
        seed: of all noise.
        negative: what guidance leads away from; None is the empty caption.

    Raises:
        ConfigError: every value that cannot be.
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
        least = {"frames": 1, "steps": 1, "decode_steps": 1, "guidance": 0, "seed": 0}
        problems = [
            f"{name} is {getattr(self, name):g}; it must be at least {low}"
            for name, low in least.items()
            if getattr(self, name) < low
        ]
        if not self.fps > 0:
            problems.append(f"fps is {self.fps:g}; it must be above 0")
        if self.height % SIDE_MULTIPLE or self.width % SIDE_MULTIPLE or min(self.height, self.width) < 1:
            nearest = "x".join(str(_nearest(side)) for side in (self.height, self.width))
            problems.append(
                f"size is {self.height}x{self.width}; sides are multiples of {SIDE_MULTIPLE}, the nearest is {nearest}"
            )
        if problems:
            raise ConfigError("; ".join(problems))

    @property
    def is_image(self) -> bool:
        """Whether images are made."""
        return self.frames == 1

    @property
    def cells(self) -> tuple[int, int]:
        """Latent cells, (h, w)."""
        return self.height // SPATIAL_COMPRESSION, self.width // SPATIAL_COMPRESSION


def settings_for(
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
    """Settings of which what is not given is as the model was trained: the size, where the caches have one (else that
    of the paper), its longest row, its frame rate, and the sampling that its config names."""
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
    """Clips of the longest row that the model was trained on; 0 where images alone were."""
    return max(model.config.clips, default=0)


def size_for(space: LatentSpace) -> tuple[int, int]:
    """(height, width) where none is given: that of the caches, where they have one, else that of the paper."""
    return trained_size(space) or DEFAULT_SIZE


def trained_size(space: LatentSpace) -> tuple[int, int] | None:
    """The (height, width) that all videos of the caches have; None where there are several, or they do not say."""
    sizes = space.facts.get("sizes") or space.facts["preprocessing"].get("buckets") or []
    return (int(sizes[0][0]), int(sizes[0][1])) if len(sizes) == 1 else None


def frame_positions(settings: GenerationSettings, space_fps: float, before: int = 0) -> Positions:
    """Where the frames of an output lie, in frames of what the model was trained on, from the first clip's first;
    where they continue others, of which the row has `before`, they begin one frame of the output after the last."""
    first = before - 1 + space_fps / settings.fps if before else 0.0
    positions: Positions = np.round(first + np.arange(settings.frames) * space_fps / settings.fps, _DIGITS)
    return positions


def clips_of(settings: GenerationSettings, space: LatentSpace, before: int = 0) -> int:
    """Clips of a row, of which `before` are continued."""
    return clips_for(frame_positions(settings, space.fps, before * space.num_frames), space.num_frames)


def clips_for(positions: Positions, num_frames: int) -> int:
    """Clips of `num_frames` frames in a row that reach to the last position: clip i takes those from i * num_frames to
    below (i + 1) * num_frames, in which it goes past its own last frame by less than one frame."""
    return int(positions[-1] // num_frames) + 1


def _nearest(side: int) -> int:
    return max(1, round(side / SIDE_MULTIPLE)) * SIDE_MULTIPLE
