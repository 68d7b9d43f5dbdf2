"""What a start of a rank costs."""

from __future__ import annotations

import sys
from pathlib import Path

from regen_dist.config.schema import RunConfig
from tests.helpers.comeback import small_run, train
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
