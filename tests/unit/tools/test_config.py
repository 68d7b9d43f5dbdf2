"""`regen init`: a folder whose configs validate, and from which a run trains."""

from __future__ import annotations

import json
import re
from pathlib import Path

import fastjsonschema
import pytest
from typer.testing import CliRunner

from launcher.cluster import load_cluster
from regen_dist.config import load_config
from regen_dist.config.preencode import load_preencode_config
from regen_dist.config.project import lay_out
from regen_dist.config.t2v import T2VConfig
from regen_dist.config.yaml_files import read_yaml
from regen_dist.errors import ConfigError
from regen_dist.training.run import train
from tests.helpers.tiny import tiny_dataset
from tools.cli import app

PRESETS = sorted(path.stem for path in (Path(__file__).parents[3] / "configs" / "embedder").glob("*.yaml"))


def _init(folder: Path, *arguments: str) -> str:
    result = CliRunner().invoke(app, ["init", str(folder), *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_a_folder_whose_name_is_not_utf8(tmp_path: Path) -> None:
    lay_out(tmp_path / "caf\udce9")
    assert (tmp_path / "caf\udce9" / "README.md").read_text("utf-8").startswith("# caf\ufffd\n")


def test_its_configs_validate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They stand alone, and agree with each other on where things are; the cluster's file is read by its path."""
    shown = _init(tmp_path / "mine")
    assert "README.md" in shown
    monkeypatch.chdir(tmp_path / "mine")
    embedder, t2v = load_config("configs/embedder.yaml"), load_config("configs/t2v.yaml")
    latents = load_preencode_config("configs/preencode.yaml")
    assert isinstance(t2v, T2VConfig)
    assert latents.embedder == str(embedder.folder) == t2v.generation.embedder
    assert (latents.data, latents.output) == (embedder.data.url, t2v.data.url)
    assert load_cluster("cluster.yaml").kind == "slurm"
    for path in Path().rglob("*.yaml"):
        assert "extends" not in path.read_text()
    assert load_config("configs/embedder.yaml").model == load_config("configs/embedder/nano.yaml").model


def test_editors_find_the_schema_of_each_file(tmp_path: Path) -> None:
    _init(tmp_path / "mine")
    for path in (files := sorted((tmp_path / "mine").rglob("*.yaml"))):
        named = path.read_text().splitlines()[0].removeprefix("# yaml-language-server: $schema=")
        fastjsonschema.compile(json.loads((path.parent / named).read_text()))(read_yaml(path)[0])
    assert len(files) == 4


@pytest.mark.parametrize("preset", PRESETS)
def test_every_embedder_can_be_begun_with(tmp_path: Path, preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _init(tmp_path / "mine", "--embedder", preset, "--t2v", "5b")
    wanted = load_config(f"configs/embedder/{preset}.yaml")
    monkeypatch.chdir(tmp_path / "mine")
    found = load_config("configs/embedder.yaml")
    assert (found.model, found.optimizer, found.train) == (wanted.model, wanted.optimizer, wanted.train)
    assert (found.name, found.data.url) == ("embedder", "data/train")


def test_the_commands_of_its_readme_are_there(tmp_path: Path) -> None:
    """Every `regen COMMAND` and every option of it that the page shows."""
    _init(tmp_path / "mine")
    lines = re.findall(r"^    regen (.+)$", (tmp_path / "mine" / "README.md").read_text(), re.MULTILINE)
    assert len(lines) >= 12
    for line in lines:
        words = line.split("  #")[0].split()
        names = [word for word in words[:2] if re.fullmatch(r"[a-z]+", word)]
        known = CliRunner().invoke(app, [*names[: 2 if names[0] in ("submit", "shards", "text") else 1], "--help"])
        assert known.exit_code == 0, line
        for option in (word for word in words if word.startswith("--")):
            assert option in known.output, line


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    """A folder with anything in it is refused, an empty one is taken, and a preset that is not there writes nothing."""
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / ".hidden").write_text("mine")
    with pytest.raises(ConfigError, match=r"full is not empty \(\.hidden\)"):
        _init(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".hidden"]
    with pytest.raises(ConfigError, match="is a file"):
        _init(tmp_path / "full" / ".hidden")
    with pytest.raises(ConfigError, match=r"no preset configs/t2v/none.yaml; known are .*nano"):
        _init(tmp_path / "new", "--t2v", "none")
    assert not (tmp_path / "new").exists()
    (tmp_path / "empty").mkdir()
    _init(tmp_path / "empty")
    with pytest.raises(ConfigError, match="is not empty"):
        _init(tmp_path / "empty")


def test_a_run_trains_from_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    _init(mine)
    (mine / "data").mkdir()
    tiny_dataset(tmp_path / "made").rename(mine / "data" / "train")
    small = [
        "data.validation_url=null", "data.validation_size=null", "data.workers=0", "train.steps=2",
        "train.batch_global=2", "engine.kind=plain", "engine.precision=fp32", "model.linear_start=dct",
    ]  # fmt: skip
    monkeypatch.chdir(mine)
    assert train(load_config("configs/embedder.yaml", small)) == 0
    assert (mine / "runs" / "embedder" / "metrics.jsonl").is_file()
    assert list((mine / "runs" / "embedder" / "checkpoints").iterdir())
