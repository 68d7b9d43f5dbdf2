"""`regen checkpoint` on a bucket: the same as on a disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.errors import CheckpointError
from regen_dist.inference.codec import Codec
from tests.helpers.saved import model_state, save_checkpoint, saved_run
from tools.checkpoint import app


def _regen(*arguments: object) -> str:
    result = CliRunner().invoke(app, [*map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_life_in_a_bucket(bucket_url: str, tmp_path: Path) -> None:
    """Listed, pinned, verified, damaged and found, pruned, exported, and imported into another run's prefix."""
    run = saved_run(tmp_path / "runs", checkpoint__url=bucket_url)
    folder = CheckpointFolder(run.checkpoints)
    for step in (8, 9, 10):
        save_checkpoint(folder, step, model_state(run, seed=step))
    folder.write_shard(11, "rank-00000-of-00001.safetensors", model_state(run))
    for place in (run.folder, run.checkpoints):
        found = json.loads(_regen("list", place, "--json"))
        assert [each["step"] for each in found["checkpoints"]] == [7, 8, 9, 10]
        assert list(found["debris"]) == ["step-00000011"]
    _regen("pin", run.checkpoints, 7)
    assert _regen("verify", run.checkpoints).count(": ok,") == 4
    name = "step-00000010/rank-00000-of-00001.safetensors"
    data = bytearray(folder.store.get(name))
    data[-1] ^= 1
    folder.store.put(name, bytes(data))
    with pytest.raises(CheckpointError, match=r"step 10: rank-00000-of-00001.*SHA-256"):
        _regen("verify", run.folder)
    out = tmp_path / "model"
    assert "at step 9" in _regen("export", run.folder, "--out", out, "--no-statistics")
    assert "step 8" in _regen("prune", run.folder)
    assert (folder.steps(), folder.debris()) == ([7, 9, 10], {})
    _regen("import", out, run.folder / "config.yaml", "name=next")
    other = CheckpointFolder(f"{bucket_url}/next")
    imported, expected = other.reader(other.manifest(0)), model_state(run, seed=9)
    for name in other.manifest(0).shapes:
        assert torch.equal(imported.whole(f"master/{name}"), expected[f"ema/{name}"])
    assert Codec.load(tmp_path / "runs" / "next", device=torch.device("cpu")).step == 0
