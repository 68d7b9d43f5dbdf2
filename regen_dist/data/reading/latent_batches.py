"""Rows of cached latents for training: fetched ahead, checked, padded, handed over as float32.

Legend: b rows of this rank and micro-batch, n clips in a row (0 for images), C channels, h x w latent cells, M tokens
of the longest caption of the batch, D their width.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regen_dist.data.dataset.catalogue import Row
from regen_dist.data.dataset.latents import CacheFacts, LatentEntry, unpack_latents
from regen_dist.data.order.draws import draw_row
from regen_dist.data.order.order import Bucket, MicroBatch
from regen_dist.data.reading.background import in_background
from regen_dist.data.reading.fetching import Bytes, Fetcher, Place
from regen_dist.data.reading.keys import sample_keys
from regen_dist.data.reading.latents import LatentSet
from regen_dist.data.reading.plan import Plan
from regen_dist.data.reading.stand_ins import BadSample, take_all

_AHEAD = 4  # batches ready for the step: one that reads longer than a step is evened out


class LatentBatch(NamedTuple):
    """Rows of clips of one micro-batch, as they are stored: nothing is normalised, no text is dropped.

    `content` is float32 [b, max(n, 1), C, h, w], `motion` float32 [b, n, C, h, w]; `text` float32 [b, M, D] and `mask`
    bool [b, M] (True: a token that counts), both None where the cache has no text; the rest as in `ClipBatch`.
    """

    content: Tensor
    motion: Tensor
    text: Tensor | None
    mask: Tensor | None
    sample_ids: Tensor
    epochs: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    stand_ins: int = 0
    problem: str | None = None

    @property
    def keys(self) -> Tensor:
        """What the randomness of each row is keyed by, int64 [b] (see `sample_keys`)."""
        return sample_keys(self.sample_ids, self.epochs)

    @property
    def kind(self) -> str:
        """Clips and latent sides, as "4x24x40", or "image 24x40": the same for all batches of a step; losses of
        different kinds differ."""
        n, _, h, w = self.motion.shape[1:]
        return f"{n}x{h}x{w}" if n else f"image {h}x{w}"


class _Taken(NamedTuple):
    """What a batch takes of an entry."""

    content: Tensor  # [max(n, 1), C, h, w]
    motion: Tensor  # [n, C, h, w]
    text: Tensor | None  # [L, D]
    mask: Tensor | None  # [L]


def latent_batches(
    data: LatentSet, *, accumulation: int, rank: int, world_size: int, cursor: int
) -> Generator[LatentBatch]:
    """This rank's micro-batches, without end; a thread prepares the next ones. As exact as `clip_batches`: the union
    over ranks and micro-batches of a step is the same for every world size, and a run resumed at a cursor goes on with
    exactly the batches that an uninterrupted one would have had.

    Args:
        data: the entries and their order.
        cursor: samples consumed so far by all ranks: a multiple of the global batch.

    Yields:
        batches of `batch_global / (world_size * accumulation)` rows. Close the iterator to end its thread.

    Raises:
        ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        DataError: an entry and all that could stand in for it are bad, or the store does not answer.
    """
    plan = Plan.from_cursor(data, accumulation=accumulation, rank=rank, world_size=world_size, cursor=cursor)
    return in_background(_read(plan), _AHEAD)


def _read(plan: Plan[LatentSet]) -> Generator[LatentBatch]:
    data = plan.data
    with Fetcher(data.datasets, data.config.read) as fetcher:
        for batch, found in fetcher.ahead((batch, data.places(batch)) for batch in plan):
            yield _batch(data, fetcher, batch, found)


def _batch(data: LatentSet, fetcher: Fetcher, batch: MicroBatch, found: Sequence[Bytes]) -> LatentBatch:
    rows: list[_Taken] = []

    def take(slot: int, place: Place, stored: bytes) -> None:
        entry = read_entry(data.facts, place.row, stored)
        rows.append(_cut(data, batch.bucket, entry, int(batch.epochs[slot]), place.row.id))

    taken = take_all(data, fetcher, batch, found, take)
    ids, epochs = torch.tensor([[place.row.id for place in taken.places], batch.epochs.tolist()], dtype=torch.int64)
    return collated(rows, ids)._replace(
        epochs=epochs, bad=taken.bad, stand_ins=taken.stand_ins, problem=fetcher.problem
    )


def read_entry(facts: CacheFacts, row: Row, stored: bytes) -> LatentEntry:
    """An entry, checked; DataError when it is damaged or not what manifest and index say."""
    entry = unpack_latents(stored)
    facts.check(entry, row.frames, row.height, row.width)
    return entry


def _cut(data: LatentSet, bucket: Bucket, entry: LatentEntry, epoch: int, sample_id: int) -> _Taken:
    """As many clips of an entry as the bucket's rows have, beginning where the draw says."""
    if bucket.is_image:
        return row_of(entry, 0, 0)
    n = bucket.frames // data.facts.num_frames
    return row_of(entry, draw_row(data.seed, epoch, sample_id, entry.clips, n), n)


def row_of(entry: LatentEntry, first: int, n: int) -> _Taken:
    """Clips first … first + n of an entry; with n = 0 its first frame, as an image."""
    content = entry.content[first : first + max(n, 1)]
    return _Taken(content, entry.motion[first : first + n], entry.text, entry.mask)


def collated(rows: Sequence[_Taken], sample_ids: Tensor) -> LatentBatch:
    """Rows of one shape as a batch; texts are padded with zeros to the longest."""
    texts = [row.text for row in rows if row.text is not None]
    masks = [row.mask for row in rows if row.mask is not None]
    return LatentBatch(
        torch.stack([row.content for row in rows]).float(),
        torch.stack([row.motion for row in rows]).float(),
        pad_sequence(texts, batch_first=True).float() if texts else None,
        pad_sequence(masks, batch_first=True).bool() if masks else None,
        sample_ids,
    )
