"""Which samples belong to which bucket: the rows of every line of the order.

A video goes to the crop whose aspect ratio is nearest to its own, and among such crops to the largest that it fills
without being enlarged. Every sample can be an image; those with enough frames are clips as well.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.data.catalogue import Dataset
from regen_dist.data.order import Bucket

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

_CHUNK = 1 << 20  # rows looked at together
_SAME_ASPECT = 0.05  # aspect ratios nearer than this (in their logarithm) count as equal


class Pools(NamedTuple):
    """Rows of one dataset by bucket. Crosses process boundaries.

    `rows` maps the rows of all buckets, one after the other; None when there is one bucket and it holds every row.
    `bounds[i]` is where bucket i begins, and `bounds[i + 1]` where it ends.
    """

    path: Path | None
    bounds: tuple[int, ...]

    def size(self, bucket: int) -> int:
        """Samples of a bucket."""
        return self.bounds[bucket + 1] - self.bounds[bucket]


class PoolRows:
    """The mapped rows of `Pools`, in one process."""

    def __init__(self, pools: Pools) -> None:
        self._bounds = pools.bounds
        self._rows: Int64s | None = None if pools.path is None else np.load(pools.path, mmap_mode="r")

    def row(self, bucket: int, number: int) -> int:
        """The dataset's row of a bucket's sample."""
        return number if self._rows is None else int(self._rows[self._bounds[bucket] + number])


def make_pools(dataset: Dataset, buckets: Sequence[Bucket], folder: Path) -> Pools:
    """Sort a dataset's rows into buckets; the result lies in `folder`, made once a node.

    Args:
        buckets: distinct; those of one frame are for images.
        folder: on a local disk.
    """
    sizes = sorted({(bucket.height, bucket.width) for bucket in buckets})
    if len(sizes) == 1 and (len(buckets) == 1) and _shortest(dataset) >= buckets[0].frames:
        return Pools(None, (0, len(dataset)))
    described = f"{dataset.catalogue.stem}:{[tuple(bucket) for bucket in buckets]}"
    path = folder / f"pools-{hashlib.sha256(described.encode()).hexdigest()[:32]}.npy"
    best, frames = _best_sizes(dataset, sizes)
    counts = [int(_members(bucket, sizes, best, frames).sum()) for bucket in buckets]
    if not path.exists():
        _write(path, (_members(bucket, sizes, best, frames) for bucket in buckets), sum(counts))
    return Pools(path, tuple(np.cumsum([0, *counts]).tolist()))


def best_size(height: Int32s, width: Int32s, sizes: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """For videos of `height` x `width` [n], the number of the crop that suits each best, uint8 [n].

    Nearest aspect ratio first; then one that needs no enlarging; then the largest of those, or else the smallest.
    """
    crops = np.array(sizes, dtype=np.float64)  # (S, 2)
    aspects = np.abs(np.log(width / height)[:, None] - np.log(crops[:, 1] / crops[:, 0]))  # (n, S)
    nearest = aspects <= aspects.min(1, keepdims=True) + _SAME_ASPECT
    enlarged = (height[:, None] < crops[:, 0]) | (width[:, None] < crops[:, 1])
    area = crops.prod(1) / crops.prod(1).max()  # (S,), at most 1
    costs = np.where(nearest, 0.0, 100.0) + np.where(enlarged, 10.0 + area, 1.0 - area)
    best: npt.NDArray[np.uint8] = costs.argmin(1).astype(np.uint8)
    return best


def _shortest(dataset: Dataset) -> int:
    return min((int(part["frames"].min()) for part in _chunks(dataset)), default=0)


def _best_sizes(dataset: Dataset, sizes: list[tuple[int, int]]) -> tuple[npt.NDArray[np.uint8], Int32s]:
    """By row: the number of the best size, and the frames. Five bytes a row."""
    parts = [(best_size(part["height"], part["width"], sizes), np.array(part["frames"])) for part in _chunks(dataset)]
    best, frames = zip(*parts, strict=True) if parts else ((np.empty(0, np.uint8),), (np.empty(0, np.int32),))
    return np.concatenate(best), np.concatenate(frames)


def _chunks(dataset: Dataset) -> Iterator[npt.NDArray[np.void]]:
    for start in range(0, len(dataset), _CHUNK):
        yield dataset.records[start : start + _CHUNK]


def _members(
    bucket: Bucket, sizes: list[tuple[int, int]], best: npt.NDArray[np.uint8], frames: Int32s
) -> npt.NDArray[np.bool_]:
    number = sizes.index((bucket.height, bucket.width))
    members: npt.NDArray[np.bool_] = (best == number) & (frames >= bucket.frames)
    return members


def _write(path: Path, members: Iterator[npt.NDArray[np.bool_]], total: int) -> None:
    """All rows of all buckets as one .npy file, atomically; by one process at a time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with temporary.open("wb") as file:
                header = {"descr": "<i8", "fortran_order": False, "shape": (total,)}
                np.lib.format.write_array_header_1_0(file, header)
                for each in members:
                    file.write(np.flatnonzero(each).astype("<i8").tobytes())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
