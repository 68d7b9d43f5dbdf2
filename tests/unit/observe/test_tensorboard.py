"""TensorBoard: what is written is read back out of the event files."""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regen_dist.observe.tracker import TensorBoard, Trackers
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video

pytest.importorskip("tensorboard")


def _read(folder: Path) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    found.Reload()
    return found


def _points(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(each.step, each.value) for each in _read(folder).Scalars(name)]


def test_metrics_pictures_and_videos(tmp_path: Path) -> None:
    """Through the one interface, beside wandb, which is off: numbers alone, the picture, and the video frame by
    frame."""
    picture, video = tmp_path / "picture.png", tmp_path / "video.mp4"
    pixels = np.arange(8 * 12 * 3, dtype=np.uint8).reshape(8, 12, 3)
    Image.fromarray(pixels).save(picture)
    write_video(video, moving_square(7, 32, 48), fps=8)
    trackers = Trackers(tiny_run(tensorboard__enabled=True), tmp_path)
    for step in (10, 20):
        trackers.log(step, {"train/loss": 1 / step, "name": "is no number"})
    trackers.log(20, {"validation/loss": 0.25}, {"validation/clip": picture}, {"validation/video 0": video})
    trackers.close()
    found = _read(tmp_path / "tensorboard")
    assert sorted(found.Tags()["scalars"]) == ["train/loss", "validation/loss"]
    assert _points(tmp_path / "tensorboard", "train/loss") == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05))]
    (shown,) = found.Images("validation/clip")
    assert shown.step == 20
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(shown.encoded_image_string))), pixels)
    (played,) = found.Images("validation/video 0")
    film = Image.open(io.BytesIO(played.encoded_image_string))
    assert (film.format, film.size, film.n_frames) == ("GIF", (48, 32), 7)
    assert (played.width, played.height) == (48, 32)


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    """Steps after the checkpoint are made again: one point each is shown, the newer."""
    run = tiny_run(tensorboard__enabled=True)
    for start, stop, value in ((0, 5, 1.0), (3, 8, 2.0)):
        trackers = Trackers(run, tmp_path, start)
        for step in range(start + 1, stop + 1):
            trackers.log(step, {"loss": value})
        trackers.close()
    wanted = [(step, 1.0 if step <= 3 else 2.0) for step in range(1, 9)]
    assert _points(tmp_path / "tensorboard", "loss") == wanted


def test_a_rollback_takes_points_back(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for step in range(1, 6):
        board.log(step, {"loss": 1.0})
    board.rewind(2)
    board.log(3, {"loss": 2.0})
    board.close()
    assert _points(tmp_path, "loss") == [(1, 1.0), (2, 1.0), (3, 2.0)]


def test_off_by_default(tmp_path: Path) -> None:
    trackers = Trackers(tiny_run(), tmp_path)
    trackers.log(1, {"loss": 0.5})
    trackers.close()
    assert list(tmp_path.iterdir()) == []


def test_a_failure_is_said_once_and_stops_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A picture that is not there; from then on it is silent."""
    board = TensorBoard(tmp_path)
    with caplog.at_level(logging.WARNING):
        board.log(1, {}, {"clip": tmp_path / "missing.png"})
        board.log(2, {"loss": 0.5})
        board.rewind(1)
        board.close()
    assert board.failures == 1
    assert [record.getMessage() for record in caplog.records if "TensorBoard failed" in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert "metrics.jsonl goes on" in caplog.text


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The run goes on; the message says what to install."""
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with caplog.at_level(logging.WARNING):
        trackers = Trackers(tiny_run(tensorboard__enabled=True), tmp_path)
        trackers.log(1, {"loss": 0.5})
        trackers.close()
    assert "pip install 'regen-dist[track]'" in caplog.text
