"""Shared memory for batches, used again and again: filling a page that is new costs several times what filling it anew
does, and so does giving it back."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from itertools import count
from math import prod

import torch
from torch import Tensor

from regen_dist.errors import DataError

NONE = -1
_made_here: weakref.WeakValueDictionary[int, Slots] = weakref.WeakValueDictionary()
_numbers = count()


class Slots:
    """Room for some batches of each worker. A rank makes it, its workers fill it; crosses to them by file descriptor.

    A worker takes a free slot of its own; the rank gives it back when nothing refers to the batch any more. So nobody
    waits: where a batch is kept and no slot is free, the next one gets memory of its own.

    Args:
        workers: decoding processes; with 0 there is nothing to share.
        each: slots of a worker.
        batch_bytes: of the largest batch.

    Raises:
        DataError: the machine has no such room.
    """

    def __init__(self, workers: int, each: int, batch_bytes: int) -> None:
        self._each, self._number = each, next(_numbers)
        _made_here[self._number] = self
        self._room = _shared(workers * each * batch_bytes).view(workers * each, batch_bytes)
        self._taken = torch.zeros(workers * each, dtype=torch.uint8).share_memory_()

    def take(self, worker: int, shape: Sequence[int]) -> tuple[Tensor, int]:
        """In a worker: room for a batch of uint8 of this shape, not set to anything, and the number of its slot (NONE:
        it has none)."""
        if not len(self._taken):
            return torch.empty(*shape, dtype=torch.uint8), NONE
        slot = self._free(worker)
        return _shared(prod(shape)).view(*shape) if slot == NONE else self.view(slot, shape), slot

    def sent(self, video: Tensor, slot: int) -> Tensor | Sent:
        """In a worker: what goes to the rank in place of a batch."""
        return video if slot == NONE else Sent(self._number, slot, tuple(video.shape))

    def view(self, slot: int, shape: Sequence[int]) -> Tensor:
        """What lies in a slot, uint8 of this shape."""
        return self._room[slot, : prod(shape)].view(*shape)

    def lend(self, video: Tensor, slot: int, *, copied: bool) -> Tensor:
        """In the rank: the same clips, which give their slot back when neither they nor any view of them is left; at
        once where they are `copied`."""
        if slot == NONE:
            return video
        if copied:
            self._taken[slot] = 0
            return video
        pixels = video.numpy()
        weakref.finalize(pixels, self._taken.numpy().__setitem__, slot, 0).atexit = False
        return torch.from_numpy(pixels)  # holds on to `pixels` as long as its storage lives

    def _free(self, worker: int) -> int:
        """Takes a free slot of a worker. Only the worker itself does."""
        for slot in range(worker * self._each, (worker + 1) * self._each):
            if not self._taken[slot]:
                self._taken[slot] = 1
                return slot
        return NONE


class Sent:
    """A batch on its way to the rank, where it arrives as a tensor: the rank has its slot mapped. To send the tensor
    itself would take a file descriptor through a socket each time."""

    def __init__(self, slots: int, slot: int, shape: tuple[int, ...]) -> None:
        self._place = slots, slot, shape

    def __reduce__(self) -> tuple[Callable[[int, int, tuple[int, ...]], Tensor], tuple[int, int, tuple[int, ...]]]:
        return _arrived, self._place


def _arrived(slots: int, slot: int, shape: tuple[int, ...]) -> Tensor:
    return _made_here[slots].view(slot, shape)


def _shared(size: int) -> Tensor:
    """Bytes [size] in shared memory, which the system has set aside: a lack of them shows now. Left to itself, the
    loader would move a batch there in a thread, where that is printed, and the batch waited for without end."""
    if not size:
        return torch.empty(0, dtype=torch.uint8)
    try:
        storage = torch.UntypedStorage._new_shared(size)
    except RuntimeError as error:
        raise DataError(
            f"no shared memory for {size / 1e6:.1f} MB of clips ({str(error).splitlines()[0]}): give this machine or "
            "container more of it (docker run --shm-size), or lower data.prefetch or data.workers"
        ) from error
    return torch.empty(0, dtype=torch.uint8).set_(storage)
