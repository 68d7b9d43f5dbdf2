"""Files that commit 004112b wrote are read: a dataset, a checkpoint, an export and a latent cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from regen_dist.config import load_config
from regen_dist.data.inspect.check import verify_dataset
from regen_dist.inference.codec import Codec
from regen_dist.observe.record import read_record
from regen_dist.training.run import train

FIXTURES = Path(__file__).parents[1] / "fixtures" / "004112b"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A copy, which tests may write to."""
    return Path(shutil.copytree(FIXTURES, tmp_path / "files"))


@pytest.mark.parametrize(("folder", "number"), [("data/shards", 8), ("latents", 8)])
def test_datasets_and_caches_are_whole(files: Path, folder: str, number: int) -> None:
    result = verify_dataset(files / folder, "deep", workers=0)
    assert result.bad == ()
    assert result.manifest.totals.samples == number


def test_a_run_and_its_export_decode_alike(files: Path) -> None:
    run, export = (Codec.load(files / each) for each in ("trained/tiny", "export"))
    clip = torch.rand(1, 3, run.num_frames, 32, 32) * 2 - 1
    times = torch.arange(run.num_frames).float()
    assert torch.equal(run.decode(run.encode(clip), times), export.decode(export.encode(clip), times))
    assert (run.step, export.step) == (2, 2)


def test_training_goes_on_from_its_checkpoint(files: Path) -> None:
    # A config of then says nothing of local mixing, which is on by default today.
    changes = ["model.decoder.local=false", "train.steps=3", f"output={files}/trained", f"data.url={files}/data/shards"]
    assert train(load_config(files / "trained/tiny/config.yaml", changes)) == 0
    assert [line["step"] for line in read_record(files / "trained/tiny/metrics.jsonl", "train")] == [1, 2, 3]
