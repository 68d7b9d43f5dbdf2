from __future__ import annotations

from pathlib import Path

import pytest

from regen_dist.data.build.build import build_shards
from tests.helpers.datasets import OPTIONS, write_sources


@pytest.fixture(scope="session")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three videos, one in a folder of its own: 10 segments of 36 frames and one of 24, with OPTIONS."""
    return write_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def dataset_folder(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sources as a built dataset. Read it, do not change it."""
    folder = tmp_path_factory.mktemp("dataset")
    build_shards([sources], folder, OPTIONS, workers=0)
    return folder
