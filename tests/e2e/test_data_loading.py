"""Loaders with decoding processes: they give what one process gives, pixel by pixel."""

from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.config.datasets import DataConfig
from regen_dist.data.build.build import build_shards
from tests.helpers.builds import OPTIONS, write_sources
from tests.helpers.dataconfigs import draw_shapes, mixed_with, single
from tests.helpers.workers import read
from tests.unit.data.loading.test_clip_loader import equal
from tests.unit.data.loading.test_datasets import check_pixels


@pytest.fixture(scope="module")
def dataset_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven samples of two or three aspects. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("dataset")
    build_shards([write_sources(tmp_path_factory.mktemp("sources"))], folder, OPTIONS, workers=0)
    return folder


@pytest.fixture
def config(dataset_folder: Path) -> DataConfig:
    return single(dataset_folder)


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_shapes(tmp_path_factory.mktemp("shapes"))


@pytest.fixture
def mixed(dataset_folder: Path, shapes: Path) -> DataConfig:
    return mixed_with(dataset_folder, shapes)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(config: DataConfig, workers: int) -> None:
    parallel = config.model_copy(update={"workers": workers})
    assert equal(read(parallel, 6), read(config, 6))


def test_batches_that_are_kept_are_not_overwritten(config: DataConfig) -> None:
    few = config.model_copy(update={"workers": 1, "prefetch": 1})  # three slots
    assert equal(read(few, 8), read(config, 8))


@pytest.mark.parametrize(("world_size", "workers", "cursor"), [(1, 3, 0), (2, 1, 16)])
def test_the_pixels_of_mixtures_and_buckets_are_the_same_too(
    mixed: DataConfig, world_size: int, workers: int, cursor: int
) -> None:
    check_pixels(mixed, world_size, cursor, workers=workers)
