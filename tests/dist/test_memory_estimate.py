"""The memory that `regen describe` promises beside what the tensors of real training steps hold."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from launcher.supervise import launch
from tools.bench.step_rank import MEMORY_TARGET
from tools.bench.step_rank import estimate
from tools.bench import step_rank
from tools.bench.step import EMBEDDER
from tools.bench.step import T2V
from tools.bench.step import BenchRun
from tools.bench.step import prepared


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, root: Path) -> dict[str, BenchRun]:
    """Of twenty million parameters."""
    paths = {EMBEDDER: root / "configs/bench/step_embedder.yaml", T2V: root / "configs/bench/step_t2v.yaml"}
    return prepared(paths, tmp_path_factory.mktemp("memory"), side=128)


@pytest.mark.parametrize(("name", "recomputed"), [(EMBEDDER, "false"), (T2V, "true")])
def test_tensors_hold_what_was_promised(runs: dict[str, BenchRun], name: str, recomputed: str, tmp_path: Path) -> None:
    run = runs[name].with_changes(f"engine.activation_checkpointing={recomputed}")
    program = [sys.executable, "-P", step_rank.__file__, str(run.path), *run.overrides]
    assert launch([*program, "--tensors", "--warm", "1", "--out", str(tmp_path)], ranks=1, logs=tmp_path) == 0
    found = json.loads(step_rank.result_file(tmp_path, 0).read_text())
    promised = sum(estimate(found["sample"], run.config, world_size=1).values())
    assert found["tensor_bytes"] == pytest.approx(promised, rel=MEMORY_TARGET)
