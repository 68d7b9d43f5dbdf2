"""From bytes to clips: decode, crop, mirror; and stand-ins for the samples that cannot be decoded or read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from regen_dist.data.dataset.catalogue import Dataset, Row
from regen_dist.data.order.draws import draw_clip
from regen_dist.data.order.order import Bucket, MicroBatch
from regen_dist.data.reading.fetching import Bytes, Fetcher, Place
from regen_dist.data.video import reader as video
from regen_dist.errors import DataError

if TYPE_CHECKING:
    from regen_dist.data.reading.training_set import TrainingSet

_STAND_INS = 8  # tried before a sample's neighbours count as bad too


class BadSample(NamedTuple):
    """A sample that another one stood in for, and why."""

    shard: str
    key: str
    reason: str


class Clips(NamedTuple):
    """What came of a micro-batch: the sample that each clip comes from; the samples that were bad, stand-ins among
    them; how many clips are stand-ins."""

    places: list[Place]
    bad: tuple[BadSample, ...]
    stand_ins: int


class ClipReader:
    """Decodes the clips of micro-batches, in one process.

    Args:
        data: samples, order and how clips are cut.
        fetcher: where a stand-in's bytes come from.
        board: int64 [3], where this process notes its id and what it is decoding (see `decoding`).
    """

    def __init__(self, data: TrainingSet, fetcher: Fetcher, board: Tensor) -> None:
        self._data, self._fetcher, self._board = data, fetcher, board
        board[0] = os.getpid()

    def read(self, batch: MicroBatch, found: Sequence[Bytes], out: video.UInt8s) -> Clips:
        """Decode a micro-batch into `out`, [b, 3, T, H, W].

        A bad sample's stand-in follows from the seed and the sample's place in the order alone, so every number of
        ranks and workers takes the same one.

        Raises:
            DataError: a sample is bad, and so is everything that could stand in for it.
        """
        places, bad, stand_ins = [], [], 0
        for slot, first in enumerate(self._data.places(batch)):
            place, data = first, found[slot]
            for attempt in range(1, _STAND_INS + 2):
                try:
                    self._decode(batch, slot, place, data, out[slot])
                    places.append(place)
                    stand_ins += attempt > 1
                    break
                except DataError as error:
                    bad.append(self._bad(place, str(error)))
                place = self._data.stand_in(batch, slot, attempt)
                data = self._fetcher.one(place)
            else:
                raise DataError(
                    f"{_STAND_INS} samples were tried in place of {bad[-1 - _STAND_INS].key}, and each was bad; the "
                    f"last: {bad[-1].reason}. Run `regen shards verify` on the dataset"
                )
        return Clips(places, tuple(bad), stand_ins)

    def _decode(self, batch: MicroBatch, slot: int, place: Place, found: Bytes, out: video.UInt8s) -> None:
        if found.problem is not None:
            raise DataError(found.problem)
        self._board[1], self._board[2] = place.dataset, place.row.row
        try:
            self._decode_bytes(batch, slot, place.row, found.data, out)
        finally:
            self._board[1] = ~place.dataset

    def _decode_bytes(self, batch: MicroBatch, slot: int, row: Row, data: bytes, out: video.UInt8s) -> None:
        config, frames = self._data.config, batch.bucket.frames
        draw = draw_clip(self._data.seed, int(batch.epochs[slot]), row.id, row.frames, frames, config.stride)
        geometry = clip_geometry(row.height, row.width, batch.bucket, config.short_side, (draw.crop_y, draw.crop_x))
        with video.VideoReader(data) as reader:
            numbers = video.clip_frames(reader.table, draw.start, draw.stride, frames)
            video.read_clip(reader, numbers, geometry, flip=draw.flip and config.flip, out=out)

    def _bad(self, place: Place, reason: str) -> BadSample:
        dataset: Dataset = self._data.datasets[place.dataset]
        try:
            key = dataset.sample(place.row.row).key
        except DataError:
            key = f"row {place.row.row}"
        return BadSample(place.row.shard, key, reason)


def decoding(board: Sequence[int]) -> tuple[int, int, bool] | None:
    """What a process noted on its board: the (dataset, row) that it decoded last, and whether it still does. None:
    it has decoded nothing."""
    _, dataset, row = board
    return None if row < 0 else (dataset if dataset >= 0 else ~dataset, row, dataset >= 0)


def clip_geometry(
    height: int, width: int, bucket: Bucket, short_side: int | str | None, crop: tuple[float, float] = (0.5, 0.5)
) -> video.Geometry:
    """How frames of `height` x `width` become a bucket's crop; `short_side` as in `DataConfig`."""
    size = (bucket.height, bucket.width)
    if short_side == "fit":  # the smallest frame that the crop fits into
        scale = max(size[0] / height, size[1] / width)
        height, width = max(size[0], round(height * scale)), max(size[1], round(width * scale))
        return video.fit_geometry(height, width, size, None, *crop)
    assert short_side is None or isinstance(short_side, int), "the config knows no other word"
    return video.fit_geometry(height, width, size, short_side, *crop)
