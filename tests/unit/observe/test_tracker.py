"""Trackers: wandb offline, harmless when it fails; TensorBoard's event files read back."""

from __future__ import annotations

import io
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regen_dist.config.identity import read_run_id
from regen_dist.observe import tracker as tracking
from regen_dist.observe.tracker import TensorBoard, Trackers, WandbTracker
from tests.helpers.tiny import tiny_run
from tests.helpers.video import moving_square, write_video


def test_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Metrics and a picture land in an offline run under the run folder, without a network and without a failure."""
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))
    picture = tmp_path / "picture.png"
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(picture)
    tracker = WandbTracker(tiny_run(wandb__mode="offline"), tmp_path)
    tracker.log(1, {"train/loss": 0.5, "name": "is no number"}, {"clip": picture})
    tracker.close()
    assert tracker.failures == 0
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert list(run.rglob("*.png"))


def test_an_offline_run_is_resumed_with_its_videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two starts of a run are one run there: both keep its id. Videos lie beside the metrics, as they were written."""
    for name in ("CACHE", "CONFIG", "DATA"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / name))
    video = write_video(tmp_path / "video.mp4", moving_square(5, 32, 32), fps=8)
    for step in (1, 2):
        tracker = WandbTracker(tiny_run(wandb__mode="offline"), tmp_path)
        tracker.log(step, {"train/loss": 0.5}, videos={"validation/video 0": video})
        tracker.close()
        assert tracker.failures == 0
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert {run.name.split("-")[3] for run in runs} == {read_run_id(tmp_path)}
    films = [path for run in runs for path in run.rglob("*.mp4")]
    assert len(films) == 2
    assert {path.read_bytes() for path in films} == {video.read_bytes()}


def test_disabled_does_not_even_import_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By default nothing is started and nothing is written."""
    import wandb

    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("wandb was started"))
    tracker = WandbTracker(tiny_run(), tmp_path)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert tracker.failures == 0
    assert list(tmp_path.iterdir()) == []


def test_a_failing_start_is_counted_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No service: no exception, one warning that names the reason, and silence from then on."""
    import wandb

    def fail(**_: Any) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(wandb, "init", fail)
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracker(tiny_run(wandb__mode="online"), tmp_path)
        for step in range(3):
            tracker.log(step, {"loss": 0.5})
        tracker.close()
    assert tracker.failures == 1
    assert [record.getMessage() for record in caplog.records if "no route to host" in record.getMessage()] == [
        record.getMessage() for record in caplog.records
    ]
    assert len(caplog.records) == 1
    assert "metrics.jsonl goes on" in caplog.text


class _Broken:
    """A run whose service went away after it started."""

    def __init__(self) -> None:
        self.calls = 0

    def log(self, *_: Any, **__: Any) -> None:
        self.calls += 1
        raise OSError("broken pipe")

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def finish(self) -> None:
        raise OSError("broken pipe")


def test_an_outage_in_the_middle_switches_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first failed call is the last one that is tried; nor does a picture that cannot be read stop the run."""
    import wandb

    broken = _Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    tracker = WandbTracker(tiny_run(wandb__mode="online"), tmp_path)
    for step in range(3):
        tracker.log(step, {"loss": 0.5})
    tracker.close()
    assert (tracker.failures, broken.calls) == (1, 1)
    tracker = WandbTracker(tiny_run(wandb__mode="online"), tmp_path)
    tracker.log(0, {}, {"clip": tmp_path / "missing.png"})
    assert tracker.failures == 1


class _Kept:
    """A run that keeps what it is told."""

    def __init__(self) -> None:
        self.axes: list[tuple[str, str | None]] = []
        self.lines: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def define_metric(self, name: str, step_metric: str | None = None) -> None:
        self.axes.append((name, step_metric))

    def log(self, values: dict[str, Any], **options: Any) -> None:
        self.lines.append((values, options))

    def finish(self) -> None:
        pass


def test_points_after_a_rollback_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The step is a metric of ours, the axis of all others: wandb's own counter would drop a lower one. The id is that
    of the run folder, so that two runs of one name stay two, and one resumed stays one."""
    import wandb

    kept, given = _Kept(), list[dict[str, Any]]()
    monkeypatch.setattr(wandb, "init", lambda **options: (given.append(options), kept)[1])
    for folder in ("a", "a", "b"):
        tracker = WandbTracker(tiny_run(wandb__mode="online"), tmp_path / folder)
        for step in (7, 8, 3):
            tracker.log(step, {"loss": 0.5})
        tracker.close()
    assert ("*", "step") in kept.axes
    assert kept.lines[:3] == [({"loss": 0.5, "step": step}, {}) for step in (7, 8, 3)]
    ids = [each["id"] for each in given]
    assert ids[0] == ids[1] == read_run_id(tmp_path / "a")
    assert ids[2] == read_run_id(tmp_path / "b") != ids[0]
    assert {each["resume"] for each in given} == {"allow"}


@pytest.mark.parametrize("silent", ["init", "log", "finish"])
def test_a_call_that_never_returns_is_given_up(
    silent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Starting, sending and finishing are each waited for by seconds, with one warning."""
    import wandb

    kept = _Kept()

    def hang(*_: Any, **__: Any) -> None:
        time.sleep(60)

    monkeypatch.setattr(wandb, "init", hang if silent == "init" else lambda **_: kept)
    if silent != "init":
        monkeypatch.setattr(kept, silent, hang)
    for name in ("START_S", "SEND_S", "FINISH_S"):
        monkeypatch.setattr(tracking, name, 0.2)
    began = time.monotonic()
    with caplog.at_level(logging.WARNING):
        tracker = WandbTracker(tiny_run(wandb__mode="online"), tmp_path)
        tracker.log(1, {"loss": 0.5})
        tracker.log(2, {"loss": 0.5})
        tracker.close()
    assert time.monotonic() - began < 50, "the call would take 60 s"
    assert tracker.failures == 1
    assert [record.getMessage() for record in caplog.records if "no answer within 0.2 s" in record.getMessage()]
    assert len(caplog.records) == 1


def test_a_service_that_is_left_behind_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The end of this process would wait for it; it does not end when it is asked to."""
    import wandb

    asked = threading.Event()

    def fail(**_: Any) -> None:
        raise ConnectionError("no route to host")

    def hang() -> None:
        asked.set()
        threading.Event().wait(600)

    monkeypatch.setattr(wandb, "init", fail)
    monkeypatch.setattr(wandb, "teardown", hang)
    monkeypatch.setattr(tracking, "TEARDOWN_S", 0.1)
    service = tmp_path / "wandb-core"
    service.symlink_to(shutil.which("sleep") or "")
    with subprocess.Popen([service, "600"]) as process:
        try:
            WandbTracker(tiny_run(wandb__mode="online"), tmp_path).close()
            assert asked.wait(60)
            assert process.wait(60) == -signal.SIGKILL
        finally:
            process.kill()


# TensorBoard: what is written is read back out of the event files.


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


def test_a_run_that_begins_anew_shows_the_newer_points(tmp_path: Path) -> None:
    """One that was killed before its first checkpoint."""
    for stop, value in ((5, 1.0), (3, 2.0)):
        board = TensorBoard(tmp_path, 0)
        for step in range(stop + 1):
            board.log(step, {"loss": value})
        board.close()
    assert _points(tmp_path, "loss") == [(0, 2.0), (1, 2.0), (2, 2.0), (3, 2.0)]


@pytest.mark.parametrize("step", [0, 2])
def test_a_rollback_takes_points_back(tmp_path: Path, step: int) -> None:
    board = TensorBoard(tmp_path)
    for made in range(6):
        board.log(made, {"loss": 1.0})
    board.rewind(step)
    board.log(step + 1, {"loss": 2.0})
    board.close()
    assert _points(tmp_path, "loss") == [*((made, 1.0) for made in range(step + 1)), (step + 1, 2.0)]


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
