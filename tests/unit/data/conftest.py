from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.data.plan import BuildOptions
from regen_dist.data.shards import build_shards
from tests.helpers.video import moving_square, write_video

OPTIONS = BuildOptions(segment_seconds=1.5, short_side=48, crf=20, samples_per_shard=4, min_frames=20)


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one in a folder of its own: 10 segments of 36 frames and one of 24, with OPTIONS."""
    folder = tmp_path_factory.mktemp("sources")
    write_video(folder / "wide.mp4", moving_square(180, 64, 96, seed=1))
    write_video(folder / "tall.mp4", moving_square(108, 96, 64, seed=2))
    write_video(folder / "more" / "short one.mkv", moving_square(96, 64, 64, seed=3))
    return folder


@pytest.fixture(scope="session")
def dataset_folder(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a built dataset. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("dataset")
    build_shards([sources], folder, OPTIONS, workers=0)
    return folder
