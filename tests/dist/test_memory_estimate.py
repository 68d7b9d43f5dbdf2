"""The memory that `regen describe` promises beside what the tensors of real training steps hold."""

from __future__ import annotations

from pathlib import Path

from regen_dist.evaluation.step_speed.ranks import MEMORY_TARGET
from tools.bench.step_parts import CHECKPOINTED, EMBEDDER, T2V, Bench, prepared


def test_tensors_hold_what_was_promised(root: Path, tmp_path: Path) -> None:
    """Twenty million parameters, with activations kept and recomputed."""
    paths = {EMBEDDER: root / "configs/bench/step_embedder.yaml", T2V: root / "configs/bench/step_t2v.yaml"}
    bench = Bench(prepared(paths, tmp_path, side=128), tmp_path, steps=1, repeats=1, say=print)
    found = bench.memory()
    assert found.keys() == {f"{n}, {kind}" for n in paths for kind in ("activations kept", CHECKPOINTED)}
    ratios = {name: each["ratio"] for name, each in found.items()}
    assert all(abs(ratio - 1) <= MEMORY_TARGET for ratio in ratios.values()), ratios
    assert all(each["resident_ratio"] > each["ratio"] for each in found.values())
