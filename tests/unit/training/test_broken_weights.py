"""A run whose weights break keeps the checkpoints from before, says so, and goes on from them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from regen_dist.checkpoint.folder import CheckpointFolder, newest_good
from regen_dist.checkpoint.saver import Saver
from regen_dist.config.embedder import RunConfig
from regen_dist.config.run import CheckpointConfig
from regen_dist.distributed.ranks import Ranks
from regen_dist.errors import CheckpointError, RegenError, TrainingError
from regen_dist.inference.codec import Codec
from regen_dist.inference.export import ExportOptions, export_model
from regen_dist.training import loop
from regen_dist.training.run import train
from tests.helpers.checkpoints import folder_of, newest, write_checkpoint
from tests.helpers.tiny import tiny_dataset, tiny_run

BREAKS = 1e30  # a rate that leaves finite weights, of which no loss is finite
HEALTHY = 4


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_dataset(tmp_path_factory.mktemp("data"))


def _broken_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    """A rate that breaks the weights, from the step after `steps` on."""
    clean = loop.learning_rate
    monkeypatch.setattr(loop, "learning_rate", lambda config, made, total: (
        BREAKS if made >= steps else clean(config, made, total)))  # fmt: skip


def _config(tmp_path: Path, data: Path, every: int = 2, **changes: Any) -> RunConfig:
    return tiny_run(tmp_path, data, checkpoint__every=every, **changes)


@pytest.mark.parametrize("every", [1, 2, 3])
def test_a_skipped_tail_is_no_success_and_keeps_what_was_good(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, every: int
) -> None:
    """Weights break in step 5; every later step is skipped, and so many are saved that retention would delete all from
    before. The next start, with the rate mended, trains on from before the break, and ends well."""
    assert train(_config(tmp_path, data, every, train__steps=HEALTHY)) == 0
    with monkeypatch.context() as patch:
        _broken_after(patch, HEALTHY)
        with pytest.raises(TrainingError, match=r"the last 9 steps had non-finite .* goes on from step (3|4)"):
            train(_config(tmp_path, data, every, train__steps=14))
    run = tmp_path / "tiny"
    assert any(step <= HEALTHY for step in folder_of(run).steps())
    assert newest(run).step <= HEALTHY
    assert train(_config(tmp_path, data, every, train__steps=14)) == 0
    assert newest(run).step == 14
    assert newest(run).skipped_in_a_row == 0
    Codec.load(run).encode(torch.zeros(1, 3, 5, 32, 32))


def test_the_budget_of_skips_in_a_row(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ends the run long before the budget of all skips does, and a stopped run goes on counting."""
    _broken_after(monkeypatch, 2)
    with pytest.raises(TrainingError, match=r"step 9: the last 6 steps .*nonfinite_in_a_row allows 5.*from step 2"):
        train(_config(tmp_path, data, train__steps=40, guards__nonfinite_in_a_row=5))


def test_a_run_that_never_made_a_step_is_no_success(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is it on the second call, which has nothing to do."""
    _broken_after(monkeypatch, 0)
    config = _config(tmp_path, data, train__steps=6)
    for _ in range(2):
        with pytest.raises(TrainingError, match="no checkpoint from before"):
            train(config)


def test_broken_results_are_refused(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are finite, of which no latent is: neither encoded nor exported."""
    _broken_after(monkeypatch, 1)
    with pytest.raises(TrainingError):
        train(_config(tmp_path, data, train__steps=6))
    run = tmp_path / "tiny"
    codec = Codec.load(run, weights="plain")
    with pytest.raises(CheckpointError, match="encodes to latents that are not finite"):
        codec.encode(torch.zeros(1, 3, 5, 32, 32))
    with pytest.raises(CheckpointError, match="not finite"):
        export_model(run, tmp_path / "out", ExportOptions(weights="plain"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_broken_weights_are_no_checkpoint(tmp_path: Path, data: Path, value: float) -> None:
    """One value among all: it is not saved, not resumed from, not verified, not loaded and not exported. One that an
    earlier version saved is passed over, and named."""
    config = _config(tmp_path, data, train__steps=4)
    assert train(config) == 0
    run = tmp_path / "tiny"
    folder, good = folder_of(run), newest(run)
    kinds = ("master", "ema", "exp_avg", "exp_avg_sq")
    pieces = {f"{kind}/{name}": folder.reader(good).whole(f"{kind}/{name}").reshape(-1)
              for kind in kinds for name in good.shapes}  # fmt: skip
    pieces[list(pieces)[3]][-1] = value
    assert "1 of" in (problem := _saved(run, pieces))
    assert "not finite" in problem
    write_checkpoint(run, 6, pieces, good.shapes, state=good.state)
    assert "holds values that are not finite" in folder.problems(folder.manifest(6), checksums=True)[0]
    told: list[str] = []
    found = newest_good(folder, checksums=True, log=told.append)
    assert found is not None
    assert found.step == 4
    assert "not finite" in told[0]
    for use in (
        lambda: Codec.load(run, weights="plain"),
        lambda: export_model(run, tmp_path / "out", ExportOptions(6)),
    ):
        with pytest.raises(RegenError, match="not finite"):
            use()
    assert train(_config(tmp_path, data, train__steps=5, checkpoint__verify="sizes")) == 0


def _saved(run: Path, pieces: dict[str, torch.Tensor]) -> str:
    """Save them as step 5; what was said."""
    saver = Saver(CheckpointFolder(run / "checkpoints"), Ranks(), CheckpointConfig())
    saver.save(replace(newest(run), step=5, files={}), pieces)
    outcome = saver.settle()
    assert outcome is not None
    assert CheckpointFolder(run / "checkpoints").steps()[-1] == 4
    return outcome.problem
