"""Training sets: samples of videos or cached latents sorted into buckets, with their data order."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Generic, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from regen_dist.config.datasets import DataConfig, MixtureConfig
from regen_dist.config.identity import different_latents, facts_identity, latent_identity, order_identity
from regen_dist.config.t2v import LatentDataConfig
from regen_dist.data.format.catalogue import Dataset, cache_folder, make_once, open_dataset
from regen_dist.data.format.latents import CacheFacts, TextEmbedding, read_null_text
from regen_dist.data.format.manifest import only_videos
from regen_dist.data.loading.fetch import SampleLocation
from regen_dist.data.order.order import Bucket, BucketStream, DataOrder, MicroBatch
from regen_dist.data.storage.connection import limits_of
from regen_dist.errors import DataError

# --- assignment of samples to buckets ---
#
# A video is assigned to the crop with the nearest aspect ratio, and among such crops to the largest that it fills
# without upscaling. Every sample can be an image; those with enough frames are clips as well.

Int64s = npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]

_CHUNK = 1 << 20  # rows processed together
_SAME_ASPECT = 0.05  # aspect ratios with a smaller difference of logarithms count as equal


class Pools(NamedTuple):
    """Rows of one dataset by bucket; can be sent to other processes.

    The file at `path` holds `bounds`, then the rows of all buckets in sequence; no rows if a single bucket holds every
    row. Bucket i spans `bounds[i]` to `bounds[i + 1]`.
    """

    path: Path
    bounds: tuple[int, ...]

    def size(self, bucket: int) -> int:
        return self.bounds[bucket + 1] - self.bounds[bucket]


class PoolRows:
    """Memory-mapped rows of `Pools`, in one process."""

    def __init__(self, pools: Pools) -> None:
        rows = _mapped(pools.path)[len(pools.bounds) :]
        self._bounds, self._rows = pools.bounds, rows if len(rows) else None

    def row(self, bucket: int, number: int) -> int:
        """Return the dataset's row of a bucket's sample."""
        return number if self._rows is None else int(self._rows[self._bounds[bucket] + number])


def make_pools(dataset: Dataset, buckets: Sequence[Bucket], folder: Path) -> Pools:
    """Sort a dataset's rows into buckets; the result is stored in `folder`, once a node.

    Args:
        buckets: distinct; those of one frame are for images.
        folder: folder on a local disk.

    Raises:
        DataError: the folder cannot be written.
    """
    described = f"2:{dataset.catalogue.stem}:{[tuple(bucket) for bucket in buckets]}"
    path = folder / f"pools-{hashlib.sha256(described.encode()).hexdigest()[:32]}.npy"
    make_once(path, lambda file: _write(file, dataset, buckets))
    return Pools(path, tuple(_mapped(path)[: len(buckets) + 1].tolist()))


def best_size(height: Int32s, width: Int32s, sizes: Sequence[tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """Return the number of the best crop for videos of `height` x `width` [n], uint8 [n].

    Criteria in order: nearest aspect ratio; no upscaling; the largest of those, or else the smallest.
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
    """Write bounds and rows as one .npy file."""
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
    """Return the number of the best size and the frames of each row; five bytes a row."""
    best, frames = np.empty(len(dataset), np.uint8), np.empty(len(dataset), np.int32)
    for start in range(0, len(dataset), _CHUNK):
        rows = slice(start, start + _CHUNK)
        part = dataset.records[rows]
        best[rows], frames[rows] = best_size(part["height"], part["width"], sizes), part["frames"]
    return best, frames


def _members(
    best: npt.NDArray[np.uint8], frames: Int32s, size: int, least_frames: int
) -> Iterator[tuple[int, npt.NDArray[np.bool_]]]:
    """Yield the first row of each chunk and a mask of its rows in a bucket."""
    for start in range(0, len(best), _CHUNK):
        rows = slice(start, start + _CHUNK)
        yield start, (best[rows] == size) & (frames[rows] >= least_frames)


def _mapped(path: Path) -> Int64s:
    try:
        rows: Int64s = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path}: damaged ({error}); remove it and run the same again") from error
    return rows


# --- sample sets ---

Config = TypeVar("Config", bound=MixtureConfig)


class SampleSet(ABC, Generic[Config]):
    """Base class of training sets of videos and of latents. Cheap to send to another process.

    Args:
        config: config of the data.
        datasets: opened datasets, in the order of `config.sources`.
        buckets: distinct buckets that samples are sorted into; those of one frame are for images.
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: seed of the order and of every sample's random choices.

    Raises:
        ConfigError: weights or image_fraction do not fit the data.
        DataError: no sample fits, or a catalogue cannot be written.
    """

    def __init__(
        self, config: Config, datasets: Sequence[Dataset], buckets: Sequence[Bucket], *, batch_global: int, seed: int
    ) -> None:
        self.config, self.seed = config, seed
        self.datasets, self.buckets = tuple(datasets), tuple(buckets)
        folder = cache_folder(config.read.cache) / "catalogues"
        self._pools: tuple[Pools, ...] = tuple(make_pools(each, self.buckets, folder) for each in self.datasets)
        if config.image_fraction < 1 and not self._num_long_enough:
            raise DataError(self._nothing_fits())
        streams = [BucketStream(bucket, self._sizes(number)) for number, bucket in enumerate(self.buckets)]
        self.order = DataOrder(tuple(streams), batch_global, seed, config.weights, config.image_fraction)

    def __getstate__(self) -> dict[str, object]:
        """Return the state without memory maps; the other process maps the files again."""
        return {name: value for name, value in vars(self).items() if name != "_rows"}

    def __len__(self) -> int:
        return sum(len(dataset) for dataset in self.datasets)

    def places(self, batch: MicroBatch) -> list[SampleLocation]:
        """Return the locations of a micro-batch's samples, in order."""
        return [
            self._place(batch, int(dataset), int(row)) for dataset, row in zip(batch.datasets, batch.rows, strict=True)
        ]

    def replacement(self, batch: MicroBatch, slot: int, attempt: int) -> SampleLocation:
        """Return the replacement for a bad sample: of the same dataset and bucket, a function of the seed."""
        dataset, epoch, row = int(batch.datasets[slot]), int(batch.epochs[slot]), int(batch.rows[slot])
        return self._place(batch, dataset, self.order.replacement(batch.stream, dataset, epoch, row, attempt))

    @abstractmethod
    def identity(self) -> dict[str, str]:
        """Return everything that determines the samples of a step, by config names; a run resumes only if it is
        equal."""

    def summary(self) -> str:
        """Return a line for the log: the number of samples, and of those too short for any bucket of clips."""
        text = f"data: {len(self)} samples in {len(self.datasets)} dataset(s), {len(self.buckets)} bucket(s)"
        short = len(self) - self._num_long_enough
        if short and self.config.image_fraction < 1:
            text += f"; {short} have fewer than {self._least()}" + (
                " and are used as images only" if self.config.image_fraction else " and are left out"
            )
        return text

    def _facts(self) -> dict[str, str]:
        described = (dataset.manifest.described for dataset in self.datasets)
        return facts_identity([None if each is None else each.facts for each in described])

    @abstractmethod
    def _least(self) -> str:
        """Describe the least length of a sample for a clip."""

    @abstractmethod
    def _nothing_fits(self) -> str:
        """Return the message for the case that no sample is long enough."""

    def _place(self, batch: MicroBatch, dataset: int, row: int) -> SampleLocation:
        return SampleLocation(dataset, self.datasets[dataset].row(self._rows[dataset].row(batch.stream, row)))

    @cached_property
    def _rows(self) -> list[PoolRows]:
        return [PoolRows(pools) for pools in self._pools]

    def _sizes(self, bucket: int) -> tuple[int, ...]:
        return tuple(pools.size(bucket) for pools in self._pools)

    @property
    def _num_long_enough(self) -> int:
        """Return the number of samples in the buckets of the shortest clips."""
        lengths = sorted(bucket.frames for bucket in self.buckets if not bucket.is_image)
        return sum(sum(self._sizes(n)) for n, bucket in enumerate(self.buckets) if bucket.frames in lengths[:1])


class TrainingSet(SampleSet[DataConfig]):
    """Training set of videos with its data order. Cheap to send to another process.

    Args:
        config: config of the data: sources and cropping.
        num_frames: frames of a clip (k + 1).
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: seed of the order and of every clip's position.
        also: further values that a resumed run must not change, by name, such as a frozen encoder's fingerprint.

    Raises:
        DataError: a dataset cannot be opened or holds no videos, or no sample fits.
    """

    def __init__(
        self,
        config: DataConfig,
        *,
        num_frames: int,
        batch_global: int,
        seed: int,
        also: Mapping[str, str] | None = None,
    ) -> None:
        self._num_frames, self._also = num_frames, dict(also or {})
        datasets = [open_videos(url, config) for url in config.sources]
        super().__init__(config, datasets, _buckets(config, num_frames), batch_global=batch_global, seed=seed)

    def identity(self) -> dict[str, str]:
        """Return everything that determines the clips of a step, by config names; a run resumes only if it is equal."""
        return order_identity(
            self.config, [each.fingerprint for each in self.datasets], num_frames=self._num_frames,
            batch_global=self.order.batch_global, seed=self.seed,
        ) | self._facts() | self._also  # fmt: skip

    def _least(self) -> str:
        return f"{self._num_frames} frames"

    def _nothing_fits(self) -> str:
        return (
            f"none of the {len(self)} samples of {', '.join(self.config.sources)} has the {self._num_frames} frames of "
            f"a clip; build shards with --min-frames {self._num_frames}, or train a model of smaller temporal "
            "compression"
        )


def open_videos(url: str, config: DataConfig) -> Dataset:
    """Open a dataset of videos; raise DataError if it cannot be opened or holds something else."""
    dataset = open_dataset(url, config.read.cache, limits_of(config.read))
    only_videos(dataset.manifest, url)
    return dataset


def _buckets(config: DataConfig, num_frames: int) -> tuple[Bucket, ...]:
    """Return buckets of clips of every size, and of images of every size if images are used."""
    clips = [Bucket(height, width, num_frames) for height, width in config.sizes if config.image_fraction < 1]
    images = [Bucket(height, width, 1) for height, width in config.sizes if config.image_fraction > 0]
    return tuple(dict.fromkeys([*clips, *images]))


# --- cached latents for text to video ---

_MOST_SIZES = 255  # `Pools` numbers sizes with one byte
_ROWS_AT_ONCE = 1 << 20


class LatentSet(SampleSet[LatentDataConfig]):
    """Training set of latent caches with its data order.

    Each bucket has one size and one number of clips in a row, or images: the content latent of a video's first clip is
    that of its first frame. An entry is in every bucket of its size that it is long enough for.

    Args:
        config: config of the data: caches and rows.
        batch_global: samples of one optimizer step, over all ranks and micro-batches.
        seed: seed of the order and of every row's position.

    Attributes:
        facts: description of the latent space, which all caches share; other fields are the first cache's.
        statistics: statistics of the latents as JSON, one for each cache in the order of `config.sources`.

    Raises:
        DataError: a dataset cannot be opened, is no cache, or has other latents than the first; or no entry fits.
    """

    def __init__(self, config: LatentDataConfig, *, batch_global: int, seed: int) -> None:
        datasets, facts = zip(*(open_latents(url, config) for url in config.sources), strict=True)
        check_same_space(facts)
        self.facts: CacheFacts = facts[0]
        self.statistics: tuple[Mapping[str, Any], ...] = tuple(each.statistics for each in facts)
        buckets = _latents_buckets(config, sizes_of(datasets), self.facts.num_frames)
        super().__init__(config, datasets, buckets, batch_global=batch_global, seed=seed)

    def null_text(self) -> TextEmbedding | None:
        """Read the embedding of the empty caption; None if the caches have no text."""
        return read_null_text(self.datasets[0].store, self.facts)

    def identity(self) -> dict[str, str]:
        """Return everything that determines the rows and texts of a step, by config names."""
        return latent_identity(
            self.config, [each.fingerprint for each in self.datasets], batch_global=self.order.batch_global,
            seed=self.seed,
        ) | self._facts()  # fmt: skip

    def _least(self) -> str:
        return f"{min(self.config.clips)} clip(s)"

    def _nothing_fits(self) -> str:
        least, num_frames = min(self.config.clips), self.facts.num_frames
        return (
            f"none of the {len(self)} entries of {', '.join(self.config.sources)} has {least} clip(s) of {num_frames} "
            "frames; lower data.clips, set data.image_fraction to 1, or pre-encode longer videos"
        )


def open_latents(url: str, config: MixtureConfig) -> tuple[Dataset, CacheFacts]:
    """Open a latent cache and read its description; raise DataError if it cannot be opened or holds something else."""
    dataset = open_dataset(url, config.read.cache, limits_of(config.read))
    return dataset, CacheFacts.of(dataset.manifest, url)


def check_same_space(facts: Sequence[CacheFacts]) -> None:
    """Raise DataError if the latents of these caches must not be mixed."""
    if problem := different_latents({each.url: each.fingerprint for each in facts}):
        raise DataError(problem)


def sizes_of(datasets: Sequence[Dataset]) -> list[tuple[int, int]]:
    """Return all sizes (height, width) in pixels; raise DataError if they are too many for buckets."""
    sizes: set[tuple[int, int]] = set()
    for dataset in datasets:
        for start in range(0, len(dataset), _ROWS_AT_ONCE):
            part = dataset.records[start : start + _ROWS_AT_ONCE]
            pairs = np.unique(np.stack([part["height"], part["width"]]), axis=1)
            sizes.update((int(height), int(width)) for height, width in pairs.T)
    if len(sizes) > _MOST_SIZES:
        raise DataError(
            f"the caches hold latents of {len(sizes)} different sizes, at most {_MOST_SIZES} can be sorted into "
            "batches; pre-encode with `buckets`, the sizes that videos are cropped to"
        )
    return sorted(sizes)


def _latents_buckets(config: LatentDataConfig, sizes: Sequence[tuple[int, int]], num_frames: int) -> list[Bucket]:
    """Return buckets of rows of every number of clips at every size, and of images if they are used."""
    clips = sorted(config.clips) if config.image_fraction < 1 else []
    rows = [Bucket(height, width, n * num_frames) for height, width in sizes for n in clips]
    return rows + [Bucket(height, width, 1) for height, width in sizes if config.image_fraction > 0]
