"""What a start of a rank costs, and what it begins with."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config.embedder import RunConfig
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.data.synthetic.dataset import build_synthetic
from tests.helpers.comeback import ending, small_run, train
from tests.helpers.ranks import run_ranks
from tests.helpers.tiny import tiny_dataset

COSTLY = {"torch._inductor.compile_fx", "skimage.metrics", "scipy.ndimage"}  # seconds each where a disk is slow


def _imported(config: RunConfig) -> list[str]:
    assert train(config) == 0
    assert "deepspeed.runtime.zero.muon.original_muon" in sys.modules, "what would import the compiler"
    return sorted(COSTLY & sys.modules.keys())


def test_training_imports_no_compiler_and_no_measures(tmp_path: Path) -> None:
    """A step, a validation with its picture, and a checkpoint."""
    config = small_run(tmp_path, tiny_dataset(tmp_path / "data"), "start", train__steps=1)
    assert run_ranks(_imported, 2, config) == [[], []]
    assert list((config.folder / "pictures").glob("*.png"))


def test_two_ranks_begin_at_the_linear_code_that_one_of_them_fitted(tmp_path: Path) -> None:
    """The losses are those of one process, far below those from cosines; when the run resumes, all goes on."""
    shapes = tmp_path / "shapes"
    build_synthetic(shapes, SyntheticOptions(number=48, seed=1, side=32, frames=5), workers=0)

    def run(name: str, start: str, **changes: Any) -> RunConfig:
        return small_run(tmp_path, shapes, name, model__linear_start=start, train__steps=2, **changes)

    def losses(config: RunConfig, ranks: int) -> list[float]:
        assert run_ranks(train, ranks, config) == [0] * ranks
        return ending(config).losses

    two = run("two", "pca")
    fitted = losses(two, 2)
    assert fitted == pytest.approx(losses(run("one", "pca", engine__kind="plain"), 1), rel=1e-4)
    assert max(fitted) < 0.8 * min(losses(run("cosines", "dct"), 2))
    assert losses(two.model_copy(update={"train": two.train.model_copy(update={"steps": 3})}), 2)[:2] == fitted
