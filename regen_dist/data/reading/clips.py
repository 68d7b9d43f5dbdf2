"""From bytes to clips: decode, crop, mirror."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from regen_dist.data.dataset.catalogue import Row
from regen_dist.data.order.draws import draw_clip
from regen_dist.data.order.order import Bucket, MicroBatch
from regen_dist.data.reading.fetching import Bytes, Fetcher, Place
from regen_dist.data.reading.stand_ins import Taken, take_all
from regen_dist.data.video import reader as video

if TYPE_CHECKING:
    from regen_dist.data.reading.training_set import TrainingSet


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

    def read(self, batch: MicroBatch, found: Sequence[Bytes], out: video.UInt8s) -> Taken:
        """Decode a micro-batch, or what stands in for its bad samples (`take_all`), into `out`, [b, 3, T, H, W].

        Raises:
            DataError: a sample is bad, and so is everything that could stand in for it.
        """

        def decode(slot: int, place: Place, data: bytes) -> None:
            self._board[1], self._board[2] = place.dataset, place.row.row
            try:
                self._decode_bytes(batch, slot, place.row, data, out[slot])
            finally:
                self._board[1] = ~place.dataset

        return take_all(self._data, self._fetcher, batch, found, decode)

    def _decode_bytes(self, batch: MicroBatch, slot: int, row: Row, data: bytes, out: video.UInt8s) -> None:
        config, frames = self._data.config, batch.bucket.frames
        draw = draw_clip(self._data.seed, int(batch.epochs[slot]), row.id, row.frames, frames, config.stride)
        geometry = clip_geometry(row.height, row.width, batch.bucket, config.short_side, (draw.crop_y, draw.crop_x))
        with video.VideoReader(data) as reader:
            numbers = video.clip_frames(reader.table, draw.start, draw.stride, frames)
            video.read_clip(reader, numbers, geometry, flip=draw.flip and config.flip, out=out)


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
