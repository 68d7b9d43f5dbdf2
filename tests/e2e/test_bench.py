"""Comparisons of `regen bench data`, with worker processes and from nothing."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from regen_dist.config.datasets import DataConfig
from regen_dist.data.loading.clip_loader import clip_batches
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from tools.bench import data_cases
from tools.bench.data_start import first_batch


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve clips of moving shapes, in two shards."""
    folder = tmp_path_factory.mktemp("shapes")
    build_synthetic(folder, SyntheticOptions(number=12, seed=0, side=48, frames=20, samples_per_shard=6), workers=0)
    return folder


def test_decoding_alone_decodes_the_loaders_clips(shapes: Path) -> None:
    config = DataConfig(url=str(shapes), size=(32, 32), short_side="fit", stride=(1, 2))
    stretch = data_cases.Workload(config, num_frames=5, batch=3, batches=2, workers=2, seed=1)
    batches = clip_batches(stretch.open(), accumulation=1, rank=0, world_size=1, cursor=0)
    loaded = [batch.video.numpy() for batch in islice(batches, stretch.first, stretch.first + 4)]
    batches.close()
    for worker in range(2):
        alone = [clip.decode() for clip in data_cases.clips_of(stretch, worker)]
        assert np.array_equal(np.stack(alone), np.concatenate(loaded[worker::2]))


def test_both_sides_count_every_clip(shapes: Path) -> None:
    config = DataConfig(url=str(shapes), size=(32, 32), short_side="fit")
    stretch = data_cases.Workload(config, num_frames=5, batch=3, batches=2, workers=2)
    for turn in (data_cases.from_memory(stretch), data_cases.through_loader(stretch)):
        assert turn.amount == 12
        assert turn.seconds > 0
        assert turn.facts["own_cpu_s"] >= 0


def test_a_start_is_told_in_parts(shapes: Path, tmp_path: Path) -> None:
    found = first_batch(str(shapes), tmp_path, crop=32, num_frames=5, batch=2)
    assert 0 < found["import_s"] + found["open_s"] + found["batch_s"] <= found["seconds"]
    assert list((tmp_path / "catalogues").glob("*.npy")), "it opened the dataset with this cache"
