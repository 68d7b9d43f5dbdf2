"""`regen bench compression` at its smallest: two arms, trained, measured on videos of our own, and told; then again."""

from __future__ import annotations

import json
import re
from pathlib import Path

from regen_dist.config import to_yaml
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_dataset, tiny_run
from tests.helpers.video import moving_square, write_video

ARMS = {"regen-k4", "magvit2-k4"}
STAGES = [{"channels": 8, "temporal": 2}, {"channels": 16, "spatial": 2, "temporal": 2}]


def test_two_arms_are_trained_measured_and_told(tmp_path: Path) -> None:
    shards, out, tests, log = tiny_dataset(tmp_path), tmp_path / "out", tmp_path / "tests", tmp_path / "log"
    config = tiny_run(url=shards, data__short_side=48, data__validation_url=str(shards), model__encoder__stages=STAGES)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    write_video(tests / "one.mp4", moving_square(36, 96, 128, seed=5))
    (tests / "broken.mp4").write_bytes(b"no video")
    command = [
        "bench", "compression", tmp_path / "config.yaml", f"data.url={shards}", f"data.validation_url={shards}",
        "--out", out, "--tests", tests, "--minutes-per-arm", 0.005, "--arms", "|".join(ARMS), "--no-tune",
    ]  # fmt: skip
    assert run_regen(*command, log=log, timeout_s=240.0) == 0, log.read_text()
    facts = json.loads((out / "compression.json").read_text())
    assert facts["arms"].keys() == ARMS
    assert facts["tests"]["left_out"][0].startswith("broken.mp4")
    for name, arm in facts["arms"].items():
        assert arm["training"]["steps"] == arm["pace"]["steps"] >= 4
        assert arm["measures"]["double"]["1"]["psnr_db"] > 5
        assert set(arm["measures"]["training"]) == ({"1", "2", "4", "8"} if name == "regen-k4" else {"1"})
        assert arm["measures"]["between"]["clips"] == 4
    assert set(facts["margins"]) == {"k = 4"}
    assert "| REGEN, k = 4 |" in (out / "compression.md").read_text()
    assert not re.search(r'(?:src|href)="(?!data:|#)', (out / "index.html").read_text())
    _again(command, out, log)


def _again(command: list[object], out: Path, log: Path) -> None:
    """Nothing is trained or measured a second time."""
    kept = {
        path: path.stat().st_mtime_ns for folder in ("arms", "probes", "measures") for path in (out / folder).rglob("*")
    }
    assert run_regen(*command, log=log, timeout_s=240.0) == 0, log.read_text()
    assert {path: path.stat().st_mtime_ns for path in kept} == kept
