"""`regen text` as it is typed."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from regen_dist.data.build.build import build_shards
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import CheckpointError, DataError
from tests.helpers.datasets import OPTIONS, write_sources
from tools.text import app


def _regen(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    build_synthetic(folder, SyntheticOptions(12, seed=1, side=32, frames=5), workers=0)
    return folder


def test_make_and_show(shapes: Path, tmp_path: Path) -> None:
    """The same command again finds it complete; another is refused; a caption is shown by it."""
    out = tmp_path / "runs" / "text"
    assert f"{out}: a text encoder of width 32, from 12 different captions" in _regen(
        "make", shapes, "--out", out, "--width", 32
    )
    assert "complete already" in _regen("make", shapes, "--out", out, "--width", 32)
    with pytest.raises(CheckpointError, match="other sizes"):
        _regen("make", shapes, "--out", out)
    tokens, embedding, fingerprint = _regen("show", out, "a background moves", "--max-tokens", 3).splitlines()
    assert tokens == "tokens: ▁a ▁background </s>"
    assert embedding.startswith("embedding: 3 tokens x 32, root mean square ")
    assert len(fingerprint.removeprefix("fingerprint: ")) == 64


def test_a_dataset_without_captions(tmp_path: Path) -> None:
    build_shards([write_sources(tmp_path / "videos") / "tall.mp4"], tmp_path / "data", OPTIONS, workers=0)
    with pytest.raises(DataError, match="no sample has a caption"):
        _regen("make", tmp_path / "data", "--out", tmp_path / "text")
    assert not (tmp_path / "text").exists()
