"""`regen bench step` and `regen bench all` at their smallest: all figures are there, and nothing else is left. No
speed is asserted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regen_dist.config import to_yaml
from tests.helpers.ranks import run_regen
from tests.helpers.tiny import tiny_run, tiny_t2v
from tools.bench.step import table as step_table


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Options that make it small."""
    files = {"embedder": tiny_run(), "t2v": tiny_t2v(), "sharded": tiny_t2v(train__accumulation=2)}
    for name, config in files.items():
        (tmp_path / f"{name}.yaml").write_text(to_yaml(config))
    return [*(f"--{name}={tmp_path / name}.yaml" for name in files), "--side=32", "--steps=1", "--repeats=1"]


def test_utilisation_and_the_profile_by_way_of_all(small: list[str], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    command = ["bench", "all", "--only=step", f"--out={out}", "--", *small, "--only=utilisation"]
    assert run_regen(*command, log=log, timeout_s=240.0) == 0, log.read_text()
    facts = json.loads((out / "all.json").read_text())["step"]
    assert {path.name for path in (out / "step").iterdir()} == {"step.json", "step.md"}
    assert (out / "step/step.md").read_text() == step_table(facts)
    assert facts["machine"].keys() >= {"device", "cores", "packages"}
    assert all(len(run["config_hash"]) == 64 for run in facts["runs"].values())
    found = facts["utilisation"]
    names = {"embedder", "text to video"}
    assert found["profile"].keys() == names
    assert found["cases"].keys() == names | {f"{name}, activations recomputed" for name in names}
    for case in found["cases"].values():
        assert 0 < case["mfu"]["median"] < 1
        assert case["flops_per_step"] > 0
    for name in names:
        recomputed = found["cases"][f"{name}, activations recomputed"]
        assert found["profile"][name]["groups"]["noise"] > 0, "the generator's stretch is marked"
        assert recomputed["parameters"] == found["cases"][name]["parameters"]


def test_ranks_share_the_batch_and_leave_their_figures(small: list[str], tmp_path: Path) -> None:
    out, log = tmp_path / "out", tmp_path / "log"
    code = run_regen("bench", "step", *small, f"--out={out}", "--only=sharding", log=log, timeout_s=240.0)
    assert code == 0, log.read_text()
    found = json.loads((out / "step.json").read_text())["sharding"]
    assert found["cases"].keys() == found["memory"].keys() == {"one process", "ZeRO-3, two ranks"}
    assert found["cpu_ratios"]["ZeRO-3, two ranks"]["median"] > 0
    for memory in found["memory"].values():
        assert memory["resident_bytes"] > 0
        (activations,) = [size for name, size in memory["terms"].items() if name.startswith("activations of")]
        assert memory["tensor_bytes"] > activations > 0
        assert sum(memory["terms"].values()) == memory["estimated_bytes"]
