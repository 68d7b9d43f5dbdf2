"""Bad samples in a loader: another stands in, the same one however the work is divided."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from regen_dist.config.datasets import DataConfig
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import Sample
from regen_dist.errors import DataError
from tests.helpers.dataconfigs import single
from tests.helpers.workers import read
from tests.unit.data.build.test_build import flip_byte


@pytest.fixture
def config(dataset_folder: Path) -> DataConfig:
    return single(dataset_folder)


@pytest.fixture
def damaged(config: DataConfig, dataset_folder: Path, tmp_path: Path) -> tuple[DataConfig, Sample]:
    """A copy of the dataset, with one byte of this sample flipped."""
    folder = tmp_path / "copy"
    shutil.copytree(dataset_folder, folder)
    sample = open_dataset(folder).sample(6)
    flip_byte(folder / sample.shard, sample.offset + 100)
    return config.model_copy(update={"url": str(folder), "image_fraction": 0.0}), sample


@pytest.mark.parametrize("workers", [0, 1])
def test_another_sample_stands_in_for_a_bad_one(
    config: DataConfig, damaged: tuple[DataConfig, Sample], workers: int
) -> None:
    bad, sample = damaged
    whole = read(config.model_copy(update={"image_fraction": 0.0}), 4, batch_global=11)
    found = read(bad.model_copy(update={"workers": workers}), 4, batch_global=11)
    for before, after in zip(whole, found, strict=True):
        slots = (before.sample_ids == sample.id).nonzero().flatten().tolist()
        assert len(slots) == 1, "an epoch is a batch here"
        others = [slot for slot in range(11) if slot not in slots]
        assert torch.equal(before.video[others], after.video[others])
        assert torch.equal(before.sample_ids[others], after.sample_ids[others])
        assert after.sample_ids[slots[0]] != sample.id
        assert [(each.shard, each.key) for each in after.bad] == [(sample.shard, sample.key)]
        assert after.bad[0].reason.startswith("the bytes differ from those that were written")
    assert (
        len(
            {
                int(batch.sample_ids[(before.sample_ids == sample.id)])
                for before, batch in zip(whole, found, strict=True)
            }
        )
        > 1
    )


def test_the_stand_in_is_the_same_however_the_work_is_divided(damaged: tuple[DataConfig, Sample]) -> None:
    bad, _ = damaged
    whole = read(bad, 4, batch_global=4)
    ranks = [
        read(bad.model_copy(update={"workers": rank}), 4, batch_global=4, rank=rank, world_size=2) for rank in (0, 1)
    ]
    for step, batch in enumerate(whole):
        parts = [ranks[0][step], ranks[1][step]]
        assert torch.equal(batch.sample_ids, torch.cat([part.sample_ids for part in parts]))
        assert torch.equal(batch.video, torch.cat([part.video for part in parts]))
    assert any(batch.bad for batch in whole)


def test_when_everything_is_bad_the_error_says_so(damaged: tuple[DataConfig, Sample]) -> None:
    bad, _ = damaged
    for shard in Path(str(bad.url)).glob("*.tar"):
        shard.unlink()
    with pytest.raises(DataError, match=r"8 samples were tried in place of \S+, each bad; the last: .*not found"):
        read(bad, 1)
