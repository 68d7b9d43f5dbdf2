"""Worker processes make datasets as one process does: builds, drawn clips, indexes of tars, and their checks."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from regen_dist.data.build.build import build_shards
from regen_dist.data.build.foreign import index_tars
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.data.synthetic.dataset import build_synthetic
from tests.helpers.builds import OPTIONS, objects, write_sources
from tests.helpers.foreign import change, write_shards
from tests.helpers.video import moving_square, write_video
from tests.unit.data.build.test_build import manifest_of, reasons, samples
from tests.unit.data.synthetic.test_shapes import SMALL


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
    change(folder / damaged.shard, damaged.offset)
    (folder / "00000.tar").unlink()
    assert verify_dataset(folder, "deep", workers=2) == verify_dataset(folder, "deep", workers=0)
