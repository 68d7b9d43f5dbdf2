"""Worker processes make and read datasets as one process does; every caption of moving shapes reads back."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regen_dist.config.datasets import DataConfig
from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import WORDINGS, caption, parse_caption
from tests.helpers.datasets import (
    OPTIONS,
    draw_shapes,
    flip_byte,
    mixed_with,
    objects,
    read,
    single,
    write_shards,
    write_sources,
)
from tests.helpers.video import moving_square, write_video
from tests.unit.data.build.test_build import manifest_of, reasons, samples
from tests.unit.data.loading.test_clip_loader import equal
from tests.unit.data.loading.test_datasets import check_pixels
from tests.unit.data.synthetic.test_shapes import EVERYTHING, SMALL


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one in a folder of its own."""
    return write_sources(tmp_path_factory.mktemp("sources"))


def test_a_build_makes_the_same_bytes(sources: Path, tmp_path: Path) -> None:
    stages = []
    progress = lambda stage, done, total: stages.append((stage, done, total))  # noqa: E731
    build_shards([sources], tmp_path / "out", OPTIONS, workers=2, progress=progress)
    build_shards([sources], tmp_path / "alone", OPTIONS, workers=0)
    assert objects(tmp_path / "out") == objects(tmp_path / "alone")
    assert ("probe", 3, 3) in stages
    assert stages[-2:] == [("build", 11, 11), ("parts", 1, 1)]


def test_whole_files_keep_their_kind_and_their_bytes(sources: Path, tmp_path: Path) -> None:
    write_video(tmp_path / "still.mp4", np.repeat(moving_square(1), 40, axis=0))
    manifest = manifest_of(
        build_shards([sources, tmp_path / "still.mp4"], tmp_path / "out", replace(OPTIONS, keep=True), workers=2)
    )
    assert reasons(manifest) == {"still.mp4": "frozen"}
    dataset = open_dataset(tmp_path / "out")
    found = {sample.source: sample for sample in samples(tmp_path / "out")}
    assert found["more/short one.mkv"].member.endswith(".mkv")
    for name, sample in found.items():
        assert dataset.read(sample) == (sources / name).read_bytes()
    assert "codec" not in manifest.options


def test_drawing_makes_the_same_bytes(tmp_path: Path) -> None:
    told: list[tuple[str, int, int]] = []
    build_synthetic(tmp_path / "out", SMALL, workers=2, progress=lambda *facts: told.append(facts))
    build_synthetic(tmp_path / "alone", SMALL, workers=0)
    assert objects(tmp_path / "out") == objects(tmp_path / "alone")
    assert (told[0], told[-1]) == (("draw", 0, 20), ("draw", 20, 20))


def test_tars_in_folders_get_the_same_index(tmp_path: Path) -> None:
    write_shards(tmp_path / "one" / "train")
    write_shards(tmp_path / "one" / "val", shards=1)
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    seen: list[tuple[str, int, int]] = []
    here = index_tars(tmp_path / "one", workers=0, progress=lambda *step: seen.append(step)).manifest
    there = index_tars(tmp_path / "two", workers=2).manifest
    assert [entry.name for entry in here.shards] == [*(f"train/0000{n}.tar" for n in range(3)), "val/00000.tar"]
    assert here == there
    assert seen == [("index", done, 4) for done in range(5)]
    assert {name.partition(".")[0] for name in objects(tmp_path / "one") if name.endswith(".parquet")} == {
        entry.name.removesuffix(".tar") for entry in here.shards
    }


def test_a_check_says_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    write_shards(folder)
    index_tars(folder, workers=0)
    damaged = open_dataset(folder).sample(9)
    flip_byte(folder / damaged.shard, damaged.offset)
    (folder / "00000.tar").unlink()
    assert verify_dataset(folder, "deep", workers=2) == verify_dataset(folder, "deep", workers=0)


# Loaders with decoding processes: they give what one process gives, pixel by pixel.


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


# Captions of moving shapes, all 184,320 of them.


def test_every_caption_in_every_wording_reads_back() -> None:
    for attributes in EVERYTHING:
        for wording in range(WORDINGS):
            assert parse_caption(caption(attributes, wording)) == attributes
