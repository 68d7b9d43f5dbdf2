"""Checks of uploaded files (where they lie, their size, length and picture size, before a frame is decoded), and the
lists of models, runs and media that the page shows."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import unquote

from regen_dist.config import AnyRunConfig, load_saved_config
from regen_dist.config.exported import AnyExportConfig, T2VExportConfig, load_any_export_config
from regen_dist.config.t2v import T2VConfig
from regen_dist.errors import ConfigError, DataError, RegenError
from tools.app.runner import MARKER, shown_name

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

# Containers that hold their own frames. Playlists (HLS, concat, SDP, DASH) are left out: FFmpeg opens the files that
# they name, which may be any file of this machine.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,ogg,flv,gif"
PICTURES = ("PNG", "JPEG", "WEBP")


@dataclass(frozen=True)
class Limits:
    """Upper bounds on an upload.

    Attributes:
        num_bytes: size of the file.
        seconds: length of a video.
        num_frames: frames of a video.
        pixels: pixels of one frame or picture; 1920 x 1080 by default.
    """

    num_bytes: int = 200 * 2**20
    seconds: float = 60.0
    num_frames: int = 1800
    pixels: int = 1920 * 1080

    def text(self) -> str:
        """Describe the limits in one line."""
        return (
            f"at most {self.num_bytes / 2**20:g} MB, {self.seconds:g} seconds, {self.num_frames} frames and "
            f"{self.pixels / 1e6:.3g} million pixels a frame"
        )


@dataclass(frozen=True)
class VideoFacts:
    """Facts from a video's container: frames, seconds, and (height, width) as stored."""

    num_frames: int
    seconds: float
    height: int
    width: int


def uploaded_file(path: str | os.PathLike[str] | None, folder: Path, limits: Limits) -> Path:
    """Return the real path of an upload.

    Args:
        path: the path that the browser gave back.
        folder: folder of uploads; nothing outside it is read.
        limits: bounds on the size.

    Raises:
        DataError: there is none, it lies outside the folder, is no regular file, is empty, or is too large.
    """
    if not path:
        raise DataError("no file was uploaded; choose one first")
    name = shown_name(os.fspath(path))
    real = Path(os.path.realpath(path))
    if not real.is_relative_to(folder.resolve()):
        raise DataError(f"{name} is not an upload of this page; upload the file itself")
    try:
        found = real.lstat()
    except OSError as error:
        raise DataError(f"{name} is no longer there; upload it again") from error
    if not stat.S_ISREG(found.st_mode):
        raise DataError(f"{name} is not a regular file; upload a video or a picture")
    if not found.st_size:
        raise DataError(f"{name} is empty (0 bytes); upload a video or a picture")
    if found.st_size > limits.num_bytes:
        raise DataError(
            f"{name} has {found.st_size / 2**20:.1f} MB, at most {limits.num_bytes / 2**20:g} MB are allowed; upload a "
            "shorter or smaller file, or start the app with a larger --max-upload-mb"
        )
    return real


def check_video(path: Path, limits: Limits) -> VideoFacts:
    """Read a video's container, and compare it with the limits. No frame is decoded, and reading ends where a limit is
    passed.

    Raises:
        DataError: it is no video, or it is too long or too large.
    """
    import av

    name = shown_name(path.name)
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        with av.open(f"file:{path}", "r", options=options) as container:
            return _video_facts(container, name, limits)
    except (av.FFmpegError, OSError, ValueError) as error:
        why = "not of an allowed kind" if isinstance(error, ValueError) else getattr(error, "strerror", "") or error
        raise DataError(
            f"{name} is not a video that can be read ({why}); upload an mp4, mov, mkv, webm, avi or gif file"
        ) from error


def _video_facts(container: InputContainer, name: str, limits: Limits) -> VideoFacts:
    from regen_dist.data.video.container import choose_video

    try:
        stream = choose_video(container)
    except DataError as error:
        raise DataError(f"{name} is not a video: {error}") from error
    _check_sides(name, stream.codec_context.height, stream.codec_context.width, limits)
    count, seconds = _length(container, stream, limits)
    if seconds > limits.seconds:
        raise DataError(
            f"{name} is longer than the {limits.seconds:g} seconds that are allowed; cut it, or start the app with a "
            "larger --max-seconds"
        )
    if count > limits.num_frames:
        raise DataError(f"{name} has more than the {limits.num_frames} frames that are allowed; cut it")
    if not count:
        raise DataError(f"{name} holds no frames; is the file cut off?")
    return VideoFacts(count, seconds, stream.codec_context.height, stream.codec_context.width)


def _length(container: InputContainer, stream: VideoStream, limits: Limits) -> tuple[int, float]:
    """Frames and seconds by the packets, not by the header, which can say anything; stops beyond a limit."""
    base = stream.time_base or Fraction(1, 1000)
    count, first, last = 0, None, 0.0
    for packet in container.demux(stream):
        if not packet.size:
            continue
        count += 1
        at = packet.pts if packet.pts is not None else packet.dts
        if at is not None:
            seconds = float(at * base)
            first = seconds if first is None else min(first, seconds)
            last = max(last, seconds + float((packet.duration or 0) * base))
        if count > limits.num_frames or last - (first or 0.0) > limits.seconds:
            break
    return count, max(0.0, last - (first or 0.0))


def _check_sides(name: str, height: int, width: int, limits: Limits) -> None:
    if height * width > limits.pixels:
        raise DataError(
            f"{name} has {width}x{height} pixels, more than the {limits.pixels / 1e6:.3g} million that are allowed "
            "(1920x1080); scale it down first, for example with ffmpeg -vf scale=-2:720"
        )
    if min(height, width) < 8:
        raise DataError(f"{name} has {width}x{height} pixels; a side must have at least 8")


def check_picture(path: Path, limits: Limits) -> tuple[int, int]:
    """Read a picture's header, and compare it with the limits. Return (height, width).

    Raises:
        DataError: it is no PNG, JPEG or WebP picture, or it is too large.
    """
    from PIL import Image, UnidentifiedImageError

    name = shown_name(path.name)
    try:
        with Image.open(path, formats=PICTURES) as image:
            width, height = image.size
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a picture that can be read; upload a PNG, JPEG or WebP file") from error
    _check_sides(name, height, width, limits)
    return height, width


# Models and runs under the app's runs folder, and the media of a run that the page shows. Imports no torch at first.
#
# Names come from the browser; they are looked up in what was found, and are never used as paths.


PACKAGED = "packaged embedder"
Task = Literal["embedder", "t2v"]
DEPTH = 3
MOST_PICTURES = 24
PAGE = "index.html"
MOST_PAGE_BYTES = 512 * 2**20
# Links of a page: attributes, and values of its script's data (`source` and `file` of regen evaluate's videos).
_LINK = re.compile(r"""(?:(?:src|href|poster)=|"(?:source|file)": ?)["']([^"':#?]+)["']""")
_NO_MODELS = frozenset({"checkpoints", "logs", "heartbeats", "pictures", "generated", "launch", "wandb", "tensorboard"})


@dataclass(frozen=True)
class ListedModel:
    """Run or export that can be used.

    Attributes:
        name: path under the runs folder, for display.
        folder: its folder.
        task: `embedder` or `t2v`.
        run: name of the training run; for a text-to-video model that of its embedder's, "" if it is not recorded.
        steps, guidance: sampling of a text-to-video model by its config.
    """

    name: str
    folder: Path
    task: Task
    run: str
    steps: int = 1
    guidance: float = 1.0


def find_models(runs: Path) -> list[ListedModel]:
    """Find every run with a checkpoint and every export under a folder, the packaged embedder first."""
    from_package = Path(__file__).parents[2] / "regen_dist" / "pretrained" / "pocket"
    found = [ListedModel(PACKAGED, from_package, "embedder", "pocket")] if from_package.is_dir() else []
    for folder in _folders(runs, DEPTH):
        if (folder / "config.yaml").is_file() and (model := _model(folder, runs)) is not None:
            found.append(model)
    return found


def choose_model(models: list[ListedModel], name: str | None, task: Task) -> ListedModel:
    """Return the model of a name; ConfigError where there is none of this task."""
    fitting = [each for each in models if each.task == task]
    for each in fitting:
        if each.name == name:
            return each
    kind = "embedder" if task == "embedder" else "text-to-video model"
    known = ", ".join(each.name for each in fitting) or "none under the runs folder"
    raise ConfigError(f"no {kind} is called {name!r}; there is: {known}")


def _folders(folder: Path, depth: int) -> Iterator[Path]:
    """Folders below, without links: nothing outside the runs folder is listed."""
    try:
        entries = sorted(each for each in folder.iterdir() if each.is_dir() and not each.is_symlink())
    except OSError:
        return
    for each in entries:
        own = (each / MARKER).is_file()  # the folder of an app
        if not own and each.name not in _NO_MODELS and not each.name.startswith("."):
            yield each
            if depth > 1:
                yield from _folders(each, depth - 1)


def _model(folder: Path, runs: Path) -> ListedModel | None:
    """Describe a folder with a config; None if it is no usable model."""
    config: AnyRunConfig | AnyExportConfig
    try:
        if (folder / "model.safetensors").is_file():
            config = load_any_export_config(folder)
            run = config.origin.run if config.origin else folder.name
        else:
            config = load_saved_config(folder)
            run = config.name
            if config.checkpoint.url is None and not (folder / "checkpoints" / "latest").is_file():
                return None  # nothing saved yet
    except (RegenError, OSError):
        return None  # a config of another kind or version
    name = str(folder.relative_to(runs))
    if isinstance(config, T2VConfig | T2VExportConfig):
        flow = config.diffusion
        return ListedModel(name, folder, "t2v", _embedder_run(folder), flow.steps, flow.guidance)
    return ListedModel(name, folder, "embedder", run)


def _embedder_run(folder: Path) -> str:
    """Name of the run whose latents a text-to-video model was trained on; "" if it is not recorded."""
    try:
        facts = json.loads((folder / "latent_space" / "facts.json").read_text(encoding="utf-8"))
        return str(facts["encoder"].get("run", ""))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return ""


@dataclass(frozen=True)
class RunView:
    """Media of a run: its curves as HTML, copies of its newest pictures and videos in the app's folder, its config."""

    curves: str
    pictures: list[Path]
    videos: list[Path]
    config: str


def run_folders(runs: Path) -> dict[str, Path]:
    """Every run folder by its name: those with a record or a saved config."""
    return {
        str(folder.relative_to(runs)): folder
        for folder in _folders(runs, DEPTH)
        if (folder / "metrics.jsonl").is_file() or (folder / "config.hash").is_file()
    }


def report_pages(runs: Path) -> dict[str, Path]:
    """Every page (`index.html`) that a command of this project wrote, by the name of its folder."""
    return {str(folder.relative_to(runs)): folder for folder in _folders(runs, DEPTH) if (folder / PAGE).is_file()}


def view_run(runs: Path, name: str, shown: Path) -> RunView:
    """Read what is shown of a run, and copy its media into the app's own folder.

    Args:
        runs: the runs folder.
        name: name of the run, from the browser.
        shown: folder for the copies; nothing else is served.

    Raises:
        ConfigError: there is no such run.
    """
    from regen_dist.evaluation.report import draw_curves
    from regen_dist.observe.record import read_record

    known = run_folders(runs)
    if name not in known:
        raise ConfigError(f"there is no run called {name!r} under the runs folder; refresh the list")
    folder = known[name]
    record, config = folder / "metrics.jsonl", folder / "config.yaml"
    curves = draw_curves(read_record(record)) if record.is_file() else []
    html = "".join(f"<figure><figcaption>{each.title}: {each.last}</figcaption>{each.svg}</figure>" for each in curves)
    copies = _fresh(shown, f"run {name}")
    pictures = _newest(folder / "pictures", "*.png")
    videos = _newest(folder / "generated", "*/*.mp4")
    return RunView(
        html, [_copy(each, copies) for each in pictures], [_copy(each, copies) for each in videos],
        config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    )  # fmt: skip


def copy_page(runs: Path, name: str, shown: Path) -> Path:
    """Copy a report page and the files that it links to in its own folder, and return the copy.

    Args:
        runs: the runs folder.
        name: name of the page's folder, from the browser.
        shown: folder for the copies.

    Raises:
        ConfigError: there is no such page, or it is too large.
    """
    known = report_pages(runs)
    if name not in known:
        raise ConfigError(f"there is no report page called {name!r} under the runs folder; refresh the list")
    folder = known[name]
    text = (folder / PAGE).read_text(encoding="utf-8", errors="replace")
    linked = {folder / unquote(each) for each in _LINK.findall(text)}
    inside = (each for each in sorted(linked) if each.resolve().is_relative_to(folder.resolve()))  # links followed
    files = [folder / PAGE, *(each for each in inside if each.is_file())]
    size = sum(each.stat().st_size for each in files)
    if size > MOST_PAGE_BYTES:
        raise ConfigError(f"the page {name} has {size / 2**20:.0f} MB; open {folder / PAGE} itself")
    copies = _fresh(shown, f"page {name}")
    for each in files:
        target = copies / os.path.relpath(each, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(each, target)
    return copies / PAGE


def _newest(folder: Path, pattern: str) -> list[Path]:
    found = (each for each in folder.glob(pattern) if each.is_file() and not each.is_symlink())
    return sorted(found, reverse=True)[:MOST_PICTURES]


def _copy(path: Path, folder: Path) -> Path:
    target = folder / f"{path.parent.name}-{path.name}"
    shutil.copyfile(path, target)
    return target


def _fresh(folder: Path, key: str) -> Path:
    """Empty folder for copies, named by a digest: the same key has the same one."""
    target = folder / hashlib.sha256(key.encode()).hexdigest()[:16]
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    return target
