"""`regen check`: everything that a run would refuse at its start, as a table or as JSON, with the run's exit codes."""

from __future__ import annotations

import ast
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from regen_dist.checkpoint.folder import CheckpointFolder
from regen_dist.config import EmbedderConfig, to_yaml
from regen_dist.programs import regen
from tests.helpers.checkpoints import saved_run
from tests.helpers.commands import run_here
from tests.helpers.latents import write_cache
from tests.helpers.tiny import tiny_run
from tests.unit.house.test_contracts import ROOT, _nodes, _sources


@pytest.fixture(scope="module")
def dataset(tiny_shards: Path) -> Path:
    return tiny_shards


def regen_check(folder: Path, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of the command, in a folder of its own; tests/unit/launcher/preflight/test_findings.py starts
    the process."""
    ended = run_here(regen("check", "--json", *map(str, arguments)), cwd=folder)
    assert ended.stdout, ended.stderr
    return ended.returncode, json.loads(ended.stdout)


def written(config: EmbedderConfig, folder: Path) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(config))
    return path


def keys(told: dict[str, Any], level: str = "error") -> list[str]:
    return [each["key"] for each in told["findings"] if each["level"] == level]


def test_a_run_that_would_start(dataset: Path, tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "runs", dataset)
    code, told = regen_check(tmp_path, written(config, tmp_path))
    assert (code, told["ok"], told["findings"]) == (0, True, [])
    assert sorted(os.listdir(tmp_path)) == ["tiny.yaml"], "nothing is written"


def test_a_config_that_is_wrong_in_two_keys(dataset: Path, tmp_path: Path) -> None:
    path = written(tiny_run(tmp_path / "runs", dataset), tmp_path)
    code, told = regen_check(tmp_path, path, "train.stepz=1", "optimizer.lr=-1")
    assert (code, told["ok"], sorted(keys(told))) == (2, False, ["optimizer.lr", "train.stepz"])
    [unknown] = [each for each in told["findings"] if each["key"] == "train.stepz"]
    assert set(unknown) == {"level", "key", "message", "fix"}
    assert (unknown["message"], unknown["fix"][:26]) == ("command line: unknown key", "did you mean train.steps? ")


def test_everything_is_told_at_once_with_the_exit_code_of_the_first(tmp_path: Path) -> None:
    config = tiny_run(tmp_path / "runs", tmp_path / "nowhere", optimizer__kind="fused_adam", engine__kind="zero3")
    code, told = regen_check(tmp_path, written(config, tmp_path), "--world-size", 3, "--no-gpus")
    assert code == 2
    assert keys(told) == ["train.batch_global", "optimizer.kind", "optimizer.kind", "data"]
    assert told["findings"][3]["fix"] == "build the data, or correct the path"
    code, _ = regen_check(tmp_path, tmp_path / "tiny.yaml", "--no-gpus")
    assert code == 5
    code, _ = regen_check(tmp_path, tmp_path / "tiny.yaml", "optimizer.kind=adamw")
    assert code == 3


def test_another_order_another_model_and_lost_checkpoints(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "runs")
    path = written(run, tmp_path)
    produced = [f"--produced={url}" for url in run.data.sources]
    code, told = regen_check(tmp_path, path, *produced)
    assert (code, keys(told)) == (4, ["data"]), "the order of its data is another"
    folder = CheckpointFolder(run.checkpoints)
    folder.update_manifest(folder.manifest(7), state={"data": None}, rollbacks=[])
    assert keys(regen_check(tmp_path, path, *produced)[1]) == []
    code, told = regen_check(tmp_path, path, *produced, "model.decoder.blocks=3")
    assert (code, keys(told)) == (4, ["model"])
    assert "was saved by another model" in told["findings"][-1]["message"]
    (run.folder / "metrics.jsonl").write_text('{"kind": "checkpoint", "step": 4, "problem": null}\n')
    Path(run.checkpoints).rename(tmp_path / "elsewhere")
    code, told = regen_check(tmp_path, path, *produced)
    assert (code, keys(told)) == (4, ["checkpoint.url"])
    assert told["findings"][0]["fix"].endswith("Restore them, or start the run from scratch with --fresh")
    assert regen_check(tmp_path, path, *produced, "--fresh")[0] == 0


def test_preencoding_without_videos_or_an_embedder(dataset: Path, tmp_path: Path) -> None:
    embedder, path = saved_run(tmp_path / "runs").folder, tmp_path / "preencode.yaml"
    path.write_text(yaml.safe_dump({"embedder": str(embedder), "data": str(dataset), "output": str(tmp_path / "out")}))
    assert regen_check(tmp_path, path)[0] == 0
    code, told = regen_check(tmp_path, path, f"embedder={tmp_path}/none", f"data={tmp_path}/none")
    assert (code, keys(told)) == (3, ["data", "embedder"])
    cache = write_cache(tmp_path / "cache", videos=2)
    code, told = regen_check(tmp_path, path, f"data={cache}")
    assert (code, keys(told)) == (3, ["data"])


def test_the_pre_encodings_of_a_pipeline(tmp_path: Path) -> None:
    """Options before the config, and their values, are told from it."""
    path, config = tmp_path / "pipeline.yaml", tmp_path / "preencode.yaml"
    config.write_text(yaml.safe_dump({"embedder": f"{tmp_path}/none", "data": "videos", "output": f"{tmp_path}/out"}))
    command = ["preencode", "--task", "slurm", "--verify=2", str(config), f"data={tmp_path}/none"]
    path.write_text(yaml.safe_dump({"name": "p", "steps": {"latents": {"command": command}}}))
    code, told = regen_check(tmp_path, path)
    assert (code, keys(told)) == (3, ["data", "embedder"])


def test_the_trainings_of_a_pipeline(dataset: Path, tmp_path: Path) -> None:
    """What an earlier step makes need not be there; what none makes must."""
    config = written(tiny_run(tmp_path / "runs", tmp_path / "made"), tmp_path)
    steps: dict[str, Any] = {
        "data": {"command": ["shards", "synthetic"], "outputs": [f"{tmp_path}/made/manifest.json"]},
        "train": {"train": str(config)},
    }
    path = tmp_path / "pipeline.yaml"
    path.write_text(yaml.safe_dump({"name": "p", "steps": steps}, sort_keys=False))
    assert regen_check(tmp_path, path)[0] == 0
    steps["data"]["outputs"] = [f"{tmp_path}/other/manifest.json"]
    path.write_text(yaml.safe_dump({"name": "p", "steps": steps}, sort_keys=False))
    code, told = regen_check(tmp_path, path)
    assert (code, keys(told)) == (3, ["data"])
    assert not told["configs"][f"{path} train"]["ok"]


def test_the_table_of_a_terminal(tmp_path: Path) -> None:
    path = written(tiny_run(tmp_path / "runs", tmp_path / "nowhere"), tmp_path)
    ended = run_here(regen("check", str(path)), cwd=tmp_path, env={**os.environ, "COLUMNS": "200"})
    assert ended.returncode == 3
    assert "what is wrong" in ended.stdout
    assert "build the data, or correct the path" in ended.stdout


def test_the_programs_are_named_in_one_constant() -> None:
    """Whoever starts `regen` as a process takes `regen_dist.programs.regen`, the launcher above all."""
    found = [
        str(path.relative_to(ROOT))
        for path in _sources()
        for node in _nodes(path)
        if isinstance(node, ast.Constant) and node.value == "tools.cli"
    ]
    assert found == ["regen_dist/programs.py"]
