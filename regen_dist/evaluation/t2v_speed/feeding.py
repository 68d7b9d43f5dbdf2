"""Where a training step's batches may come from other than the cache's reader: memory, or videos that are encoded on
the way.

Legend: b rows, n clips in a row, k+1 frames of a clip, C channels, h x w latent cells, L tokens, D their width.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from itertools import cycle, islice

from torch import Tensor

from regen_dist.data.dataset.latents import LatentEntry
from regen_dist.data.reading.latent_batches import LatentBatch, collated, read_entry, row_of
from regen_dist.data.reading.latents import LatentSet
from regen_dist.data.reading.loader import ClipBatch, clip_batches
from regen_dist.data.reading.training_set import TrainingSet
from regen_dist.errors import DataError
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.pixels import to_float

Text = tuple[Tensor, Tensor]  # a caption's embedding [L, D] and its mask [L], as a cache holds them


def kept(batches: Generator[LatentBatch], number: int) -> list[LatentBatch]:
    """The first batches, in memory."""
    try:
        return list(islice(batches, number))
    finally:
        batches.close()


def over_and_over(batches: Sequence[LatentBatch]) -> Generator[LatentBatch]:
    """Batches from memory, without end."""
    yield from cycle(batches)


def texts_of(data: LatentSet) -> dict[int, Text]:
    """The embedding of every caption of a cache by the sample's id, which is that of its video.

    Raises:
        DataError: an entry is damaged, or has no text.
    """
    (dataset,) = data.datasets
    texts = {}
    for row in map(dataset.row, range(len(dataset))):
        entry = read_entry(data.facts, row, dataset.read(row))
        if entry.text is None or entry.mask is None:
            raise DataError(f"{data.facts.url}: an entry without text")
        texts[row.id] = entry.text, entry.mask
    return texts


def encoding(
    data: TrainingSet, encoder: FrozenEncoder, texts: Mapping[int, Text], *, accumulation: int
) -> Generator[LatentBatch]:
    """Rows of clips of the videos, decoded by worker processes and encoded when they are taken."""
    batches = clip_batches(data, accumulation=accumulation, rank=0, world_size=1, cursor=0)
    try:
        for batch in batches:
            yield _encoded(batch, encoder, texts)
    finally:
        batches.close()


def _encoded(batch: ClipBatch, encoder: FrozenEncoder, texts: Mapping[int, Text]) -> LatentBatch:
    rows = len(batch.sample_ids)
    clips = _clips(to_float(batch.video.to(encoder.device)), encoder.num_frames)
    content, motion = (each.unflatten(0, (rows, -1)).float() for each in encoder.encode(clips))  # [b, n, C, h, w]
    found = [texts[number] for number in batch.sample_ids.tolist()]
    entries = [LatentEntry(c, m, text, mask) for c, m, (text, mask) in zip(content, motion, found, strict=True)]
    return collated([row_of(entry, 0, entry.clips) for entry in entries], batch.sample_ids)._replace(
        epochs=batch.epochs, bad=batch.bad, stand_ins=batch.stand_ins, problem=batch.problem
    )


def _clips(video: Tensor, num_frames: int) -> Tensor:
    """Rows of clips [b, 3, n*(k+1), H, W] as clips [b*n, 3, k+1, H, W]."""
    clips: Tensor = video.unflatten(2, (-1, num_frames))  # [b, 3, n, k+1, H, W]
    return clips.transpose(1, 2).flatten(0, 1)
