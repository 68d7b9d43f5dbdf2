"""A run and an export go through one door: both are found, and say the same of themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from regen_dist.checkpoint.load_model import find_embedder, find_t2v
from regen_dist.errors import CheckpointError, ConfigError
from regen_dist.inference.export import ExportOptions, export_model
from tests.helpers.checkpoints import saved_run
from tests.helpers.t2v import saved_t2v


def test_a_run_and_what_was_exported_from_it_are_the_same_model(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "runs")
    export_model(run.folder, tmp_path / "model", ExportOptions(statistics_clips=0))
    trained, exported = find_embedder(run.folder), find_embedder(tmp_path / "model")
    assert trained.facts() == exported.facts()
    assert (trained.name, trained.step, trained.config_hash) == (exported.name, exported.step, exported.config_hash)
    ours, theirs = trained.weights("encoder."), exported.weights("encoder.")
    assert ours.keys() == theirs.keys()
    assert ours
    assert all(name.startswith("encoder.") and torch.equal(ours[name], theirs[name]) for name in ours)


def test_weights_that_an_export_does_not_hold(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "runs")
    export_model(run.folder, tmp_path / "model", ExportOptions(statistics_clips=0))
    assert find_embedder(run.folder, "plain").config.weights == "plain"
    with pytest.raises(CheckpointError, match="--weights plain"):
        find_embedder(tmp_path / "model", "plain")


def test_a_model_of_the_other_task(tmp_path: Path) -> None:
    embedder, t2v = saved_run(tmp_path / "runs"), saved_t2v(tmp_path / "t2v")
    with pytest.raises(ConfigError, match="task 'embedder'; this needs one of text to video"):
        find_t2v(embedder.folder)
    with pytest.raises(ConfigError, match="this needs one of an embedder"):
        find_embedder(getattr(t2v, "folder", t2v))
    with pytest.raises(ConfigError, match="not a run folder"):
        find_embedder(tmp_path)
