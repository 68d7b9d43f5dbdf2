"""The command works from any folder; a wheel, which would lack the presets, is not built."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from launcher.cluster import load_cluster
from launcher.pipelines.schema import load_pipeline, with_inputs
from launcher.submit import command_request
from regen_dist.config import load_config
from regen_dist.errors import DataError
from tools.bench.codec_systems import CONFIGS, own_config
from tools.bench.compression_measure import load_clips
from tools.cli import app

ROOT = Path(__file__).resolve().parents[3]
CLIPS = Path("configs/bench/compression_clips.yaml")


def test_presets_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's own folder comes first."""
    monkeypatch.chdir(tmp_path)
    demo = load_config("configs/demo/embedder.yaml")
    assert load_cluster("slurm").kind == "slurm"
    assert load_pipeline(Path("configs/pipelines/paper.yaml")).steps
    own = tmp_path / "configs" / "demo" / "embedder.yaml"
    own.parent.mkdir(parents=True)
    own.write_text(f"extends: {ROOT}/configs/demo/embedder.yaml\nname: mine\n")
    assert (demo.name != "mine", load_config("configs/demo/embedder.yaml").name) == (True, "mine")


def test_inputs_of_a_pipeline_are_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As configs are; the user's own file comes first, and another content is another step."""
    preset = Path("configs/preencode/nano.yaml")
    order = command_request("job", tmp_path, ["config"], load_cluster("local"), "local")
    monkeypatch.chdir(tmp_path)
    ours = with_inputs(order, [preset]).fingerprint
    assert ours == with_inputs(order, [ROOT / preset]).fingerprint != order.fingerprint
    preset.parent.mkdir(parents=True)
    preset.write_text(f"extends: {ROOT}/{preset}\nstride: 7\n")
    assert with_inputs(order, [preset]).fingerprint != ours


def test_configs_that_commands_name_themselves_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that stand in the programs, read from another folder, by what reads them there."""
    monkeypatch.chdir(tmp_path)
    named = {
        Path(found)
        for program in sorted((ROOT / "tools").rglob("*.py"))
        for found in re.findall(r'Path\(\s*"(configs/[^"{]*\.yaml)"', program.read_text())
    }
    assert len(named) > 8
    pipelines = {path for path in named if path.parent.name == "pipelines"}
    for path in named - {CLIPS} - pipelines:
        assert load_config(path).name, path
    assert all(load_pipeline(path).steps for path in pipelines)
    with pytest.raises(DataError, match=r"carphone\.mp4"):  # the list was read; the videos are not here
        load_clips(CLIPS, tmp_path)
    assert own_config(CONFIGS / "fast_k4.yaml", "fp32").name


def test_completion_is_offered() -> None:
    assert "--install-completion" in CliRunner().invoke(app, ["--help"]).output


def test_no_wheel_is_built(tmp_path: Path) -> None:
    """The reason and the command that works are told."""
    ended = subprocess.run(
        [sys.executable, "setup.py", "bdist_wheel", "-d", str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert ended.returncode != 0
    assert "would lack configs/" in ended.stderr
    assert "pip install -e ." in ended.stderr
    assert not list(tmp_path.iterdir())
