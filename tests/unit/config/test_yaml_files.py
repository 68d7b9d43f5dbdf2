"""Values that YAML 1.1 reads otherwise than they look are refused with a hint, wherever they come from."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from launcher.cluster import load_cluster
from launcher.pipelines.schema import load_pipeline
from launcher.submit import expand_sweep
from regen_dist.config import load_config, load_saved_config, save_config
from regen_dist.config.preencode import PreencodeConfig
from regen_dist.config.yaml_files import dump_yaml, parse_yaml
from regen_dist.errors import ConfigError
from tests.helpers.tiny import tiny_run

ODD = ("010", "0777", "08", "-01", "1:30", "1:30.5", "None", "none", "NONE", "yes", "No", "on", "OFF")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    save_config(tiny_run(tmp_path / "runs"), tmp_path)
    return tmp_path / "config.yaml"


@pytest.mark.parametrize("text", ODD)
def test_refused_with_a_hint(text: str, config: Path) -> None:
    with pytest.raises(ConfigError, match=f"command line.*found '{text}' without quotes"):
        load_config(config, [f"train.steps={text}"])


def test_refused_wherever_it_stands(config: Path, tmp_path: Path) -> None:
    """In an override of a text, in a list, in a file, in a sweep, in a cluster's --set, in a pipeline's."""
    text = "none"
    found = f"found '{text}' without quotes"
    for override in (f"checkpoint.url={text}", f"data.size=[32, {text}]"):
        with pytest.raises(ConfigError, match=f"command line.*{found}"):
            load_config(config, [override])
    own = tmp_path / "own.yaml"
    own.write_text(f"extends: config.yaml\ntrain:\n  seed: {text}\n")
    with pytest.raises(ConfigError, match=f"own.yaml:3: train.seed: {found}"):
        load_config(own)
    with pytest.raises(ConfigError, match=found):
        expand_sweep(config, [], [f"train.seed=1,{text}"])
    with pytest.raises(ConfigError, match=found):
        load_cluster("slurm", [f"partition={text}"])
    with pytest.raises(ConfigError, match=found):
        load_pipeline(Path("configs/pipelines/paper.yaml").resolve(), [f"name={text}"])


def test_what_is_meant_is_taken(config: Path) -> None:
    """Quoted texts, plain numbers, and words that only begin like those."""
    loaded = load_config(config, ["train.seed=0", "train.steps=10", "optimizer.lr=0.01", 'checkpoint.url="None"'])
    assert (loaded.train.seed, loaded.train.steps, loaded.optimizer.lr) == (0, 10, 0.01)
    assert loaded.checkpoint.url == "None"
    assert load_config(config, ["data.url=s3://b:9000/01"]).data.url == "s3://b:9000/01"
    assert load_config(config, ["checkpoint.url=null"]).checkpoint.url is None


@pytest.mark.parametrize("text", [*ODD, "1e-4", "7E12", "12e4567"])
def test_a_saved_config_reads_back(text: str, tmp_path: Path) -> None:
    """A text that was quoted stays quoted in the run folder."""
    config = tiny_run(tmp_path, checkpoint__url=text)
    save_config(config, tmp_path)
    assert load_saved_config(tmp_path) == config
    assert load_config(tmp_path / "config.yaml") == config
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["checkpoint"]["url"] == text


def test_a_file_is_as_people_write_it() -> None:
    """Keys in their order, letters of every alphabet, and quotes only where a text would be read as something else."""
    values = {"prompt": "größe 大", "name": "none", "seed": 1, "sizes": [32, 64], "empty": None}
    text = 'prompt: größe 大\nname: "none"\nseed: 1\nsizes:\n- 32\n- 64\nempty: null\n'
    assert dump_yaml(values) == text
    assert parse_yaml(text) == values


def test_the_home_folder_is_expanded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a run lies in one place; a user that is not known is refused."""
    monkeypatch.setenv("HOME", str(tmp_path))
    config = tiny_run("~/runs")
    assert config.output == f"{tmp_path}/runs"
    assert config.folder == tmp_path / "runs" / "tiny"
    assert config.checkpoints == f"{tmp_path}/runs/tiny/checkpoints"
    with pytest.raises(ValueError, match="no home folder of that name"):
        tiny_run("~nobody-of-this-name/runs")


def test_home_folders_are_expanded_wherever_a_config_names_a_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pre-encoding, pipelines, clusters, datasets, caches and checkpoints; no folder called `~` is ever made."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    encoding = PreencodeConfig(embedder="~/runs/e", data="~/data", output="~/latents", read={"cache": "~/cache"})
    assert (encoding.embedder, encoding.data) == (f"{tmp_path}/runs/e", f"{tmp_path}/data")
    assert (encoding.output, encoding.read.cache) == (f"{tmp_path}/latents", f"{tmp_path}/cache")
    run = tiny_run("~/runs", checkpoint__url="~/saved", data__url="~/data", data__validation_url="~/held_out")
    assert run.checkpoints == f"{tmp_path}/saved/tiny"
    assert (run.data.url, run.data.validation_url) == (f"{tmp_path}/data", f"{tmp_path}/held_out")
    assert load_cluster("slurm", ["shared=~/jobs"]).shared == tmp_path / "jobs"
    Path("p.yaml").write_text(
        "name: p\noutput: ~/runs\nsteps:\n  a: {train: ~/a.yaml}\n  b: {command: [x, --out, ~/b], inputs: [~/c]}\n"
    )
    found = load_pipeline(Path("p.yaml"))
    assert found.folder == tmp_path / "runs" / "p"
    assert found.steps["a"].train == tmp_path / "a.yaml"
    assert found.steps["b"].command == ("x", "--out", f"{tmp_path}/b")
    assert found.steps["b"].inputs == (tmp_path / "c",)
    with pytest.raises(ValueError, match="no home folder of that name"):
        PreencodeConfig(embedder="e", data="d", output="~nobody-of-this-name/latents")
