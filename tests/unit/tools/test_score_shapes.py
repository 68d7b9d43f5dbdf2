"""`regen score-shapes`: the table, and failing when a target is required and missed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regen_dist.data.synthetic.shapes import SyntheticOptions, make_clip
from regen_dist.errors import ConfigError, TrainingError
from tools.cli import app
from tools.miniature import _named


@pytest.fixture
def generated(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for number in range(3):
        clip = make_clip(number, SyntheticOptions(number=3, seed=2, side=32, frames=5))
        (folder / f"{number:05d}.mp4").write_bytes(clip.data)
        (folder / f"{number:05d}.json").write_text(json.dumps({"prompt": clip.caption}))
    return folder


def test_table_and_files(generated: Path, tmp_path: Path) -> None:
    arguments = ["score-shapes", "--generated", f"mine={generated}", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "140"})
    assert done.exit_code == 0, done.output
    for shown in ("mine", "100.0% (44–100)", "≥ 200", "real: not made, no held-out dataset was given"):
        assert shown in done.output
    assert json.loads((tmp_path / "out" / "scores.json").read_text())["targets_are_for"] == "mine"
    assert (tmp_path / "out" / "index.html").is_file()


def test_a_required_target_that_is_missed(generated: Path, tmp_path: Path) -> None:
    """The page is written all the same."""
    arguments = ["score-shapes", "--generated", f"mine={generated}", "--out", str(tmp_path / "out"), "--require"]
    done = CliRunner().invoke(app, arguments)
    assert isinstance(done.exception, TrainingError)
    assert "3 videos, at least 200 are asked for" in str(done.exception)
    assert (tmp_path / "out" / "index.html").is_file()


def test_names_of_folders() -> None:
    named = _named(["a=x/y", "runs/b", "guidance off=z=1"], "--generated")
    assert named == {"a": Path("x/y"), "b": Path("runs/b"), "guidance off": Path("z=1")}
    for wrong in (["a=x", "a=y"], ["=x"]):
        with pytest.raises(ConfigError, match="--generated NAME=FOLDER"):
            _named(wrong, "--generated")
