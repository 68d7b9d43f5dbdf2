"""`regen reconstruct` with an untrained model: the whole way through, and one clear error for each wrong input."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from regen_dist.config import load_config, save_config
from regen_dist.errors import CheckpointError, ConfigError, DataError, RegenError
from regen_dist.inference.codec import Codec
from regen_dist.inference.frames import SourceVideo, VideoWriter
from regen_dist.models.embedder import build_model
from tests.helpers.tiny import NANO_AT_8
from tools.cli import app

CONFIG = Path("configs/embedder/nano.yaml")
OVERRIDES = [
    *NANO_AT_8,
    "data.url=nowhere",
    "data.validation_url=nowhere",
    "model.decoder.blocks=1",
    "engine.precision=fp32",
]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    with VideoWriter(path, 10, preset="ultrafast") as writer:
        for t in range(12):
            writer.write(np.roll(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3), t, 1))
    return path


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder whose weights are those of the first step."""
    config = load_config(CONFIG, OVERRIDES)
    save_config(config, tmp_path / "run")
    torch.manual_seed(0)
    model = build_model(config.model)
    for parameter in model.parameters():  # zero where a new model starts would hide the noise
        torch.nn.init.normal_(parameter, std=0.05)
    codec = Codec(model, config, torch.device("cpu"))
    monkeypatch.setattr(Codec, "load", lambda run, weights: codec)
    return tmp_path / "run"


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["reconstruct", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_command(video: Path, run_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = invoke(video, "--run", run_folder, "--out", out, "--steps", 2, "--fps", 15, "--short-side", 16, "--compare")
    assert "resized from 20x30 to 16x24" in shown
    for word in ("REGEN, 2 steps", "Mean of the clip", "PSNR dB", "seam ratio", "bits of latent"):
        assert word in shown
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["model"]["config_hash"]
    assert metrics["model"]["kind"] == "regen"
    assert metrics["options"]["steps"] == 2
    assert metrics["peak_memory_bytes"] > 10_000_000
    assert metrics["latent_bits_per_pixel"] == pytest.approx(2 * 2 * 8 * 2 * 3 * 16 / (12 * 16 * 24))
    assert (
        SourceVideo(out / "reconstruction.mp4").num_frames == 17
    )  # 12 frames at 10 fps last 1.1 s between first and last


def test_the_seed_is_that_of_the_noise(video: Path, run_folder: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        invoke(video, "--run", run_folder, "--out", tmp_path / name, "--seed", seed)
    a, b, c = (json.loads((tmp_path / name / "metrics.json").read_text())["psnr_db"] for name in "abc")
    assert a == b != c


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["--steps", 0], ConfigError, "steps is 0"),
        (["--fps", 0], ConfigError, "fps is 0"),
        (["--fps", 1e9], ConfigError, "at most 1000"),
        (["--seed", 2**63], ConfigError, "seed is 9223372036854775808; it must be in"),
        (["--overlap", 9], ConfigError, "overlap is 9"),
        (["--group", 0], ConfigError, "decoded 0 at a time"),
        (["--tile", 64], ConfigError, "attends over whole frames"),
        (["--short-side", 0], DataError, "short side is 0"),
        (["--max-frames", 0], DataError, "number of frames is 0"),
    ],
)
def test_wrong_values(
    video: Path, run_folder: Path, tmp_path: Path, arguments: list[object], error: type[RegenError], message: str
) -> None:
    with pytest.raises(error, match=message):
        invoke(video, "--run", run_folder, "--out", tmp_path / "out", *arguments)
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_request_to_end_leaves_no_half_written_file(
    video: Path, run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGTERM, lambda *_: pytest.fail("it would have been killed"))
    monkeypatch.setattr(Codec, "decode_windows", lambda *_, **__: signal.raise_signal(signal.SIGTERM))
    arguments = ["reconstruct", video, "--run", run_folder, "--out", tmp_path / "o"]
    result = CliRunner().invoke(app, [*map(str, arguments)])
    signal.signal(signal.SIGTERM, before)
    assert result.exit_code == 75
    assert list((tmp_path / "o").iterdir()) == []


def test_missing_video(run_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        invoke(tmp_path / "none.mp4", "--run", run_folder, "--out", tmp_path / "out")


def test_runs_that_are_none(video: Path, tmp_path: Path) -> None:
    with pytest.raises(RegenError, match="none"):
        invoke(video, "--run", tmp_path / "none", "--out", tmp_path / "out")
    save_config(load_config(CONFIG, OVERRIDES), tmp_path / "untrained")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        invoke(video, "--run", tmp_path / "untrained", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()
