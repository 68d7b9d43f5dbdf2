"""The commands of the README on a real video, as a user types them."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
from PIL import Image

from regen_dist.config import config_hash, load_saved_config, to_yaml
from regen_dist.inference.frames import SourceVideo
from regen_dist.observe.record import read_record
from tests.helpers.checkpoints import newest
from tests.helpers.ranks import run_regen, run_regen_alone, run_regen_ranks, said, start_regen, wait_for_step
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video

STEPS = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    for seed in (1, 2):
        write_video(folder / "videos" / f"{seed}.mp4", moving_square(96, 50, 66, seed=seed))
    write_video(folder / "held_out.mp4", moving_square(23, 50, 66, seed=5))
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path) -> Path:
    """`regen shards build` on a folder of videos."""
    options = ("--segment-seconds", 1, "--short-side", 48, "--min-frames", 20, "--samples-per-shard", 4)
    out = folder / "shards"
    code = run_regen("shards", "build", folder / "videos", "--out", out, *options, log=folder / "build.log")
    assert code == 0, (folder / "build.log").read_text()
    assert "8 samples" in (folder / "build.log").read_text()
    return out


@pytest.fixture(scope="module")
def config(folder: Path, shards: Path) -> Path:
    made = tiny_run(
        folder / "runs", shards, engine__kind="zero3", engine__precision="bf16", data__workers=1,
        train__steps=STEPS, train__validate_at_start=True, wandb__mode="offline",
    )  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(to_yaml(made))
    return path


@pytest.fixture(scope="module")
def run(config: Path, folder: Path) -> Path:
    """`regen train --ranks 2`, stopped by a file STOP, and resumed by the same command in two ranks."""
    run = folder / "runs" / "tiny"
    process = start_regen("train", config, "--ranks", 2, log=folder / "train.log")
    try:
        wait_for_step(run, 2, process)
        (run / "STOP").touch()
        assert process.wait(60) == 75, (folder / "train.log").read_text()
    finally:
        process.send_signal(signal.SIGTERM)
    saved = newest(run)
    assert saved.step < STEPS
    assert f"stopped by the file STOP after step {saved.step}" in (folder / "train.log").read_text()
    logs = folder / "resumed"
    assert run_regen_ranks("train", config, logs=logs) == [0, 0], said(logs)
    assert f"resumed at step {saved.step} on 2 rank(s)" in said(logs)[0]
    return run


def test_a_run_folder_holds_all_that_was_promised(run: Path, config: Path) -> None:
    """Config and hash, metrics of every step once, a picture for each validation, two checkpoints at most, rank 1's
    log, and what wandb keeps offline."""
    saved = load_saved_config(run)
    assert saved.train.steps == STEPS
    assert (run / "config.hash").read_text().strip() == config_hash(saved)
    train = read_record(run / "metrics.jsonl", "train")
    assert [line["step"] for line in train] == list(range(1, STEPS + 1))
    for name in (
        "loss",
        "clips_per_s",
        "mfu",
        "data_wait",
        "memory_bytes",
        "lr",
        "grad_norm",
        "latent_std_content",
        "time",
    ):
        assert all(math.isfinite(line[name]) for line in train), name
    validations = read_record(run / "metrics.jsonl", "validation")
    assert [line["step"] for line in validations] == [0, STEPS]
    assert all(line["psnr_db"] > 3 for line in validations)
    pictures = sorted((run / "pictures").iterdir())
    assert [picture.name for picture in pictures] == ["step-00000000.png", f"step-{STEPS:08d}.png"]
    with Image.open(pictures[0]) as picture:
        assert picture.width > 100
    assert len(list((run / "checkpoints").glob("step-*"))) == 2
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step-{STEPS:08d}"
    assert (run / "logs" / "rank_1.log").exists()
    assert list((run / "wandb").glob("offline-run-*"))
    assert not list(run.rglob("*.tmp"))


def test_training_again_when_done_changes_nothing(run: Path, config: Path, folder: Path) -> None:
    """The same command on a finished run ends at once with 0 and adds no step."""
    before = read_record(run / "metrics.jsonl", "train")
    assert run_regen_ranks("train", config, logs=folder / "done") == [0, 0]
    assert read_record(run / "metrics.jsonl", "train") == before


def test_one_process_needs_no_ranks(config: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ZeRO-3 without `--ranks` and without any rank variable: a job of one, its data read in the process itself."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    logs = folder / "alone"
    assert run_regen_alone("train", config, "name=alone", "train.steps=2", "data.workers=0", logs=logs) == 0, said(logs)
    assert "starting at step 0 on 1 rank(s)" in said(logs)[0]
    assert len(read_record(folder / "runs" / "alone" / "metrics.jsonl", "train")) == 2


def test_reconstruct(run: Path, folder: Path) -> None:
    """A video that was not trained on, of sides that are no multiples of 8 and a length that is no multiple of a clip:
    all files, the measures, twice the frame rate."""
    out = folder / "out"
    arguments = ("reconstruct", folder / "held_out.mp4", "--run", run, "--out", out, "--steps", 2, "--fps", 48)
    assert run_regen(*arguments, log=folder / "reconstruct.log") == 0, (folder / "reconstruct.log").read_text()
    assert {path.name for path in out.iterdir()} == {
        "reconstruction.mp4", "side_by_side.mp4", "contact_sheet.png", "metrics.json",
    }  # fmt: skip
    metrics = json.loads((out / "metrics.json").read_text())
    assert 3 < metrics["psnr_db"] < 60
    assert -1 < metrics["ssim"] <= 1
    assert metrics["vmaf"] is not None
    assert metrics["windows"] == 6
    assert metrics["latent_bits_per_pixel"] > 0
    assert metrics["seam_ratio"] > 0
    assert metrics["encode_frames_per_s"] > 0
    assert metrics["decode_frames_per_s"] > 0
    assert metrics["model"]["config_hash"] == (run / "config.hash").read_text().strip()
    video = SourceVideo(out / "reconstruction.mp4")
    assert (video.height, video.width, video.num_frames) == (50, 66, 45)


def test_a_wrong_config_is_one_clear_message(config: Path, folder: Path) -> None:
    """All problems at once, before anything starts: exit code 2, no traceback, nothing written."""
    log = folder / "wrong.log"
    arguments = ("train", config, "--ranks", 2, "name=wrong", "train.stepz=3", "model.temporal_compression=5")
    assert run_regen(*arguments, log=log) == 2
    text = log.read_text()
    assert text.count("error:") == 1
    assert "did you mean train.steps?" in text
    assert "temporal_compression" in text
    assert "Traceback" not in text
    assert not (folder / "runs" / "wrong").exists()


@pytest.mark.parametrize(
    ("override", "code", "message"),
    [
        ("data.url=nowhere", 3, "nowhere"),
        ("optimizer.kind=fused_adam", 5, "set optimizer.kind=adamw"),
        ("model.decoder.attention.backend=flash", 5, "backend=sdpa"),
    ],
)
def test_what_cannot_run_here_is_told(config: Path, folder: Path, override: str, code: int, message: str) -> None:
    """A dataset that is not there, an optimizer and a kernel that need a GPU: the documented exit code and one message
    with what to do."""
    logs = folder / "refused"
    assert run_regen_alone("train", config, f"name=refused_{code}", "engine.kind=plain", override, logs=logs) == code
    text = said(logs)[0]
    assert text.count("error:") == 1
    assert message in text
    assert "Traceback" not in text
