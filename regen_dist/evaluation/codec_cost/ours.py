"""This project's codecs as they are used: a clip of any length is cut into windows that share a frame."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from regen_dist.config import load_embedder_config
from regen_dist.config.schema import SPATIAL_COMPRESSION, ModelConfig, RunConfig
from regen_dist.evaluation.codec_cost.sizes import Counted, Size
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame
from regen_dist.inference.long import Plan, decode_stream, make_plan
from regen_dist.inference.windows import Window, blend_weights
from regen_dist.models import Baseline, Latents, Regen, build_model

_BITS = 16  # of a latent's value


class OwnCoder:
    """An embedder of this project, one sampling step; decodes as `regen reconstruct` does, to frames of eight bits."""

    def __init__(self, config: RunConfig) -> None:
        self._codec = Codec(build_model(config.model), config, torch.device("cpu"))

    def encode(self, video: Tensor) -> tuple[list[Window], tuple[int, int, int]]:
        """The windows of a clip, a group of them at a time, and the clip's size."""
        frames, height, width = video.shape[2:]
        plan = make_plan(frames, self._codec.num_frames)
        windows: list[Window] = []
        for group in plan.groups:
            starts = [plan.starts[number] for number in group]
            clips = [_filled(video[:, :, start : start + plan.clip], plan.clip) for start in starts]
            latents = self._codec.encode(torch.cat(clips))
            own = (Latents(*(part[place, None] for part in latents)) for place in range(len(starts)))
            windows += [Window(each, float(start), plan.clip) for each, start in zip(own, starts, strict=True)]
        return windows, (frames, height, width)

    def decode(self, latents: tuple[list[Window], tuple[int, int, int]]) -> list[Frame]:
        """Group by group, neighbours blended."""
        windows, (frames, *sides) = latents
        plan = make_plan(frames, self._codec.num_frames)
        groups = ([windows[number] for number in group] for group in plan.groups)
        stream = decode_stream(
            self._codec, groups, plan, [np.arange(float(frames))], sides=(sides[0], sides[1]), steps=1
        )
        return [frame for (finished,) in stream for frame in finished]


def own_config(path: Path, precision: str, overrides: Sequence[str] = ()) -> RunConfig:
    """A config whose data is never looked for."""
    own = ["data.url=nowhere", "data.validation_url=null", f"engine.precision={precision}", *overrides]
    return load_embedder_config(path, own)


def count_own(config: ModelConfig, size: Size) -> Counted:
    """Count a codec of this project on the meta device: each window once, and of it the frames that it gives."""
    height, width = size.height, size.width
    plan = make_plan(size.frames, config.num_frames)
    with torch.device("meta"):
        model = build_model(_on_meta(config)).eval()
        clip = torch.empty(1, 3, plan.clip, height, width)
        with torch.no_grad(), FlopCounterMode(display=False) as encoding:
            latents = model.encode(clip)
        given = Counter(_frames_given(plan))
        decode_flops = sum(count * _decode(model, latents, frames, plan.clip) for frames, count in given.items())
    windows = len(plan.starts)
    kept = tuple((windows, *part.shape[1:]) for part in (latents if plan.clip > 1 else latents[:1]))
    return Counted(
        parameters=sum(each.numel() for each in model.parameters()),
        encode_flops=windows * encoding.get_total_flops(),
        decode_flops=decode_flops,
        latents=kept,
        latent_bits=_BITS * sum(torch.Size(shape).numel() for shape in kept),
    )


def _on_meta(config: ModelConfig) -> ModelConfig:
    """With the kernel that runs on the meta device; which one it is changes no count."""
    attention = config.decoder.attention.model_copy(update={"backend": "sdpa"})
    return config.model_copy(update={"decoder": config.decoder.model_copy(update={"attention": attention})})


def _frames_given(plan: Plan) -> list[int]:
    """How many frames of the clip each window decodes; neighbours both decode those that they share."""
    times = torch.arange(plan.num_frames, dtype=torch.float64, device="cpu")
    return (blend_weights(plan.starts, plan.clip, times) > 0).sum(1).tolist()


def _decode(model: Regen | Baseline, latents: Latents, frames: int, clip: int) -> int:
    """Operations of one step for so many frames of a clip; the baseline's decoder gives whole clips alone."""
    height, width = (SPATIAL_COMPRESSION * side for side in latents.content.shape[-2:])
    noisy, times = torch.empty(1, 3, frames, height, width), torch.empty(1, frames)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        if isinstance(model, Baseline):
            model.reconstruct(latents, clip)
        else:
            model.denoise(noisy, torch.ones(1), latents, times)
    return int(counter.get_total_flops())


def _filled(clip: Tensor, length: int) -> Tensor:
    """A clip that is too short, filled up with its last frame."""
    missing = length - clip.shape[2]
    return torch.cat([clip, clip[:, :, -1:].expand(-1, -1, missing, -1, -1)], 2) if missing else clip
