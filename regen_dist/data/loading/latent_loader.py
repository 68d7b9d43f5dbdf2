"""Latent loader for training: rows of cached latents, prefetched, verified and padded, in the precision they are stored
in.

Legend: b rows of this rank and micro-batch, n clips in a row (0 for images), C channels, h x w latent cells, M tokens
of the longest caption of the batch, D their width.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from contextlib import closing
from queue import SimpleQueue
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from regen_dist.data.format.catalogue import SampleRow
from regen_dist.data.format.latents import CacheFacts, LatentEntry, unpack_latents
from regen_dist.data.loading.datasets import LatentSet
from regen_dist.data.loading.fetch import Fetcher, FetchResult, SampleLocation
from regen_dist.data.loading.plan import BadSample, BatchPlan, sample_keys, take_with_replacements
from regen_dist.data.order.order import Bucket, MicroBatch, draw_row

# --- background thread that prepares items ahead ---

_ENDING_S = 1.0  # longest wait for a busy thread at the end; it then finishes on its own

Item = TypeVar("Item")


def in_background(items: Generator[Item], ahead: int) -> Generator[Item]:
    """Yield the items of `items`, up to `ahead` of which a thread prepares. Closing this ends the thread, which closes
    `items`.

    Raises:
        any error of preparing an item, when the item is due.
    """
    room, ended = threading.Semaphore(ahead), threading.Event()
    ready: SimpleQueue[tuple[Item] | BaseException | None] = SimpleQueue()

    def make() -> None:
        try:
            with closing(items):
                while room.acquire() and not ended.is_set():
                    ready.put((next(items),))
        except StopIteration:
            ready.put(None)
        except BaseException as error:  # noqa: BLE001 - raised where the item is awaited, which would otherwise wait forever
            ready.put(error)

    thread = threading.Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while (made := ready.get()) is not None:
            if isinstance(made, BaseException):
                raise made
            room.release()
            yield made[0]
    finally:  # the thread ends, also while it waits for room
        ended.set()
        room.release()
        thread.join(_ENDING_S)


_AHEAD = 4  # batches prepared ahead: compensates for one that reads longer than a step


class LatentBatch(NamedTuple):
    """Rows of clips of one micro-batch as stored: not normalised, without text dropout.

    `content` is bf16 [b, max(n, 1), C, h, w], `motion` bf16 [b, n, C, h, w]; `text` bf16 [b, M, D] and `mask`
    bool [b, M] (True: valid token), both None if the cache has no text; the rest as in `ClipBatch`. Where there is a
    GPU the tensors are in page-locked memory: copying them to it waits for nothing (`pinned`).
    """

    content: Tensor
    motion: Tensor
    text: Tensor | None
    mask: Tensor | None
    sample_ids: Tensor
    epochs: Tensor | None = None
    bad: tuple[BadSample, ...] = ()
    num_replaced: int = 0
    problem: str | None = None

    @property
    def keys(self) -> Tensor:
        """Return the RNG key of each row, int64 [b] (see `sample_keys`)."""
        return sample_keys(self.sample_ids, self.epochs)

    @property
    def kind(self) -> str:
        """Return clips and latent sides, as "4x24x40", or "image 24x40": equal for all batches of a step; losses of
        different kinds differ."""
        n, _, h, w = self.motion.shape[1:]
        return f"{n}x{h}x{w}" if n else f"image {h}x{w}"


class _Taken(NamedTuple):
    """Part of an entry that goes into a batch."""

    content: Tensor  # [max(n, 1), C, h, w]
    motion: Tensor  # [n, C, h, w]
    text: Tensor | None  # [L, D]
    mask: Tensor | None  # [L]


def latent_batches(
    data: LatentSet, *, accumulation: int, rank: int, world_size: int, cursor: int
) -> Generator[LatentBatch]:
    """Yield this rank's micro-batches endlessly; a thread prepares the next ones. Deterministic like `clip_batches`:
    the union over ranks and micro-batches of a step is the same for every world size, and a run resumed at a cursor
    continues with exactly the batches of an uninterrupted one.

    Args:
        data: the entries and their order.
        cursor: samples consumed so far by all ranks: a multiple of the global batch.

    Yields:
        batches of `batch_global / (world_size * accumulation)` rows. Close the iterator to end its thread.

    Raises:
        ConfigError: the batch does not divide, or the cursor is not a multiple of it.
        DataError: an entry and all its possible replacements are bad, or the store does not answer.
    """
    plan = BatchPlan.from_cursor(data, accumulation=accumulation, rank=rank, world_size=world_size, cursor=cursor)
    return in_background(_read(plan), _AHEAD)


def _read(plan: BatchPlan[LatentSet]) -> Generator[LatentBatch]:
    data = plan.data
    with Fetcher(data.datasets, data.config.read) as fetcher:
        for batch, found in fetcher.ahead((batch, data.places(batch)) for batch in plan):
            yield pinned(_batch(data, fetcher, batch, found))


def _batch(data: LatentSet, fetcher: Fetcher, batch: MicroBatch, found: Sequence[FetchResult]) -> LatentBatch:
    rows: list[_Taken] = []

    def take(slot: int, place: SampleLocation, stored: bytes) -> None:
        entry = read_entry(data.facts, place.row, stored)
        rows.append(_cut(data, batch.bucket, entry, int(batch.epochs[slot]), place.row.id))

    taken = take_with_replacements(data, fetcher, batch, found, take)
    ids, epochs = torch.tensor([[place.row.id for place in taken.places], batch.epochs.tolist()], dtype=torch.int64)
    return collate_latents(rows, ids)._replace(
        epochs=epochs, bad=taken.bad, num_replaced=taken.num_replaced, problem=fetcher.problem
    )


def read_entry(facts: CacheFacts, row: SampleRow, stored: bytes) -> LatentEntry:
    """Parse and check an entry; raise DataError if it is damaged or contradicts manifest or index."""
    entry = unpack_latents(stored)
    facts.check(entry, row.frames, row.height, row.width)
    return entry


def _cut(data: LatentSet, bucket: Bucket, entry: LatentEntry, epoch: int, sample_id: int) -> _Taken:
    """Cut a row of the bucket's number of clips from an entry, starting at the drawn clip."""
    if bucket.is_image:
        return row_of(entry, 0, 0)
    n = bucket.frames // data.facts.num_frames
    return row_of(entry, draw_row(data.seed, epoch, sample_id, entry.clips, n), n)


def row_of(entry: LatentEntry, first: int, n: int) -> _Taken:
    """Return clips first … first + n of an entry; with n = 0 its first frame, as an image."""
    content = entry.content[first : first + max(n, 1)]
    return _Taken(content, entry.motion[first : first + n], entry.text, entry.mask)


def collate_latents(rows: Sequence[_Taken], sample_ids: Tensor) -> LatentBatch:
    """Stack rows of one shape into a batch, in the dtype of the entries; texts are zero-padded to the longest."""
    texts = [row.text for row in rows if row.text is not None]
    masks = [row.mask for row in rows if row.mask is not None]
    return LatentBatch(
        torch.stack([row.content for row in rows]),
        torch.stack([row.motion for row in rows]),
        pad_sequence(texts, batch_first=True) if texts else None,
        pad_sequence(masks, batch_first=True).bool() if masks else None,
        sample_ids,
    )


def pinned(batch: LatentBatch) -> LatentBatch:
    """Copy a batch into page-locked memory where there is a GPU. Called in the thread that prepares batches."""
    if not torch.cuda.is_available():
        return batch
    tensors = {name: each for name, each in batch._asdict().items() if isinstance(each, Tensor)}
    locked: dict[str, Any] = {name: each.pin_memory() for name, each in tensors.items()}
    return batch._replace(**locked)
