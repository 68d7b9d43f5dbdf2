"""The clip loader: batches, cursors, and the slots that hold decoded clips."""

from __future__ import annotations

import gc
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from regen_dist.config.datasets import DataConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.loading.clip_loader import NONE, ClipBatch, Slots
from regen_dist.data.loading.datasets import TrainingSet
from regen_dist.data.loading.validation import validation_clip
from regen_dist.data.video.conversion import UInt8s
from regen_dist.errors import ConfigError, DataError
from tests.helpers.datasets import read, single


@pytest.fixture
def config(dataset_folder: Path) -> DataConfig:
    return single(dataset_folder)


def equal(left: list[ClipBatch], right: list[ClipBatch]) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.video, b.video) and torch.equal(a.sample_ids, b.sample_ids)
        for a, b in zip(left, right, strict=True)
    )


def test_batches_have_the_promised_shape(config: DataConfig) -> None:
    batches = read(config, 8)
    frames = [batch.video.shape[2] for batch in batches]
    assert sorted(frames) == [1, 1, 9, 9, 9, 9, 9, 9]  # a quarter of the batches are images
    for batch in batches:
        assert batch.video.dtype == torch.uint8
        assert batch.video.shape == (8, 3, batch.video.shape[2], 32, 40)
        assert batch.sample_ids.dtype == torch.int64
    ids = open_dataset(config.url).ids.tolist()
    stream = [int(i) for batch in batches if batch.video.shape[2] == 9 for i in batch.sample_ids]
    assert sorted(stream[:11]) == sorted(stream[11:22]) == sorted(ids)
    assert stream[:11] != stream[11:22]


def test_a_cursor_goes_on_where_it_stands(config: DataConfig) -> None:
    whole = read(config, 8)
    assert equal(read(config, 3, cursor=40), whole[5:])


@pytest.mark.parametrize(("world_size", "accumulation"), [(2, 1), (8, 1), (1, 4), (2, 2)])
def test_ranks_and_accumulation_cut_the_same_global_batches(
    config: DataConfig, world_size: int, accumulation: int
) -> None:
    whole = read(config, 2, cursor=16)
    ranks = [
        read(config, 2 * accumulation, rank=rank, world_size=world_size, accumulation=accumulation, cursor=16)
        for rank in range(world_size)
    ]
    for step in range(2):
        parts = [
            ranks[rank][step * accumulation + micro] for micro in range(accumulation) for rank in range(world_size)
        ]
        joined = ClipBatch(torch.cat([part.video for part in parts]), torch.cat([part.sample_ids for part in parts]))
        assert equal([joined], [whole[step]])


def test_another_seed_gives_other_clips(config: DataConfig) -> None:
    assert not equal(read(config, 1, seed=4), read(config, 1))


def test_the_runs_random_state_is_left_alone(config: DataConfig) -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    read(config, 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_videos_too_short_for_a_clip_are_left_out_and_told(config: DataConfig) -> None:
    lengths = open_dataset(config.url).records["frames"]
    longer = int((lengths >= 33).sum())
    assert 0 < longer < len(lengths)
    plain = config.model_copy(update={"image_fraction": 0.0})
    data = TrainingSet(plain, num_frames=33, batch_global=longer, seed=0)
    assert f"{len(lengths) - longer} have fewer than 33 frames and are left out" in data.summary()
    batch = read(plain, 1, num_frames=33, batch_global=longer)[0]
    assert sorted(batch.sample_ids.tolist()) == sorted(open_dataset(config.url).ids[lengths >= 33].tolist())
    with pytest.raises(DataError, match="37 frames"):
        TrainingSet(plain, num_frames=37, batch_global=1, seed=0)


def test_what_cannot_be_divided_is_refused_before_reading(config: DataConfig) -> None:
    with pytest.raises(ConfigError, match=r"batch_global 8 over .* not a multiple of 3 ranks; ranks that fit: 1, 2"):
        read(config, 0, world_size=3)
    with pytest.raises(ConfigError, match="cursor"):
        read(config, 0, cursor=12)
    with pytest.raises(ConfigError, match="rank 2"):
        read(config, 0, rank=2, world_size=2)


def test_validation_clips_are_fixed_and_centred(config: DataConfig) -> None:
    first, again = validation_clip(config, num_frames=9), validation_clip(config, num_frames=9)
    assert first.video.shape == (4, 3, 9, 32, 40)
    assert equal([first], [again])
    other = validation_clip(config.model_copy(update={"url": "unused", "validation_url": config.url}), num_frames=9)
    assert equal([first], [other])


def test_validation_clips_are_of_videos_that_are_long_enough(config: DataConfig) -> None:
    """The shorter ones are left out, as in training: of eleven samples one has 24 frames, and ten have 36."""
    clips = validation_clip(config, num_frames=33, most=11)
    assert clips.video.shape == (10, 3, 33, 32, 40)
    with pytest.raises(DataError, match=r"none of the 11 samples .* has the 41 frames"):
        validation_clip(config, num_frames=41)


def test_a_crop_larger_than_the_video_is_enlarged_to_fit(config: DataConfig) -> None:
    large = config.model_copy(update={"size": (64, 96), "short_side": None})
    assert read(large, 1)[0].video.shape == (8, 3, 9, 64, 96)


def test_a_sample_that_comes_twice_in_a_batch_has_two_keys(config: DataConfig) -> None:
    """Noise and timestep are keyed by them; the first time round the key is the sample's id."""
    batch = read(config.model_copy(update={"image_fraction": 0.0}), 1, batch_global=22)[0]
    assert sorted(batch.sample_ids[:11].tolist()) == sorted(batch.sample_ids[11:].tolist())
    assert torch.equal(batch.keys[:11], batch.sample_ids[:11])
    assert len(set(batch.keys.tolist())) == 22
    assert (batch.keys >= 0).all()


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
