"""The arms of the ablation are valid configs, all different, and the table ranks them."""

from __future__ import annotations

from pathlib import Path

from regen_dist.config import load_config
from tools.bench.ablation import arms, table

CONFIG = Path(__file__).parents[4] / "configs" / "bench" / "ablation.yaml"


def test_every_arm_is_a_valid_config_that_differs_from_the_others_only_in_its_diffusion() -> None:
    configs = [load_config(CONFIG, arm.overrides) for arm in arms()]
    assert len({config.diffusion for config in configs}) == len(configs) == 20
    same = {"diffusion": configs[0].diffusion}
    assert len({config.model_copy(update=same) for config in configs if config.diffusion.target == "x0"}) == 1
    same["model"] = configs[0].model  # whose linear code begins at random where it would not decode x0
    assert len({config.model_copy(update=same) for config in configs}) == 1
    assert {(each.diffusion.target == "x0", each.model.linear_start) for each in configs} == {
        (True, "dct"), (False, "random"),
    }  # fmt: skip


def test_the_table_puts_the_best_one_step_psnr_first_and_says_what_is_impossible() -> None:
    rows = [
        {"target": "eps", "density": "uniform", "pure_noise": 0.0, "weighting": "x0"},
        {"target": "x0", "density": "uniform", "pure_noise": 0.5, "weighting": "x0"},
        {"target": "velocity", "density": "uniform", "pure_noise": 0.5, "weighting": "x0"},
    ]
    figures = [(None, None), (20.0, 19.0), (21.5, 21.0)]
    named = (
        {**row, "psnr_1_step_db": one, "psnr_4_step_db": four} for row, (one, four) in zip(rows, figures, strict=True)
    )
    lines = table(list(named)).splitlines()[2:]
    assert [line.split(" | ")[0] for line in lines] == ["| velocity", "| x0", "| eps"]
    assert "21.50 dB" in lines[0]
    assert lines[2].count("impossible") == 2
