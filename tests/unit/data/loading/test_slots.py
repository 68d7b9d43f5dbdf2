from __future__ import annotations

import gc
import pickle

import numpy as np
import pytest
import torch

from regen_dist.data.loading.clip_loader import NONE, Slots
from regen_dist.data.video.conversion import UInt8s
from regen_dist.errors import DataError

SHAPE = (3, 2, 8, 8)


def clips(number: int) -> list[UInt8s]:
    return [np.full(SHAPE, 10 * number + clip, np.uint8) for clip in range(2)]


def filled(slots: Slots, number: int, worker: int = 0) -> tuple[torch.Tensor, int]:
    """A batch as its worker makes it, and its slot."""
    video, slot = slots.take(worker, (2, *SHAPE))
    np.stack(clips(number), out=video.numpy())
    return video, slot


def of(slots: Slots, number: int, worker: int = 0) -> tuple[torch.Tensor, int]:
    """A batch as its receiver has it, and its slot."""
    video, slot = filled(slots, number, worker)
    return slots.lend(video, slot, copied=False), slot


def test_a_slot_is_used_again_when_no_view_of_its_batch_is_left() -> None:
    slots = Slots(workers=1, each=1, batch_bytes=2 * 3 * 2 * 8 * 8)
    batch, slot = of(slots, 1)
    part = batch[1, 0].float().sum(), batch[1, 0]
    del batch
    other, none = of(slots, 2)
    assert (slot, none) == (0, NONE), "a view of the first batch is left"
    assert part[1].unique().tolist() == [11]
    assert other.unique().tolist() == [20, 21]
    del part
    gc.collect()
    assert of(slots, 3)[1] == 0


def test_batches_that_are_kept_stay_what_they_are() -> None:
    slots = Slots(workers=2, each=2, batch_bytes=2 * 3 * 2 * 8 * 8)
    kept = [of(slots, number, number % 2) for number in range(8)]
    assert [slot for _, slot in kept] == [0, 2, 1, 3] + 4 * [NONE]
    assert all(np.array_equal(batch.numpy(), clips(number)) for number, (batch, _) in enumerate(kept))


def test_what_a_worker_sends_arrives_as_a_tensor_of_the_same_memory() -> None:
    slots = Slots(workers=1, each=1, batch_bytes=2 * 3 * 2 * 8 * 8)
    video, slot = filled(slots, 1)
    arrived = pickle.loads(pickle.dumps(slots.sent(video, slot)))
    assert (arrived.data_ptr(), arrived.shape) == (video.data_ptr(), video.shape)
    fresh, none = filled(slots, 2)
    assert slots.sent(fresh, none) is fresh, "memory of its own goes by itself"


def test_a_smaller_batch_fits_too() -> None:
    slots = Slots(workers=1, each=1, batch_bytes=1000)
    image, slot = slots.take(0, (1, 3, 1, 4, 8))
    assert (tuple(image.shape), slot, image.is_contiguous()) == ((1, 3, 1, 4, 8), 0, True)


def test_a_copied_batch_gives_its_slot_back_at_once() -> None:
    slots = Slots(workers=1, each=1, batch_bytes=2 * 3 * 2 * 8 * 8)
    for number in range(3):
        video, slot = filled(slots, number)
        assert slot == 0
        assert slots.lend(video, slot, copied=True) is video


def test_more_than_the_machine_has_is_an_error() -> None:
    with pytest.raises(DataError, match=r"no shared memory for \d+\.\d MB of clips .*lower data.prefetch"):
        Slots(workers=1, each=1, batch_bytes=1 << 50)
