"""Fixed validation clips, or rows of cached latents."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from regen_dist.config.datasets import DataConfig
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.format.catalogue import Dataset
from regen_dist.data.format.latents import CacheFacts, LatentEntry
from regen_dist.data.loading.clip_loader import ClipBatch, clip_geometry
from regen_dist.data.loading.datasets import check_same_space, open_latents, open_videos
from regen_dist.data.loading.latent_loader import LatentBatch, collate_latents, read_entry, row_of
from regen_dist.data.order.order import Bucket
from regen_dist.data.video.conversion import UInt8s
from regen_dist.data.video.reader import VideoReader, read_clip
from regen_dist.errors import DataError

_MOST_CLIPS = 4
_MAX_CANDIDATES = 1 << 20  # first rows of a dataset, from which the validation rows are chosen


class ValidationRows(NamedTuple):
    """Fixed rows of cached latents, with the captions and frame rates of their videos."""

    batch: LatentBatch
    captions: tuple[str, ...]
    fps: tuple[float, ...]


def validation_clip(config: DataConfig, *, num_frames: int, most: int = _MOST_CLIPS) -> ClipBatch:
    """Read one to `most` fixed clips, spread over the validation data (the training data if there is none).

    First frames, stride 1, centre crop of `config.validation_size`, not mirrored. Read in this process.

    Raises:
        DataError: no video is long enough, or a clip cannot be read; validation clips are not replaced.
    """
    dataset = open_videos(config.validation_url or config.sources[0], config)
    rows = _long_enough(dataset, num_frames, most)
    bucket = Bucket(*(config.validation_size or config.sizes[0]), num_frames)
    clips = [_clip(dataset, row, bucket, config.short_side) for row in rows]
    ids = torch.tensor([int(dataset.records["id"][row]) for row in rows], dtype=torch.int64)
    return ClipBatch(torch.from_numpy(np.stack(clips)), ids)


def _long_enough(dataset: Dataset, num_frames: int, most: int) -> list[int]:
    """Choose rows spread over the dataset; where some of these are too short for a clip, spread over those that are
    not."""
    rows = _spread(len(dataset), most)
    if min(int(dataset.records["frames"][row]) for row in rows) >= num_frames:
        return rows
    records = dataset.records[:_MAX_CANDIDATES]
    fitting = np.flatnonzero(records["frames"] >= num_frames)
    if not len(fitting):
        raise DataError(
            f"none of the {len(records)} samples of {dataset.store.url} has the {num_frames} frames of a validation "
            "clip; name other videos in data.validation_url"
        )
    return [int(fitting[place]) for place in _spread(len(fitting), most)]


def _spread(count: int, most: int) -> list[int]:
    number = min(most, count)
    return [place * count // number for place in range(number)]


def _clip(dataset: Dataset, number: int, bucket: Bucket, short_side: int | str | None) -> UInt8s:
    row = dataset.row(number)
    try:
        data = dataset.read(row)
        with VideoReader(data) as reader:
            geometry = clip_geometry(row.height, row.width, bucket, short_side)
            return read_clip(reader, range(bucket.frames), geometry)
    except DataError as error:
        raise DataError(f"validation clip, row {number} in {row.shard} of {dataset.store.url}: {error}") from error


def validation_rows(config: LatentDataConfig, facts: CacheFacts, *, rows: int = _MOST_CLIPS) -> ValidationRows:
    """Read up to `rows` fixed rows of one shape, spread over the validation data (the training data if there is none).

    Rows have the most clips that `config.clips` and the data allow (images if the data has no clips, or if images alone
    are trained on), the most frequent size of such entries, and start at the first clip of each. Read in this process.

    Args:
        config: config of the data: caches and clips in a row.
        facts: description of the latents that are trained on.
        rows: largest number of rows.

    Raises:
        DataError: the cache has other latents, or an entry cannot be read; validation entries are not replaced.
    """
    dataset, found = open_latents(config.validation_url or config.sources[0], config)
    check_same_space([facts, found])
    lengths = config.clips if config.image_fraction < 1 else ()
    clips, fitting = _fitting(dataset.records[:_MAX_CANDIDATES], lengths, facts.num_frames)
    chosen = [int(fitting[place]) for place in _spread(len(fitting), rows)]
    entries = [_entry(dataset, row, facts) for row in chosen]
    ids = torch.tensor([int(dataset.records["id"][row]) for row in chosen], dtype=torch.int64)
    batch = collate_latents([row_of(entry, 0, clips) for entry in entries], ids)
    captions = tuple(dataset.sample(row).caption or "" for row in chosen)
    return ValidationRows(batch, captions, tuple(float(dataset.records["fps"][row]) for row in chosen))


def _fitting(records: npt.NDArray[np.void], clips: Sequence[int], num_frames: int) -> tuple[int, npt.NDArray[np.int64]]:
    """Return the most clips that any entry has (0: only images), and the rows of the most frequent size with as
    many."""
    most = next((n for n in sorted(clips, reverse=True) if (records["frames"] >= n * num_frames).any()), 0)
    long_enough = np.flatnonzero(records["frames"] >= most * num_frames)
    sides = np.stack([records["height"][long_enough], records["width"][long_enough]])
    _, numbers, counts = np.unique(sides, axis=1, return_inverse=True, return_counts=True)
    return most, long_enough[numbers.ravel() == counts.argmax()]


def _entry(dataset: Dataset, number: int, facts: CacheFacts) -> LatentEntry:
    row = dataset.row(number)
    try:
        return read_entry(facts, row, dataset.read(row))
    except DataError as error:
        raise DataError(f"validation entry, row {number} in {row.shard} of {dataset.store.url}: {error}") from error
