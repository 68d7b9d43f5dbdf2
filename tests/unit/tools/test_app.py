"""The app without its page: uploads, files that can be reached, and jobs that end, fail or are cancelled."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from regen_dist.errors import ConfigError, DataError
from tests.helpers.checkpoints import saved_run
from tests.helpers.machine import wait_until_gone
from tests.helpers.t2v import saved_t2v
from tests.helpers.video import moving_square, write_video
from tools.app.runner import JobRunner, JobRunning, checked, shown_name
from tools.app.uploads import (
    Limits,
    check_picture,
    check_video,
    choose_model,
    copy_page,
    find_models,
    report_pages,
    run_folders,
    uploaded_file,
    view_run,
)
from tools.cli import app

LIMITS = Limits(num_bytes=200_000, seconds=2.0, num_frames=40, pixels=128 * 128)


@pytest.fixture
def runner(tmp_path: Path) -> Iterator[JobRunner]:
    found = _runner(tmp_path, "")
    yield found
    found.close()


def _runner(folder: Path, script: str) -> JobRunner:
    """A runner whose worker is a few lines of Python; `work` and `output` are its folders."""
    head = "import json, os, subprocess, sys, time; from pathlib import Path; work = Path(sys.argv[1])\n"
    head += "output = work / 'output'; say = lambda **values: print(json.dumps(values), flush=True)\n"
    return JobRunner(folder / "app", (sys.executable, "-c", head + script))


def _until(condition: Callable[[], bool], timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.02)


def _film(path: Path, *, frames: int = 8, side: int = 32, fps: int = 24) -> Path:
    return write_video(path, moving_square(frames, side, side), fps=fps)


def _long(path: Path) -> Path:
    return _film(path, frames=30, fps=10)


def _large(path: Path) -> Path:
    return write_video(path, np.zeros((1, 2160, 3840, 3), np.uint8))


def _heavy(path: Path) -> Path:
    path.write_bytes(os.urandom(LIMITS.num_bytes + 1))
    return path


def _playlist(text: str) -> Callable[[Path], Path]:
    """A list that FFmpeg would follow to a video elsewhere on this machine."""

    def write(path: Path) -> Path:
        target = _film(path.with_name("private.mp4"))
        path.write_text(text.replace("TARGET", str(target)))
        return path

    return write


def _touch(data: bytes) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_bytes(data)
        return path

    return write


BAD_VIDEOS: dict[str, tuple[str, Callable[[Path], Path], str]] = {
    "text": ("note.txt", _touch(b"hello\n" * 50), "note.txt is not a video that can be read"),
    "text as mp4": ("note.mp4", _touch(b"hello\n" * 50), "note.mp4 is not a video that can be read"),
    "empty": ("empty.mp4", _touch(b""), r"empty.mp4 is empty \(0 bytes\)"),
    "4K": ("film.mp4", _large, "film.mp4 has 3840x2160 pixels, more than the"),
    "too long": ("film.mp4", _long, "film.mp4 is longer than the 2 seconds that are allowed"),
    "too many frames": ("film.mp4", lambda path: _film(path, frames=41, fps=60), "more than the 40 frames"),
    "too many bytes": ("film.mp4", _heavy, "film.mp4 has 0.2 MB, at most 0.190735 MB are allowed"),
    "concat": ("list.mp4", _playlist("ffconcat version 1.0\nfile 'TARGET'\n"), "list.mp4 is not a video"),
    "hls": (
        "list.m3u8",
        _playlist("#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nTARGET\n#EXT-X-ENDLIST\n"),
        "list.m3u8 is not a video",
    ),
}


@pytest.mark.parametrize("case", BAD_VIDEOS)
def test_a_bad_video_is_refused_by_name_and_reason(runner: JobRunner, case: str) -> None:
    name, write, message = BAD_VIDEOS[case]
    path = write(runner.uploads / name)
    with pytest.raises(DataError, match=message):
        check_video(uploaded_file(path, runner.uploads, LIMITS), LIMITS)


def test_a_video_within_the_limits_is_described_by_its_packets(runner: JobRunner) -> None:
    found = check_video(uploaded_file(_film(runner.uploads / "a.mp4"), runner.uploads, LIMITS), LIMITS)
    assert (found.num_frames, found.height, found.width) == (8, 32, 32)
    assert found.seconds == pytest.approx(8 / 24, abs=0.01)


def test_pictures_are_judged_by_their_header(runner: JobRunner) -> None:
    for name, size in (("good.png", (40, 24)), ("large.png", (300, 200))):
        Image.new("RGB", size).save(runner.uploads / name)
    Image.new("RGB", (40, 24)).save(runner.uploads / "odd.png", "TIFF")
    assert check_picture(runner.uploads / "good.png", LIMITS) == (24, 40)
    with pytest.raises(DataError, match=r"large.png has 300x200 pixels"):
        check_picture(runner.uploads / "large.png", LIMITS)
    with pytest.raises(DataError, match=r"odd.png is not a picture that can be read; upload a PNG, JPEG or WebP"):
        check_picture(runner.uploads / "odd.png", LIMITS)


def test_nothing_outside_the_folder_of_uploads_is_read(runner: JobRunner, tmp_path: Path) -> None:
    """By its path, by `..`, or by a link that lies among the uploads."""
    secret = _film(tmp_path / "secret.mp4")
    (runner.uploads / "link.mp4").symlink_to(secret)
    for path in (secret, runner.uploads / ".." / ".." / "secret.mp4", runner.uploads / "link.mp4", "/etc/passwd"):
        with pytest.raises(DataError, match="is not an upload of this page"):
            uploaded_file(path, runner.uploads, LIMITS)
    with pytest.raises(DataError, match="is not a regular file"):
        uploaded_file(runner.uploads, runner.uploads, LIMITS)
    with pytest.raises(DataError, match="no file was uploaded"):
        uploaded_file(None, runner.uploads, LIMITS)


def test_names_are_shown_plain() -> None:
    assert shown_name("../../etc/passwd") == "passwd"
    assert shown_name(r"..\..\boot.ini") == "boot.ini"
    assert shown_name("<img onerror=x>.mp4") == "_img onerror_x_.mp4"
    assert shown_name("..") == "upload"
    assert len(shown_name("x" * 500)) == 80


def test_a_job_is_kept_whole_and_its_source_has_a_plain_name(tmp_path: Path) -> None:
    script = "request = json.loads((work / 'request.json').read_text())\nsay(what='frames', done=1, total=4)\n"
    script += "(output / 'name.txt').write_text(Path(request['source']).name + request['model'])"
    runner = _runner(tmp_path, script)
    source = _film(runner.uploads / "a;b ..mp4" / "…odd name.MP4")
    job = runner.start("reconstruct", {"model": " m"}, source)
    assert job.ended.wait(60)
    assert (job.state, job.what, job.share) == ("done", "frames", 0.25)
    assert (job.folder / "name.txt").read_text() == "_odd name.mp4 m"
    assert list((tmp_path / "app" / "work").iterdir()) == []
    runner.close()
    assert _runner(tmp_path, script).start("generate", {"model": ""}, None).number == 2  # counted on over restarts


def test_cancelling_ends_all_processes_and_leaves_nothing(tmp_path: Path) -> None:
    """Of a worker that ignores SIGTERM, has a child of its own, and a half-written file. Another job is refused until
    then, and starts afterwards."""
    script = (
        "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n(output / 'half.mp4').write_bytes(b'half')\n"
    )
    script += "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'])\n"
    script += "say(what=f'{os.getpid()} {child.pid}', done=1, total=2)\ntime.sleep(300)"
    runner = _runner(tmp_path, script)
    job = runner.start("generate", {})
    _until(lambda: job.total == 2)
    with pytest.raises(JobRunning, match=r"job 1 \(generate\) is running, and one runs at a time"):
        runner.start("generate", {})
    assert runner.cancel() is job
    assert job.state == "cancelled"
    wait_until_gone([int(pid) for pid in job.what.split()])  # both would sleep for five minutes
    assert list((tmp_path / "app" / "work").iterdir()) == list((tmp_path / "app" / "results").iterdir()) == []
    assert runner.cancel() is None
    again = runner.start("generate", {})
    assert again.number == 2
    runner.close()
    assert again.state == "cancelled"


def test_a_failed_job_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    for script, message in (
        ("say(error='the disk is full'); sys.exit(3)", "the disk is full"),
        ("print('Traceback …'); sys.exit(1)", "the job ended with code 1: Traceback …"),
        ("os.kill(os.getpid(), 9)", "the job ended with code -9: it printed nothing"),
    ):
        runner = _runner(tmp_path, script)
        job = runner.start("reconstruct", {})
        assert job.ended.wait(60)
        assert (job.state, job.message) == ("failed", message)
        assert not job.folder.exists()
        runner.close()


def test_jobs_have_the_environment_that_they_are_given(tmp_path: Path) -> None:
    """The page's own process goes past every proxy; a job may read a model from object storage through one."""
    command = (sys.executable, "-c", "import os; print(os.environ.get('NO_PROXY')); raise SystemExit(1)")
    runner = JobRunner(tmp_path / "app", command, {**os.environ, "NO_PROXY": "localhost"})
    job = runner.start("reconstruct", {})
    assert job.ended.wait(60)
    assert job.message == "the job ended with code 1: localhost"
    runner.close()


def test_a_folder_belongs_to_one_app_and_nothing_else_is_removed(tmp_path: Path) -> None:
    mine = tmp_path / "mine" / "work" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("years")
    with pytest.raises(ConfigError, match="mine holds something else; give the app an empty or a new folder"):
        JobRunner(tmp_path / "mine")
    assert mine.read_text() == "years"
    first = JobRunner(tmp_path / "app")
    (tmp_path / "app" / "work" / "0007").mkdir()
    with pytest.raises(ConfigError, match=r"app is in use by process .* end that app, or give another"):
        JobRunner(tmp_path / "app")
    first.close()
    JobRunner(tmp_path / "app").close()
    assert not (tmp_path / "app" / "work" / "0007").exists()


def test_values_outside_their_bounds_are_named_together() -> None:
    with pytest.raises(ConfigError, match="steps is 0; 1 to 100 is allowed; samples is 9; 1 to 8 is allowed"):
        checked({"steps": 0, "samples": 9, "fps": None}, {"steps": (1, 100), "samples": (1, 8), "fps": (1, 120)})
    with pytest.raises(ConfigError, match="steps is nan"):
        checked({"steps": float("nan")}, {"steps": (1, 100)})


def test_an_emptied_seed_is_zero(tmp_path: Path) -> None:
    pytest.importorskip("gradio")
    from tools.app.page import AppState

    saved_t2v(tmp_path / "runs", saved_run(tmp_path / "runs"))
    runner = _runner(tmp_path, "(output / 'request.json').write_text((work / 'request.json').read_text())")
    state = AppState(tmp_path / "runs", runner, LIMITS)
    job = state.generation("a dog", "", None, "tiny_t2v", "tiny", samples=1, steps=1, guidance=1.0, seed=None)
    assert job.ended.wait(60)
    assert json.loads((job.folder / "request.json").read_text())["seed"] == 0
    runner.close()


def test_the_table_of_measures_says_why_one_is_missing() -> None:
    pytest.importorskip("gradio")
    from tools.app.page import measures_table

    found = {
        "video": {"frames": 1, "height": 8, "width": 10, "notes": ["non-square pixels: of 2:1, 8x5 scaled to 8x10"]},
        "psnr_db": 20.0, "psnr_mean_over_frames_db": 20.0, "ssim": None, "vmaf": None, "latent_bits_per_pixel": 2.0,
        "compression": 12.0, "label": "REGEN, 1 step", "notes": ["SSIM: its window does not fit"],
    }  # fmt: skip
    lines = measures_table(found).splitlines()
    assert lines[-2:] == [
        "| note | non-square pixels: of 2:1, 8x5 scaled to 8x10 |",
        "| note | SSIM: its window does not fit |",
    ]


def test_models_and_runs_are_found_by_name_alone(tmp_path: Path) -> None:
    """Runs with a checkpoint, of both tasks; a text-to-video model knows its embedder. Names are no paths, and links
    out of the folder are not followed."""
    runs, outside = tmp_path / "runs", tmp_path / "outside"
    embedder = saved_run(runs)
    saved_t2v(runs / "more", embedder)
    saved_run(outside)
    (runs / "linked").symlink_to(outside / "tiny")
    models = find_models(runs)
    assert [(each.name, each.task) for each in models] == [
        ("packaged embedder", "embedder"), ("more/tiny_t2v", "t2v"), ("tiny", "embedder"),
    ]  # fmt: skip
    text_to_video = choose_model(models, "more/tiny_t2v", "t2v")
    assert (text_to_video.run, text_to_video.steps, text_to_video.guidance) == ("tiny", 4, 2.0)
    for name in ("../outside/tiny", str(outside / "tiny"), "linked", "more/tiny_t2v", None):
        with pytest.raises(ConfigError, match=r"no embedder is called .*; there is: packaged embedder, tiny"):
            choose_model(models, name, "embedder")
    assert list(run_folders(runs)) == ["more/tiny_t2v", "tiny"]
    with pytest.raises(ConfigError, match=r"there is no run called '../outside/tiny'"):
        view_run(runs, "../outside/tiny", tmp_path / "shown")


def test_a_run_is_shown_by_copies(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    (run / "pictures").mkdir(parents=True)
    lines = [{"kind": "train", "step": step, "loss": 1 / step, "time": 0.0} for step in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    Image.new("RGB", (8, 8)).save(run / "pictures" / "step-00000001.png")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (run / "pictures" / "step-00000002.png").symlink_to(tmp_path / "secret.png")
    found = view_run(tmp_path / "runs", "one", tmp_path / "shown")
    assert "Training loss" in found.curves
    assert "<svg" in found.curves
    assert [each.name for each in found.pictures] == ["pictures-step-00000001.png"]
    assert all(each.is_relative_to(tmp_path / "shown") for each in found.pictures)


def test_the_page_of_an_evaluation_takes_along_its_videos(tmp_path: Path) -> None:
    """They are not linked in its markup: its script shows them."""
    (tmp_path / "runs" / "videos").mkdir(parents=True)
    write_video(tmp_path / "runs" / "videos" / "a 1#.mp4", moving_square(3, 32, 32))
    out = tmp_path / "runs" / "evaluation"
    options = ["--no-vmaf", "--no-baselines", "--model", "mean", "--clip-frames", "3", "--out", str(out)]
    result = CliRunner().invoke(app, ["evaluate", str(tmp_path / "runs" / "videos"), *options])
    assert result.exit_code == 0, result.output
    copies = copy_page(tmp_path / "runs", "evaluation", tmp_path / "shown").parent / "media"
    assert {str(each.relative_to(copies)) for each in copies.rglob("*.mp4")} == {"source/a 1#.mp4", "mean/a 1#.mp4"}


def test_a_report_page_takes_along_its_own_files_alone(tmp_path: Path) -> None:
    page = tmp_path / "runs" / "report"
    (page / "media").mkdir(parents=True)
    (page / "media" / "a b.png").write_bytes(b"picture")
    (page / "weights.bin").write_bytes(b"not linked")
    (tmp_path / "secret.png").write_bytes(b"secret")
    (page / "media" / "link.png").symlink_to(tmp_path / "secret.png")
    links = ("media/a%20b.png", "media/link.png", "../../secret.png", "/etc/passwd", "https://example.org/x.png")
    (page / "index.html").write_text("".join(f'<img src="{each}">' for each in links))
    assert list(report_pages(tmp_path / "runs")) == ["report"]
    copy = copy_page(tmp_path / "runs", "report", tmp_path / "shown")
    made = sorted(str(each.relative_to(copy.parent)) for each in copy.parent.rglob("*") if each.is_file())
    assert made == ["index.html", "media/a b.png"]
    with pytest.raises(ConfigError, match="there is no report page called"):
        copy_page(tmp_path / "runs", "../report", tmp_path / "shown")
