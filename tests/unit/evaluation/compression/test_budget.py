"""Steps for a time, the rhythm of short runs, the choice of a learning rate, and what a training took."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regen_dist.config import save_config
from regen_dist.models.flops import count_flops
from tests.helpers.saved import saved_run
from tests.helpers.tiny import tiny_dataset, tiny_model, tiny_run
from tools.bench.compression_runs import (
    LEAST_STEPS,
    best_rate,
    is_trained,
    num_steps,
    paced_config,
    training_facts,
    training_pace,
    validation_psnr_db,
)


def _record(run: Path, *lines: tuple[int, float, float]) -> None:
    """Lines of training: step, seconds a step by the clock, and of the process."""
    run.mkdir(parents=True, exist_ok=True)
    facts = {"kind": "train", "loss": 0.5, "skipped": 0}
    texts = [json.dumps({**facts, "step": step, "step_s": wall, "cpu_step_s": cpu}) for step, wall, cpu in lines]
    (run / "metrics.jsonl").write_text("\n".join(texts))


def test_steps_fill_the_time() -> None:
    assert num_steps(10, 0.4) == 1500
    assert num_steps(0.001, 5.0) == LEAST_STEPS


def test_a_short_run_warms_up_for_a_tenth() -> None:
    assert paced_config(["a=1"], 1000, 30) == ["a=1", "train.steps=1000", "optimizer.warmup_steps=30"]
    assert paced_config([], 50, 30)[1] == "optimizer.warmup_steps=5"
    assert paced_config([], 4, 30)[1] == "optimizer.warmup_steps=1"


def test_the_pace_is_the_median_after_the_warm_steps(tmp_path: Path) -> None:
    _record(tmp_path, (1, 9.0, 8.0), (2, 2.0, 1.0), (3, 3.0, 1.25), (4, 30.0, 1.5))
    assert training_pace(tmp_path, 1) == {"cpu_s": 1.25, "wall_s": 3.0}


def test_the_best_rate_says_whether_a_better_one_may_lie_beyond() -> None:
    tried = [{"lr": 1e-3, "psnr_db": 20.0}, {"lr": 2e-3, "psnr_db": 21.0}, {"lr": 4e-3, "psnr_db": 20.5}]
    assert best_rate(tried) == {"lr": 2e-3, "at_edge": False, "tried": tried}
    assert best_rate(tried[:2])["at_edge"]
    assert not best_rate(tried[:1])["at_edge"]


def test_a_run_is_trained_when_its_last_step_is_saved(tmp_path: Path) -> None:
    assert not is_trained(tmp_path, 7)
    config = tiny_run(tmp_path)
    save_config(config, config.folder)
    assert not is_trained(config.folder, 7)
    saved_run(tmp_path, step=7)
    assert is_trained(config.folder, 7)
    assert not is_trained(config.folder, 8)


@pytest.mark.parametrize("kind", ["regen", "magvit2"])
def test_training_is_told_with_its_time_and_operations(tmp_path: Path, kind: str) -> None:
    config = tiny_run(tmp_path, model=tiny_model(kind=kind).model_dump(mode="json"), diffusion__train_frames=2)
    save_config(config, config.folder)
    _record(config.folder, (10, 2.0, 1.0), (25, 4.0, 2.0))
    found = training_facts(config.folder)
    assert (found["steps"], found["clips"], found["seconds"], found["cpu_seconds"]) == (25, 100, 80.0, 40.0)
    counted = count_flops(config.model, config.data.size)
    forward, encoder = counted.num_forward_flops, counted.forward_flops["encoder"]
    decoded = 2 / 5 if kind == "regen" else 1
    assert found["flops"] == pytest.approx(100 * 3 * (encoder + decoded * (forward - encoder)), rel=1e-6)
    assert found["encode_flops"] + found["decode_flops"] == forward
    assert found["parameters"] == counted.parameters


def test_rates_are_chosen_on_the_validation_data(tmp_path: Path) -> None:
    config = saved_run(tmp_path, tiny_dataset(tmp_path), data__validation_url=str(tmp_path / "shards"))
    assert 5 < validation_psnr_db(config.folder) < 60
