"""From videos with captions to videos from captions, as a user types it: text encoder, cache, training, generation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from regen_dist.config import to_yaml
from regen_dist.inference.frames import SourceVideo
from tests.helpers.checkpoints import saved_run
from tests.helpers.preencoding import Video, write_videos
from tests.helpers.ranks import run_regen_alone, run_regen_ranks, said
from tests.helpers.tiny import tiny_t2v

STEPS, TEXT_WIDTH = 4, 16
CAPTIONS = ("a small red circle moves left", "a large green square moves up", "a blue star stands still")


def _regen(*arguments: object, logs: Path, code: int = 0) -> str:
    """The command line in a process that begins with everything imported; returns what it printed."""
    assert run_regen_alone(*arguments, logs=logs) == code, said(logs)
    return said(logs)[0]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An embedder, and the cache of six captioned videos that it and a small T5 made."""
    folder = tmp_path_factory.mktemp("generate")
    embedder = saved_run(folder / "runs")
    videos = [Video(5 + 5 * (number % 2), caption=CAPTIONS[number % 3]) for number in range(6)]
    data = write_videos(folder, videos)
    _regen("text", "make", data, "--out", folder / "t5", "--width", TEXT_WIDTH, logs=folder / "text-log")
    config = {
        "embedder": str(embedder.folder), "data": str(data), "output": str(folder / "cache"), "buckets": [[32, 32]],
        "text": {"encoder": str(folder / "t5"), "max_tokens": 16},
    }  # fmt: skip
    (folder / "preencode.yaml").write_text(yaml.safe_dump(config))
    _regen("preencode", folder / "preencode.yaml", logs=folder / "preencode-log")
    return folder


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A few steps by two ranks under ZeRO-3."""
    made = tiny_t2v(
        folder / "runs", folder / "cache", engine__kind="zero3", train__steps=STEPS, train__validate_every=STEPS,
        model__text_width=TEXT_WIDTH, generation__embedder=str(folder / "runs" / "tiny"), generation__prompts=1,
    )  # fmt: skip
    (folder / "t2v.yaml").write_text(to_yaml(made))
    logs = folder / "train-log"
    assert run_regen_ranks("train", folder / "t2v.yaml", logs=logs) == [0, 0], said(logs)
    return folder / "runs" / "tiny_t2v"


def test_a_run_and_its_export_generate_the_same(run: Path, folder: Path) -> None:
    """Two prompts of a file, one by each task, from the run; both from the export: the same bytes of video. The text
    encoder is found where the cache says."""
    prompts = folder / "prompts.txt"
    prompts.write_text("a small red square moves left\na green star\n")
    fixed = ("--embedder", folder / "runs" / "tiny", "--steps", 2, "--batch", 1, "--prompts", prompts)
    for task in ("0/2", "1/2"):
        logs = folder / f"task{task[0]}-log"
        _regen("generate", "--run", run, *fixed, "--out", folder / "one", "--task", task, logs=logs)
    _regen("checkpoint", "export", run, "--out", folder / "model", logs=folder / "export-log")
    logs = folder / "generate-log"
    told = _regen("generate", "--run", folder / "model", *fixed, "--out", folder / "two", logs=logs)
    assert "2 generated" in told
    for number in range(2):
        one, two = (folder / name / f"0000{number}.mp4" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    video = SourceVideo(folder / "one" / "00001.mp4")
    assert (video.num_frames, video.height, video.width) == (5, 32, 32)
    record = json.loads((folder / "one" / "00001.json").read_text())
    assert record["prompt"] == "a green star"
    assert (record["model"]["step"], record["model"]["weights"]) == (STEPS, "ema")


def test_training_looked_at_what_it_generates(run: Path) -> None:
    """A video from the caption of a validation sample, at the last step."""
    folder = run / "generated" / f"step-{STEPS:08d}"
    assert (folder / "captions.txt").read_text().strip() in CAPTIONS
    assert SourceVideo(folder / "00.mp4").num_frames == 5


def test_what_does_not_belong_together(run: Path, folder: Path) -> None:
    """A text-to-video run does not reconstruct; a text encoder that is not the caches' is refused; each in one line,
    with the exit code of its kind."""
    logs = folder / "refused-log"
    told = _regen("reconstruct", folder / "made" / "0.mp4", "--run", run, "--out", folder / "no", logs=logs, code=2)
    assert "task 't2v'; this needs one of an embedder" in told
    assert "Traceback" not in told
    from regen_dist.models.text import make_small_encoder

    make_small_encoder(["other words"], folder / "other", width=TEXT_WIDTH)
    arguments = ("generate", "a", "--run", run, "--embedder", folder / "runs" / "tiny", "--text", folder / "other")
    told = _regen(*arguments, "--out", folder / "no", logs=logs, code=4)
    assert "the text encoder is not the one that the caches were made with" in told
    assert "Traceback" not in told
