from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from regen_dist.config.t2v import TextConfig
from regen_dist.models.text import TextEncoder, make_small_encoder
from tests.helpers.preencoding import captioned_scenes


@pytest.fixture(scope="session")
def captions() -> list[str]:
    return [text for _, text in captioned_scenes(300)]


@pytest.fixture(scope="session")
def folder(captions: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small encoder. Read it, do not change it."""
    made = tmp_path_factory.mktemp("text") / "encoder"
    assert make_small_encoder(captions, made)
    return made


@pytest.fixture(scope="session")
def encoder(folder: Path) -> TextEncoder:
    return TextEncoder.load(TextConfig(encoder=str(folder)))


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """One to break."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))
