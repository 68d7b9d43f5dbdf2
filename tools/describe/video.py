"""Video for which a text-to-video config is described, and its cost by embedder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.config.t2v import LATENT_PATCH, TextConfig
from regen_dist.errors import ConfigError

if TYPE_CHECKING:
    from regen_dist.config import T2VConfig
    from regen_dist.config.run import Recomputation
    from regen_dist.config.t2v import T2VModelConfig
    from regen_dist.models.flops import RowFlops

COMPRESSIONS = (4, 8, 16, 32)  # k
CONVENTIONAL = 4  # frames per latent frame of the reference embedder
TOKEN_SIDE = LATENT_PATCH * SPATIAL_COMPRESSION  # pixels per side of a token
_CLIP_FRAMES = 33  # k = 32
_TEXT_TOKENS: int = TextConfig.model_fields["max_tokens"].default


@dataclass(frozen=True)
class DescribedVideo:
    """Dimensions of a video; the config itself says only how many clips a row has, the cache determines the rest.

    Args:
        size: (height, width) in pixels, multiples of 16.
        frames: total, as clips of 33; None: the longest row of training, 1 if that is on images alone. 1 is an image.
        text_tokens: tokens of the caption, padding included.
    """

    size: tuple[int, int] = (192, 320)
    frames: int | None = None
    text_tokens: int = _TEXT_TOKENS

    def num_frames(self, config: T2VConfig) -> int:
        """Return the frames of the whole video."""
        longest = max(config.data.clips) * _CLIP_FRAMES if config.data.image_fraction < 1 else 1
        return self.frames or longest

    @property
    def cells(self) -> tuple[int, int]:
        """Rows and columns of its latents."""
        return self.size[0] // SPATIAL_COMPRESSION, self.size[1] // SPATIAL_COMPRESSION

    @property
    def tokens_per_frame(self) -> int:
        """Tokens per latent frame."""
        return (self.cells[0] // LATENT_PATCH) * (self.cells[1] // LATENT_PATCH)


def chosen_video(size: str | None, frames: int | None, text_tokens: int | None) -> DescribedVideo | None:
    """Return the video given by the options; None if none was given.

    Raises:
        ConfigError: see `parse_size`.
    """
    if size is None and frames is None and text_tokens is None:
        return None
    usual = DescribedVideo()
    return DescribedVideo(parse_size(size) if size else usual.size, frames, text_tokens or usual.text_tokens)


def parse_size(text: str) -> tuple[int, int]:
    """Parse HEIGHTxWIDTH, such as 192x320.

    Raises:
        ConfigError: it is malformed, or the sides are not multiples of 16.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    sides = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(sides) or any(side % TOKEN_SIDE for side in sides):
        raise ConfigError(f"--size {text}: give HEIGHTxWIDTH in multiples of {TOKEN_SIDE}, as in 192x320")
    return sides


def latent_frames(frames: int, k: int) -> int:
    """Return the latent frames of a video in clips of k+1 frames, two per clip; the last clip counts as whole. An
    image has one."""
    return 1 if frames == 1 else 2 * -(-frames // (k + 1))


def row_account(config: T2VConfig, video: DescribedVideo) -> RowFlops:
    """Return the FLOP report of the video as one row."""
    frames, engine = latent_frames(video.num_frames(config), _CLIP_FRAMES - 1), config.engine
    how = engine.precision, engine.activation_checkpointing, engine.sequence_parallel, config.diffusion.gives_frames
    return _account(config.model, frames, video.cells, video.text_tokens, *how)


def row_shapes(config: T2VConfig, counted: RowFlops, video: DescribedVideo) -> dict[str, Any]:
    """Return the shapes of the row and the transformer for `regen describe`."""
    channels, frames, *cells = counted.latent_shape
    model = config.model
    return {
        "video": {"frames": video.num_frames(config), "size": list(video.size)},
        "clips": -(-frames // 2),
        "latent_frames": frames,
        "latent_shape": [channels, *cells],
        "transformer": {"blocks": model.blocks, "width": model.width, "heads": model.heads},
        "tokens_per_row": counted.num_tokens,
        "text_tokens": counted.text_tokens,
        "text_width": model.text_width,
        "by_embedder": by_embedder(config, video),
    }


def by_embedder(config: T2VConfig, video: DescribedVideo) -> list[dict[str, Any]]:
    """Return the cost of one forward pass for the same video with the latents of this project's embedders and of a
    conventional one with one latent frame per four frames. The conventional one comes first."""
    whole = video.num_frames(config)
    frames = {("conventional", CONVENTIONAL): -(-whole // CONVENTIONAL)}
    frames |= {("regen", k): latent_frames(whole, k) for k in COMPRESSIONS}
    how = video.cells, video.text_tokens, config.diffusion.gives_frames
    flops = {key: _forward_flops(config.model, count, *how) for key, count in frames.items()}
    return [
        {
            "embedder": embedder,
            "temporal_compression": k,
            "latent_frames": count,
            "tokens": count * video.tokens_per_frame,
            "forward_flops": flops[embedder, k],
            "flops_ratio": flops["conventional", CONVENTIONAL] / flops[embedder, k],
        }
        for (embedder, k), count in frames.items()
    ]


@lru_cache(maxsize=64)
def _forward_flops(model: T2VModelConfig, frames: int, cells: tuple[int, int], text_tokens: int, given: bool) -> int:
    from regen_dist.models.flops import row_forward_flops

    return row_forward_flops(model, frames, cells, text_tokens, given_frames=given)


@lru_cache(maxsize=64)
def _account(
    model: T2VModelConfig,
    frames: int,
    cells: tuple[int, int],
    text_tokens: int,
    precision: Any,
    checkpointing: Recomputation,
    shared: int,
    given: bool,
) -> RowFlops:
    from regen_dist.models.flops import count_row_flops

    return count_row_flops(
        model, frames, cells, text_tokens,
        precision=precision, activation_checkpointing=checkpointing, sequence_parallel=shared, given_frames=given,
    )  # fmt: skip
