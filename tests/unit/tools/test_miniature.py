"""The miniature: a training that is stopped once and resumed, a summary, and `regen score-shapes`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from launcher.pipelines.schema import load_pipeline
from regen_dist.data.synthetic.shapes import SyntheticOptions, make_clip
from regen_dist.errors import ConfigError, TrainingError
from tools import miniature, stages
from tools.cli import app
from tools.local_services import s3
from tools.miniature import _named

# Stands in for `regen submit pipeline`: a step of the training every 20 ms, code 75 when it finds the file STOP; a
# second start goes on. Where HELD is set, the first makes three quarters of the steps and waits there for the file. At
# the end it leaves scores.
PIPELINE = """
import json, os, pathlib, sys, time
given = dict(each.split("=", 1) for each in sys.argv[1:] if "=" in each)
work, total = pathlib.Path(given["output"], given["name"]), int(given["variables.t2v_steps"])
run = work / "t2v"
run.mkdir(parents=True, exist_ok=True)
record, stop = run / "metrics.jsonl", run / "STOP"
stop.unlink(missing_ok=True)
lines = [json.loads(line) for line in record.read_text().splitlines()] if record.is_file() else []
step = max((line["step"] for line in lines), default=0)
pause_at = total * 3 // 4 if "HELD" in os.environ and not lines else total
file = record.open("a", buffering=1)
if step < total:
    start = {"kind": "event", "step": step, "event": "start", "url": given["variables.data"]}
    file.write(json.dumps(start | {"store": os.environ["AWS_ENDPOINT_URL"]}) + "\\n")
while step < total:
    if stop.exists():
        sys.exit(75)
    if step == pause_at:
        time.sleep(0.02)
        continue
    step += 1
    file.write(json.dumps({"kind": "train", "step": step}) + "\\n")
    time.sleep(0.02)
missed = [] if total > 50 else ["shape 10.0%, the target is 85%"]
shares = {name: {"share": 0.9, "number": 200, "interval_95": [0.85, 0.94]} for name in ("colour", "shape")}
scores = {"targets": {"colour": 0.95, "shape": 0.85}, "least_videos": 200, "targets_are_for": "generated",
          "missed": missed, "arms": {"real videos": {"scores": shares}, "generated": {"scores": shares}}}
(work / "report").mkdir(exist_ok=True)
(work / "report" / "scores.json").write_text(json.dumps(scores))
"""


class Store:
    """Stands in for the server."""

    def environment(self) -> dict[str, str]:
        return {"AWS_ENDPOINT_URL": "http://store"}


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    """Of the stores that were started, each with its bucket; the pipeline is a stand-in."""
    started: list[tuple[Path, str]] = []

    @contextmanager
    def start_store(folder: Path, *, bucket: str) -> Iterator[Store]:
        started.append((folder, bucket))
        yield Store()

    script = tmp_path / "pipeline.py"
    script.write_text(PIPELINE)
    monkeypatch.setattr(s3, "start_store", start_store)
    monkeypatch.setattr(stages, "regen", lambda *arguments: [sys.executable, str(script), *arguments])
    monkeypatch.setattr(stages, "_POLL_S", 0.02)
    monkeypatch.setattr(stages, "working_precision", lambda: "fp32")
    return started


def starts(out: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (out / "t2v" / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "event"]


def test_it_stops_once_goes_on_and_skips_what_is_done(
    folders: list[tuple[Path, str]],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "mini"
    monkeypatch.setenv("HELD", "1")
    miniature.miniature(["variables.t2v_steps=60"], out=out)
    first, second = starts(out)
    assert (first["step"], first["url"], first["store"]) == (0, "s3://miniature/data", "http://store")
    assert 30 <= second["step"] <= 45
    assert folders == [(out / "store", "miniature")]
    said = capfd.readouterr().out
    assert said.count("$ regen submit pipeline configs/pipelines/miniature.yaml --cluster local") == 2
    assert "variables.precision=fp32" in said
    assert "90.0%" in said
    assert f"The page: {out / 'report' / 'index.html'}" in said
    miniature.miniature(["variables.t2v_steps=60"], out=out)
    assert len(starts(out)) == 2


def test_the_harder_setting(folders: list[tuple[Path, str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """It has a pipeline and a folder of its own."""
    hard, easy = load_pipeline(miniature.HARD), load_pipeline(miniature.PIPELINE)
    assert set(hard.steps) - set(easy.steps) == {"continued"}
    with pytest.raises(TrainingError, match="the targets are missed"):
        miniature.miniature([f"output={tmp_path}", "variables.t2v_steps=10"], hard=True)
    assert folders == [(Path("runs/miniature_hard/store"), "miniature")]
    assert "$ regen submit pipeline configs/pipelines/miniature_hard.yaml --cluster local" in capfd.readouterr().out


def test_a_training_that_was_stopped_late_is_not_stopped_again(folders: list[tuple[Path, str]], tmp_path: Path) -> None:
    (tmp_path / "mini" / "t2v").mkdir(parents=True)
    (tmp_path / "mini" / "t2v" / "metrics.jsonl").write_text(json.dumps({"kind": "train", "step": 40}) + "\n")
    miniature.miniature(["variables.t2v_steps=60"], out=tmp_path / "mini")
    assert [start["step"] for start in starts(tmp_path / "mini")] == [40]


def test_a_target_that_is_missed_fails_it(folders: list[tuple[Path, str]], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the targets are missed: shape 10\.0%"):
        miniature.miniature(["variables.t2v_steps=10"], out=tmp_path / "mini")


def test_a_failure_ends_it_with_its_code(
    folders: list[tuple[Path, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages, "regen", lambda *_: [sys.executable, "-c", "raise SystemExit(4)"])
    with pytest.raises(typer.Exit) as ended:
        miniature.miniature(out=tmp_path / "mini")
    assert ended.value.exit_code == 4


def test_the_pipeline_has_the_steps_that_it_counts_on() -> None:
    planned = load_pipeline(miniature.PIPELINE)
    assert planned.steps["t2v"].train is not None
    assert [Path(each).name for each in planned.steps["score"].outputs] == ["scores.json", "index.html"]


# `regen score-shapes`: the table, and failing when a target is required and missed.


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
