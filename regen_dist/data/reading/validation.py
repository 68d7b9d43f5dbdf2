"""The fixed clips that a run is looked at by."""

from __future__ import annotations

import numpy as np
import torch

from regen_dist.config.schema import DataConfig
from regen_dist.data.dataset.catalogue import Dataset, open_dataset
from regen_dist.data.order.order import Bucket
from regen_dist.data.reading.clips import clip_geometry
from regen_dist.data.reading.fetching import limits_of
from regen_dist.data.reading.loader import ClipBatch
from regen_dist.data.video import reader as video
from regen_dist.errors import DataError

_MOST_CLIPS = 4


def validation_clip(config: DataConfig, *, num_frames: int) -> ClipBatch:
    """One to four fixed clips, spread over the validation data (the training data where there is none).

    First frames, stride 1, centre crop of `config.validation_size`, not mirrored. Read in this process.

    Raises:
        DataError: a clip cannot be read; nothing stands in for a validation clip.
    """
    dataset = open_dataset(config.validation_url or config.sources[0], config.read.cache, limits_of(config.read))
    number = min(_MOST_CLIPS, len(dataset))
    rows = [row * len(dataset) // number for row in range(number)]
    bucket = Bucket(*(config.validation_size or config.sizes[0]), num_frames)
    clips = [_clip(dataset, row, bucket, config.short_side) for row in rows]
    ids = torch.tensor([int(dataset.records["id"][row]) for row in rows], dtype=torch.int64)
    return ClipBatch(torch.from_numpy(np.stack(clips)), ids)


def _clip(dataset: Dataset, number: int, bucket: Bucket, short_side: int | str | None) -> video.UInt8s:
    row = dataset.row(number)
    try:
        data = dataset.read(row)
        with video.VideoReader(data) as reader:
            geometry = clip_geometry(row.height, row.width, bucket, short_side)
            return video.read_clip(reader, range(bucket.frames), geometry)
    except DataError as error:
        raise DataError(f"validation clip, row {number} in {row.shard} of {dataset.store.url}: {error}") from error
