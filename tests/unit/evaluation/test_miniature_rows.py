"""Videos of two clips: seams between clips, continued videos, and the record of solvers on the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions, make_clip
from regen_dist.evaluation.miniature import Request, judge_videos
from regen_dist.evaluation.miniature_scores import SeamMeter, generated_clips, missed_continuations
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import VideoWriter
from regen_dist.models.embedder import build_model
from tests.helpers.tiny import tiny_run

NUMBER, GIVEN = 4, 5
HELD_OUT = SyntheticOptions(number=NUMBER, seed=2, side=32, frames=10, split="held-out", backgrounds=("black",))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("rows")
    build_synthetic(root / "held_out", HELD_OUT, workers=0)
    facts = {"given": {"kind": "video", "clips": 1}, "settings": {"frames": HELD_OUT.frames - GIVEN}}
    (root / "continued").mkdir()
    for number in range(NUMBER):
        clip = make_clip(number, HELD_OUT)
        (root / "continued" / f"{number:05d}.mp4").write_bytes(clip.data)
        (root / "continued" / f"{number:05d}.json").write_text(json.dumps({"prompt": clip.caption, **facts}))
    return root


@pytest.fixture
def embedder(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Not trained, five frames a clip."""
    config = tiny_run(model__linear_start="random")
    codec = Codec(build_model(config.model), config, torch.device("cpu"))
    monkeypatch.setattr(Codec, "load", lambda path: codec)
    return root / "continued"


def _changed(source: Path, folder: Path, change: Any) -> Path:
    """Copy generated videos, with the frames after the given ones changed."""
    folder.mkdir()
    names = sorted(path.stem for path in source.glob("*.json"))
    for name, clip in zip(names, generated_clips(source, names), strict=True):
        (folder / f"{name}.json").write_text((source / f"{name}.json").read_text())
        with VideoWriter(folder / f"{name}.mp4", clip.fps, crf=0) as writer:
            for frame in [*clip.frames[:GIVEN], *change(clip.frames)]:
                writer.write(frame)
    return folder


def _judged(root: Path, folder: Path, embedder: Path, out: Path, **more: Any) -> dict[str, Any]:
    return judge_videos(
        Request(str(root / "held_out"), embedder, {"continued": folder}, previews=1, **more), out
    ).report


def test_seam_ratio() -> None:
    steady = np.arange(12, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    meter = SeamMeter(4)
    meter.add(steady)
    assert meter.to_json() == {"videos": 1, "seam_ratio": 1.0, "change_at_seams": 1.0, "change_inside": 1.0}
    jump = steady + np.repeat(np.array([0, 9, 18], np.uint8), 4)[:, None, None, None]
    meter.add(jump)
    assert meter.to_json() == {"videos": 2, "seam_ratio": 5.5, "change_at_seams": 5.5, "change_inside": 1.0}
    single = SeamMeter(12)
    single.add(steady)
    assert single.to_json() is None


def test_a_perfect_continuation(root: Path, tmp_path: Path, embedder: Path) -> None:
    """Only the added frames are read; they show half the path. Seams are measured for every arm of two clips."""
    report = _judged(root, root / "continued", embedder, tmp_path)
    found = report["continued"]["continued"]
    assert (found["videos"], found["added_frames"], found["direction"]) == (NUMBER, 5, 1.0)
    assert found["psnr_db"] > 60 > found["held_psnr_db"] > found["embedder_psnr_db"]
    assert not any("continued" in each for each in report["missed"])
    assert report["arms"]["continued"]["seams"] == report["arms"]["real"]["seams"]
    assert report["arms"]["real"]["seams"]["seam_ratio"] == pytest.approx(1.0, abs=0.2)
    assert report["first_frames"] == {}
    page = (tmp_path / "index.html").read_text()
    assert "the 5 frames after it are read" in page
    assert "Seams between clips" in page


def test_a_continuation_that_stands_still(root: Path, tmp_path: Path, embedder: Path) -> None:
    """The last given frame held: no direction in the added frames although the given ones move, and no seam."""
    held = _changed(root / "continued", tmp_path / "held", lambda frames: [frames[GIVEN - 1]] * 5)
    report = _judged(root, held, embedder, tmp_path / "out")
    found = report["continued"]["continued"]
    assert found["direction"] == 0.0
    assert found["psnr_db"] == pytest.approx(found["held_psnr_db"], abs=0.5)
    assert "continued: direction of the added frames 0.0%, the target is 85%" in report["missed"]
    assert missed_continuations({"continued": found | {"direction": 0.85}}) == []


def test_a_continuation_that_jumps_has_a_seam(root: Path, tmp_path: Path, embedder: Path) -> None:
    jumps = _changed(root / "continued", tmp_path / "jumps", lambda frames: frames[GIVEN:, ::-1])
    seams = _judged(root, jumps, embedder, tmp_path / "out")["arms"]["continued"]["seams"]
    assert seams["seam_ratio"] > 2


def test_solvers_on_the_page(root: Path, tmp_path: Path, embedder: Path) -> None:
    share = {"right": 1, "number": 4, "share": 0.25, "interval_95": [0.05, 0.7]}
    scores = dict.fromkeys(("colour", "shape", "direction", "all three"), share)
    row = {"sampler": "dpmpp_2m", "steps": 9, "evaluations": 9, "scores": scores}
    (tmp_path / "solvers.json").write_text(json.dumps({"prompts": 4, "rows": [row]}))
    report = _judged(root, root / "continued", embedder, tmp_path, solvers=tmp_path / "solvers.json")
    assert report["solvers"]["rows"] == [row]
    assert "<td>dpmpp_2m</td><td>9</td><td>25.0%<small>5–70</small></td>" in (tmp_path / "index.html").read_text()
    report = _judged(root, root / "continued", embedder, tmp_path, solvers=tmp_path / "none.json")
    assert report["not_made"] == {"solvers": f"there is nothing at {tmp_path / 'none.json'}"}
