"""Which samples belong to which bucket: the rows of every line of the order.

A video goes to the crop whose aspect ratio is nearest to its own, and among such crops to the largest that it fills
without being enlarged. Every sample can be an image; those with enough frames are clips as well.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import numpy.typing as npt

from regen_dist.data.dataset.catalogue import Dataset, make_once
from regen_dist.data.order.order import Bucket
from regen_dist.errors import DataError

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

_CHUNK = 1 << 20  # rows looked at together
_SAME_ASPECT = 0.05  # aspect ratios nearer than this (in their logarithm) count as equal


class Pools(NamedTuple):
    """Rows of one dataset by bucket. Crosses process boundaries.

    The file at `path` holds `bounds`, and after them the rows of all buckets, one after the other; no rows where there
    is one bucket and it holds every row. `bounds[i]` is where bucket i begins, and `bounds[i + 1]` where it ends.
    """

    path: Path
    bounds: tuple[int, ...]

    def size(self, bucket: int) -> int:
        """Samples of a bucket."""
        return self.bounds[bucket + 1] - self.bounds[bucket]


class PoolRows:
    """The mapped rows of `Pools`, in one process."""

    def __init__(self, pools: Pools) -> None:
        rows = _mapped(pools.path)[len(pools.bounds) :]
        self._bounds, self._rows = pools.bounds, rows if len(rows) else None

    def row(self, bucket: int, number: int) -> int:
        """The dataset's row of a bucket's sample."""
        return number if self._rows is None else int(self._rows[self._bounds[bucket] + number])


def make_pools(dataset: Dataset, buckets: Sequence[Bucket], folder: Path) -> Pools:
    """Sort a dataset's rows into buckets; the result lies in `folder`, made once a node.

    Args:
        buckets: distinct; those of one frame are for images.
        folder: on a local disk.

    Raises:
        DataError: it cannot be written there.
    """
    described = f"2:{dataset.catalogue.stem}:{[tuple(bucket) for bucket in buckets]}"
    path = folder / f"pools-{hashlib.sha256(described.encode()).hexdigest()[:32]}.npy"
    make_once(path, lambda file: _write(file, dataset, buckets))
    return Pools(path, tuple(_mapped(path)[: len(buckets) + 1].tolist()))


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


def _write(file: IO[bytes], dataset: Dataset, buckets: Sequence[Bucket]) -> None:
    """Bounds and rows as one .npy file."""
    sizes = sorted({(bucket.height, bucket.width) for bucket in buckets})
    best, frames = _best_sizes(dataset, sizes)
    members = [(sizes.index((bucket.height, bucket.width)), bucket.frames) for bucket in buckets]
    counts = [sum(int(part.sum()) for _, part in _members(best, frames, *each)) for each in members]
    all_in_one = counts == [len(dataset)]
    total = 0 if all_in_one else sum(counts)
    header = {"descr": "<i8", "fortran_order": False, "shape": (len(counts) + 1 + total,)}
    np.lib.format.write_array_header_1_0(file, header)
    file.write(np.cumsum([0, *counts], dtype="<i8").tobytes())
    for each in members if total else ():
        for start, part in _members(best, frames, *each):
            file.write((np.flatnonzero(part) + start).astype("<i8").tobytes())


def _best_sizes(dataset: Dataset, sizes: list[tuple[int, int]]) -> tuple[npt.NDArray[np.uint8], Int32s]:
    """By row: the number of the best size, and the frames. Five bytes a row."""
    best, frames = np.empty(len(dataset), np.uint8), np.empty(len(dataset), np.int32)
    for start in range(0, len(dataset), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = dataset.records[rows]
        best[rows], frames[rows] = best_size(part["height"], part["width"], sizes), part["frames"]
    return best, frames


def _members(
    best: npt.NDArray[np.uint8], frames: Int32s, size: int, least_frames: int
) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Chunk by chunk: its first row, and which rows go to a bucket."""
    for start in range(0, len(best), _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield start, (best[rows] == size) & (frames[rows] >= least_frames)


def _mapped(path: Path) -> Int64s:
    try:
        rows: Int64s = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it and run the same again") from error
    return rows
