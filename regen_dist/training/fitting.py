"""The cells that an embedder's linear code is fitted to before its first step: of the first clips of the order.

Legend: B clips, M cells, k temporal compression, P = 8 pixels a side of a cell.
"""

from __future__ import annotations

from contextlib import closing

import torch
from torch import Tensor

from regen_dist.data.reading.loader import clip_batches
from regen_dist.data.reading.training_set import TrainingSet
from regen_dist.models.principal import cells_of

MOST_CELLS, CELLS_PER_CLIP, MOST_CLIPS = 8192, 128, 512  # few of each clip, so that many clips are seen


def first_cells(data: TrainingSet) -> Tensor:
    """Cells of the first clips of the order, [M, k+1, 3*P*P] in [-1, 1]; images are passed over.

    Raises:
        DataError: a sample and all that could stand in for it are bad, or the store does not answer.
    """
    taken, cells, clips = list[Tensor](), 0, 0
    with closing(clip_batches(data, accumulation=1, rank=0, world_size=1, cursor=0)) as batches:
        for batch in batches:
            clips += len(batch.video)
            if batch.video.shape[2] > 1:
                taken.append(_some_cells(batch.video))
                cells += len(taken[-1])
            if cells >= MOST_CELLS or clips >= MOST_CLIPS:
                break
    return torch.cat(taken) if taken else torch.empty(0)


def _some_cells(video: Tensor) -> Tensor:
    """Of uint8 clips [B, 3, k+1, H, W], evenly spread cells of each."""
    cells = cells_of(video.float() / 127.5 - 1)
    every = max(1, len(cells) // (len(video) * CELLS_PER_CLIP))
    return cells[::every]
