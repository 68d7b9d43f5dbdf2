"""`regen describe`: the command, and the video for which it counts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from regen_dist.config.run import SPATIAL_COMPRESSION
from regen_dist.config.t2v import LATENT_PATCH, TextConfig
from regen_dist.errors import ConfigError
from regen_dist.jsontext import json_text

if TYPE_CHECKING:
    from regen_dist.config import AnyRunConfig, T2VConfig
    from regen_dist.config.run import Recomputation
    from regen_dist.config.t2v import T2VModelConfig
    from regen_dist.models.flops import RowFlops

_DEFAULT_WORLD_SIZE = 8


def describe(
    config: Annotated[Path, typer.Argument(help="A YAML file under configs/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Config overrides, as a.b=value.")] = None,
    world_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="GPUs that ZeRO-3 shards over [default: 8, or 1 for engine.kind=plain]. Several times: side by side.",
        ),
    ] = None,
    clips_per_gpu: Annotated[
        int | None,
        typer.Option(min=1, help="Clips (rows) at once on each GPU: sets train.accumulation, for each number of GPUs."),
    ] = None,
    mfu: Annotated[
        float,
        typer.Option(
            min=0.001,
            max=1.0,
            help="Share of the GPUs' peak that the model's operations reach; published 14B runs: 0.23 to 0.33.",
        ),
    ] = 0.28,
    peak_tflops: Annotated[
        float | None, typer.Option(min=0.001, help="Of one GPU [default: an H100's in bf16, 989].")
    ] = None,
    gpus_per_node: Annotated[int, typer.Option(min=1, help="GPUs per node, joined by NVLink.")] = 8,
    nvlink_gbps: Annotated[
        float, typer.Option(min=0.001, help="Gigabits per second of one GPU in one direction, within a node.")
    ] = 3600.0,
    network_gbps: Annotated[
        float, typer.Option(min=0.001, help="Gigabits per second of one node in one direction.")
    ] = 3200.0,
    dollars_per_gpu_hour: Annotated[float, typer.Option(min=0.0, help="The price.")] = 3.0,
    size: Annotated[
        str | None,
        typer.Option(metavar="HEIGHTxWIDTH", help="Text to video: height and width in pixels [default: 192x320]."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(min=1, help="Text to video: frames of a video, in clips of 33 [default: by data.clips]."),
    ] = None,
    text_tokens: Annotated[
        int | None, typer.Option(min=1, help="Text to video: tokens of a caption [default: 256].")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print latent shapes, parameters and FLOPs of a config, and its requirements on GPUs: memory, communication, time
    and cost in dollars. The model is built on the meta device. MFU, bandwidths and the price are assumptions set by the
    options. A text-to-video config also shows the cost of a video by the embedder of its latents.

    Examples:

    regen describe configs/embedder/regen_k32.yaml --world-size 64 data.size='[256, 256]'

    regen describe configs/t2v/5b.yaml --world-size 64 --size 384x640 --frames 264
    """
    from regen_dist.config import load_config
    from regen_dist.models.memory import Assumptions
    from regen_dist.observe.hardware import GPU_PEAK_TFLOPS
    from tools.describe.facts import gather, with_clips_per_gpu
    from tools.describe.tables import show

    loaded = load_config(config, overrides or [])
    peak = GPU_PEAK_TFLOPS["H100"] if peak_tflops is None else peak_tflops
    assumed = Assumptions(mfu, peak, gpus_per_node, nvlink_gbps, network_gbps, dollars_per_gpu_hour)
    video = chosen_video(size, frames, text_tokens)
    each = []
    for ranks in world_size or [_default_world_size(loaded)]:
        chosen = loaded if clips_per_gpu is None else with_clips_per_gpu(loaded, ranks, clips_per_gpu)
        each.append(gather(chosen, ranks, assumed, video))
    if as_json:
        by_size = {"by_world_size": {str(facts["world_size"]): facts for facts in each}}
        print(json_text(each[0] if len(each) == 1 else by_size, indent=2))
    else:
        show(each)


def _default_world_size(config: AnyRunConfig) -> int:
    return 1 if config.engine.kind == "plain" else _DEFAULT_WORLD_SIZE


# Video for which a text-to-video config is described, and its cost by embedder.


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
        frames: total, as clips of 33; None: the longest row of `data.clips`. 1 is an image.
        text_tokens: tokens of the caption, padding included.
    """

    size: tuple[int, int] = (192, 320)
    frames: int | None = None
    text_tokens: int = _TEXT_TOKENS

    def num_frames(self, config: T2VConfig) -> int:
        """Return the frames of the whole video."""
        return self.frames or max(config.data.clips) * _CLIP_FRAMES

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
    how = engine.precision, engine.activation_checkpointing, engine.sequence_parallel
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
    flops = {key: _forward_flops(config.model, count, video.cells, video.text_tokens) for key, count in frames.items()}
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
def _forward_flops(model: T2VModelConfig, frames: int, cells: tuple[int, int], text_tokens: int) -> int:
    from regen_dist.models.flops import row_forward_flops

    return row_forward_flops(model, frames, cells, text_tokens)


@lru_cache(maxsize=64)
def _account(
    model: T2VModelConfig,
    frames: int,
    cells: tuple[int, int],
    text_tokens: int,
    precision: Any,
    checkpointing: Recomputation,
    shared: int,
) -> RowFlops:
    from regen_dist.models.flops import count_row_flops

    how = {"precision": precision, "activation_checkpointing": checkpointing, "sequence_parallel": shared}
    return count_row_flops(model, frames, cells, text_tokens, **how)
