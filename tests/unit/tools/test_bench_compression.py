"""The trainings of `regen bench compression`: which are made, with what, and that none is made twice."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from regen_dist.config import load_embedder_config
from regen_dist.errors import ConfigError
from tools.bench import compression_runs
from tools.bench.compression import _split_arguments
from tools.bench.compression_runs import CompressionArm, Runs, chosen_arms

ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "bench" / "compression.yaml"
ARMS = chosen_arms("regen-k4|magvit2-k4|regen-k16-full-no_linear")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Sequence[str]]]:
    """The commands of every batch of trainings; none is run, each takes half a second a step."""
    batches: list[dict[str, Sequence[str]]] = []

    def run(commands: Mapping[str, Sequence[str]], **_: Any) -> None:
        batches.append(dict(commands))

    monkeypatch.setattr(compression_runs, "run_side_by_side", run)
    monkeypatch.setattr(compression_runs, "training_pace", lambda run, warm: {"cpu_s": 0.5, "wall_s": 0.6})
    monkeypatch.setattr(compression_runs, "is_trained", lambda run, steps: run.name == "regen-k4")
    rates = {"0.00075": 20.0, "0.0015": 21.0, "0.003": 19.0, "0.006": 18.0}
    monkeypatch.setattr(
        compression_runs, "validation_psnr_db", lambda run: rates[f"{float(run.name.partition('-lr')[2]):.2g}"]
    )
    return batches


def _runs(out: Path, minutes: float = 2.0) -> Runs:
    own = (f"output={out}/arms",)
    return Runs(CONFIG, own, load_embedder_config(CONFIG, own), out, minutes, 2, lambda text: None)


def test_every_arm_is_paced_tuned_and_trained_once(tmp_path: Path, started: list[dict[str, Sequence[str]]]) -> None:
    runs = _runs(tmp_path)
    for _ in range(2):
        runs.claim()
        runs.pace(ARMS, tune=True)
        tuning = runs.tune(ARMS, tune=True)
    probes, tuned = started
    assert set(probes) == {arm.name for arm in ARMS} | {"regen-k16", "magvit2-k16", "regen-k16-no_linear"}
    assert len(tuned) == 12, "as many rates for each"
    assert all("train.steps=60" in command for command in tuned.values()), "a quarter of 240"
    assert {name: found["lr"] for name, found in tuning.items()} == {
        "regen-k16": 0.0015,
        "magvit2-k16": 0.0015,
        "regen-k16-no_linear": 0.0015,
    }
    runs.train(ARMS, tuning)
    trained = started[-1]
    assert set(trained) == {"magvit2-k4", "regen-k16-full-no_linear"}
    for command in trained.values():
        assert {"train.steps=240", "optimizer.warmup_steps=24", "optimizer.lr=0.0015"} <= set(command)
        config = load_embedder_config(CONFIG, list(command[command.index(str(CONFIG)) + 1 :]))
        assert str(config.folder).startswith(str(tmp_path / "arms"))


def test_without_tuning_the_rate_is_the_configs(tmp_path: Path, started: list[dict[str, Sequence[str]]]) -> None:
    runs = _runs(tmp_path)
    runs.pace(ARMS, tune=False)
    assert set(started[0]) == {arm.name for arm in ARMS}
    assert runs.tune(ARMS, tune=False)["regen-k16-no_linear"] == {"lr": 1.5e-3, "at_edge": False, "tried": []}
    assert len(started) == 1


def test_another_budget_or_config_needs_another_folder(tmp_path: Path) -> None:
    runs = _runs(tmp_path)
    runs.claim()
    runs.claim()
    with pytest.raises(ConfigError, match=r"have 2 minutes each, now 3 are asked for; give --minutes-per-arm 2"):
        replace(runs, minutes=3.0).claim()
    with pytest.raises(ConfigError, match="start from another config"):
        replace(
            runs, base=runs.base.model_copy(update={"data": runs.base.data.model_copy(update={"flip": False})})
        ).claim()
    assert json.loads((tmp_path / "minutes.json").read_text()) == 2.0


def test_measures_and_runs_have_their_places(tmp_path: Path) -> None:
    runs, arm = _runs(tmp_path), CompressionArm("regen", 8)
    assert runs.folder(arm) == tmp_path / "arms" / "regen-k8"
    assert runs.kept(arm) == tmp_path / "measures" / "regen-k8.json"


def test_the_config_may_be_left_out() -> None:
    assert _split_arguments(Path("a.b=c"), ["d=e"]) == (Path("configs/bench/compression.yaml"), ["a.b=c", "d=e"])
    assert _split_arguments(Path("my.yaml"), ["d=e"]) == (Path("my.yaml"), ["d=e"])


def test_a_longer_budget_takes_pace_and_rates_of_the_shorter(tmp_path: Path) -> None:
    """Steps follow the longer time; what the folder has measured itself stays."""
    short, long = tmp_path / "1", tmp_path / "4"
    short.mkdir()
    (short / "pace.json").write_text(json.dumps({"regen-k16": {"wall_s": 0.6, "cpu_s": 0.5, "steps": 120}}))
    (short / "tuning.json").write_text(json.dumps({"regen-k16": {"lr": 0.002}}))
    long.mkdir()
    runs = _runs(long, minutes=4)
    runs.take_over(short)
    assert json.loads((long / "pace.json").read_text())["regen-k16"] == {"wall_s": 0.6, "cpu_s": 0.5, "steps": 480}
    (long / "tuning.json").write_text(json.dumps({"regen-k16": {"lr": 0.001}}))
    runs.take_over(short)
    assert json.loads((long / "tuning.json").read_text())["regen-k16"]["lr"] == 0.001
