"""`regen bench solvers`: every solver at the same numbers of evaluations, scored by the shapes detector."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from regen_dist.data.format.latents import TextEmbedding
from regen_dist.data.synthetic.shapes import SyntheticOptions, make_clip
from regen_dist.errors import ConfigError
from regen_dist.inference import generate as prompts_module
from regen_dist.inference.codec import PACKAGED_EMBEDDER, Codec
from regen_dist.inference.encoder import FrozenEncoder
from regen_dist.inference.latent_space import LatentSpace
from regen_dist.inference.sampler import TextToVideoModel
from tests.helpers.t2v import CPU, FPS, WordEncoder, saved_t2v
from tools.bench import app
from tools.bench.solvers import planned_settings


def test_solvers_have_the_same_evaluations() -> None:
    found = planned_settings("9,3")
    assert [(each.sampler, each.steps, each.evaluations) for each in found] == [
        ("euler", 3, 3), ("euler", 9, 9), ("heun", 2, 3), ("heun", 5, 9), ("dpmpp_2m", 3, 3), ("dpmpp_2m", 9, 9),
    ]  # fmt: skip


@pytest.mark.parametrize("evaluations", ["4", "3,x", "0", "", "-1"])
def test_wrong_numbers(evaluations: str) -> None:
    with pytest.raises(ConfigError, match="give odd numbers of at least 1"):
        planned_settings(evaluations)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model of random weights on the latents of the packaged embedder."""
    monkeypatch.setattr(prompts_module, "load_text_encoder", lambda space, path, device: WordEncoder())
    config = saved_t2v(tmp_path)
    facts: dict[str, Any] = {
        "fingerprint": "cache", "num_frames": 17, "channels": 8, "fps": FPS,
        "encoder": FrozenEncoder.load(PACKAGED_EMBEDDER, device=CPU).facts(),
        "preprocessing": {"buckets": [[32, 32]], "stride": 1}, "text": WordEncoder().facts(),
    }  # fmt: skip
    statistics = Codec.load(PACKAGED_EMBEDDER, device=CPU).statistics
    assert statistics is not None
    null = TextEmbedding(WordEncoder().null(), torch.ones(1, dtype=torch.bool))
    LatentSpace(facts, statistics, null).write(config.folder)
    return config.folder


def test_every_setting_is_scored(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model is called as often as the record says; a second call keeps the videos."""
    calls = 0
    predict = TextToVideoModel.predict

    def counted(self: TextToVideoModel, *arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        return predict(self, *arguments)

    monkeypatch.setattr(TextToVideoModel, "predict", counted)
    options = SyntheticOptions(number=2, seed=2, side=32, frames=17, split="held-out")
    (tmp_path / "prompts.txt").write_text("".join(f"{make_clip(number, options).caption}\n" for number in range(2)))
    command = ["solvers", "--run", run, "--embedder", PACKAGED_EMBEDDER, "--prompts", tmp_path / "prompts.txt"]
    command += ["--evaluations", "1,3", "--out", tmp_path / "out", "--guidance", 1]
    result = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "solvers.json").read_text())
    rows = {(row["sampler"], row["evaluations"]): row for row in record["rows"]}
    assert set(rows) == {(name, count) for name in ("euler", "heun", "dpmpp_2m") for count in (1, 3)}
    assert calls == sum(row["evaluations"] for row in record["rows"])
    assert all(row["scores"]["all three"]["number"] == 2 for row in record["rows"])
    assert all(row["seconds_per_video"] > 0 for row in record["rows"])
    again = CliRunner().invoke(app, list(map(str, command)), catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert json.loads((tmp_path / "out" / "solvers.json").read_text()) == record
    assert calls == sum(row["evaluations"] for row in record["rows"])
