"""Decodes rows of clips that lie side by side, as text to video makes them, at any times.

Legend: B rows, n clips in a row, T = k + 1 frames of a clip, F frames that are asked for, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from regen_dist.config.section import SPATIAL_COMPRESSION
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import Frame
from regen_dist.inference.long import Positions, VideoCodec, decode_stream, make_plan
from regen_dist.inference.windows import Window
from regen_dist.models import Latents
from regen_dist.pixels import to_video


def row_frames(
    codec: VideoCodec,
    row: Sequence[Latents],
    positions: Positions,
    *,
    steps: int = 1,
    seed: int = 0,
    sample_id: int = 0,
) -> Iterator[list[Frame]]:
    """The frames of one row, in order, as they are finished: what is held does not grow with its length.

    Args:
        codec: decodes.
        row: the latents of each clip, [1, C, h, w].
        positions: [F] real and ascending, in frames from the row's first; clip i begins at i * T.
        steps: sampling steps of the decoder.
        seed, sample_id: of the decoder's noise.
    """
    clip = codec.num_frames
    plan = make_plan(len(row) * clip, clip, overlap=0)
    windows = [Window(latents, float(number * clip), clip) for number, latents in enumerate(row)]
    groups = ([windows[number] for number in group] for group in plan.groups)
    height, width = (SPATIAL_COMPRESSION * side for side in row[0].content.shape[-2:])
    for (frames,) in decode_stream(
        codec, groups, plan, [positions], sides=(height, width), steps=steps, seed=seed, sample_id=sample_id
    ):
        yield frames


def decode_row(codec: Codec, row: Sequence[Latents], *, steps: int = 1, seed: int = 0) -> Tensor:
    """Whole rows of a batch at their own frames, [B, 3, n*T, H, W] in [-1, 1] on the CPU; images (of one clip without
    motion) as [B, 3, 1, H, W]."""
    if len(row) == 1 and not bool((row[0].motion != 0).any()):
        return codec.decode(row[0], torch.zeros(1), steps=steps, seed=seed).cpu()
    positions = np.arange(len(row) * codec.num_frames, dtype=np.float64)
    videos = []
    for number in range(len(row[0].content)):
        own = [Latents(*(part[number : number + 1] for part in latents)) for latents in row]
        parts = row_frames(codec, own, positions, steps=steps, seed=seed, sample_id=number)
        videos.append(to_video([frame for part in parts for frame in part]))
    return torch.stack(videos)
