"""Building a dataset. A build is resumable: what is finished stays, the rest is made, the manifest is last."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from regen_dist.data.build.lists import Columns
from regen_dist.data.build.plan import (
    BuildPart,
    Copies,
    PlannedSource,
    Planner,
    StartedBuild,
    Work,
    count_units,
    cut_parts,
    files_of,
    local_copies,
    work_of,
    write_done,
)
from regen_dist.data.build.segments import KIND, BuildOptions, build_identity
from regen_dist.data.build.sources import VideoSource, find_sources
from regen_dist.data.format.index import SampleFacts
from regen_dist.data.format.manifest import DatasetManifest, Note, Skip, claim, finished_manifest, write_manifest
from regen_dist.data.format.writing import NewSample, ShardWriter
from regen_dist.data.pool import Pool, Progress, share_of, worker_pool
from regen_dist.data.storage.store import Store
from regen_dist.data.video.conversion import picture_to_rgb
from regen_dist.data.video.transcode import EncodedSegment, Segment, encode_segments
from regen_dist.errors import DataError, DiskFull
from regen_dist.shared_files import IDLE_S, remove_leftovers

if TYPE_CHECKING:
    from av.video.frame import VideoFrame

MAX_BAD_SHARE = 0.5


class Built(NamedTuple):
    """Result of a call: the manifest, or None while other tasks have unfinished parts; the number of shards it made;
    the numbers of all and of missing parts."""

    manifest: DatasetManifest | None
    shards_made: int
    parts: int
    parts_missing: int


def build_shards(
    sources: Sequence[str | Path],
    out: str | Path,
    options: BuildOptions | None = None,
    *,
    captions: str | Path | None = None,
    columns: Columns | None = None,
    task: tuple[int, int] = (0, 1),
    workers: int | None = None,
    max_bad_share: float = MAX_BAD_SHARE,
    progress: Progress = lambda stage, done, total: None,
) -> Built:
    """Make (or finish) the dataset of `sources` at `out`.

    Args:
        sources: video files, folders, prefixes of buckets, and lists (`find_sources`).
        out: folder or URL of the dataset: empty, or begun by the same sources and options.
        captions: a list that gives captions to what is in folders.
        columns: names of the columns of lists (`find_sources`).
        task: (i, n): make the i-th (from 0) of every n parts. The call that finds all parts made writes the manifest.
        workers: processes; all cores by default, 0 works in this process.
        max_bad_share: stop when a larger share of many sources cannot be read.
        progress: called with ("probe", "build" or "parts", done, total).

    Raises:
        DataError: a source is missing, `out` holds something else, or no sample is left.
    """
    options, store = options or BuildOptions(), Store(out)
    found = find_sources(sources, captions, columns)
    parts = cut_parts(found.found, options.part_gb * 1e9)
    mine = share_of(parts, task)
    claim(store, build_identity(found, options))
    if store.folder is not None:
        remove_leftovers(store.folder, idle_s=IDLE_S if task[1] > 1 else 0)
    todo = _unfinished(store, mine)
    with local_copies(found.found) as copies, worker_pool(workers) as pool:
        builder = _Builder(store, parts, todo, options, pool, copies, max_bad_share, progress)
        builder.run()
    found_parts = store.list("part-")
    missing = sum(part.done_name not in found_parts for part in parts)
    if missing:
        return Built(None, builder.shards_made, len(parts), missing)
    if not todo and (manifest := finished_manifest(store)) is not None:
        return Built(manifest, 0, len(parts), 0)
    indices = [name for _, files in files_of(store, parts) for name in files if name.endswith(".parquet")]
    manifest = write_manifest(store, indices, KIND, options.recorded(), found.skipped)
    return Built(manifest, builder.shards_made, len(parts), 0)


def _unfinished(store: Store, parts: Sequence[BuildPart]) -> list[BuildPart]:
    """Parts that are not done, or of which something was lost since."""
    found = store.list("part-")
    done = {
        part
        for part, files in files_of(store, [part for part in parts if part.done_name in found])
        if all(found.get(name) == size for name, size in files.items())
    }
    return [part for part in parts if part not in done]


class _Builder:
    """Makes parts one after the other; while one is encoded, the workers survey the sources of the next."""

    def __init__(
        self,
        store: Store,
        parts: Sequence[BuildPart],
        todo: Sequence[BuildPart],
        options: BuildOptions,
        pool: Pool,
        copies: Copies,
        max_bad_share: float,
        progress: Progress,
    ) -> None:
        self._store, self._todo, self._options, self._pool = store, todo, options, pool
        self._copies, self._progress = copies, progress
        self._planner = Planner(store, parts, options, pool, copies, max_bad_share, self._report_surveyed)
        self._sources = sum(len(part.sources) for part in todo)
        self._sources_done = self._units = self._units_done = self.shards_made = 0

    def run(self) -> None:
        begun: list[StartedBuild] = []
        self._report_surveyed(0)
        for number, part in enumerate(self._todo):
            self._progress("parts", number, len(self._todo))
            try:
                begun.append(self._planner.begin(part))
            except DiskFull:
                if not begun:
                    raise
                self._make(begun.pop(0))  # the disk has room for the copies of one part alone
                begun.append(self._planner.begin(part))
            if len(begun) > 1:
                self._make(begun.pop(0))
        for last in begun:
            self._make(last)
        if self._todo:
            self._progress("parts", len(self._todo), len(self._todo))

    def _make(self, begun: StartedBuild) -> None:
        part, plan = begun.part, self._planner.finish(begun)
        self._units += count_units(part, plan)
        self._report_built(begun.after.units)
        with ShardWriter(self._store, part.stem, self._options.limits, begun.after) as writer:
            for work, results in self._results(begun, plan):
                copying = begun.copying.get(work.source)
                lost = copying.result() if copying is not None and work.segments else ""
                self._write(writer, part.sources[work.source], plan[work.source], work, results, lost)
                self._report_built(len(work.units))
        write_done(self._store, part, plan)
        self._copies.remove(part)
        self.shards_made += writer.made

    def _results(
        self, begun: StartedBuild, plan: Sequence[PlannedSource]
    ) -> Iterator[tuple[Work, list[EncodedSegment]]]:
        # Whole files are read here, one at a time: through workers several of them would be held in memory.
        pool = Pool(None, 0) if self._options.keep else self._pool
        return pool.run(encode_segments, self._calls(begun, plan))

    def _calls(self, begun: StartedBuild, plan: Sequence[PlannedSource]) -> Iterator[tuple[Work, tuple[object, ...]]]:
        for work in work_of(begun.part, plan, begun.after.units):
            if work.source in begun.copying and work.segments:
                begun.copying[work.source].result()  # where it could not be copied, its segments are left out below
            yield work, (begun.origins[work.source].path, work.segments, self._options.encode)

    def _write(
        self,
        writer: ShardWriter,
        source: VideoSource,
        planned: PlannedSource,
        work: Work,
        results: Sequence[EncodedSegment],
        lost: str,
    ) -> None:
        """The units of a piece of work, in order. `lost` says why the source could not be fetched again."""
        encoded = iter(results)
        for unit in work.units:
            if isinstance(unit, Skip):
                writer.skip(unit)
                continue
            result = next(encoded)
            if result.info is None:
                writer.skip(Skip(source=source.name, segment=unit.number, reason=f"damaged: {lost or result.problem}"))
            else:
                for note in planned.notes:
                    writer.note(Note(source=source.name, note=note))
                extension = source.suffix[1:] if self._options.keep else "mp4"
                writer.add(_sample(source, planned, unit, result, extension))

    def _report_surveyed(self, sources: int) -> None:
        self._sources_done += sources
        self._progress("probe", self._sources_done, self._sources)

    def _report_built(self, units: int) -> None:
        self._units_done += units
        self._progress("build", self._units_done, self._units)


def _sample(
    source: VideoSource, planned: PlannedSource, segment: Segment, result: EncodedSegment, extension: str
) -> NewSample:
    assert result.info is not None, "an encoded segment has its facts"
    info, motion = result.info, planned.candidates[segment.number].motion
    caption = source.caption or planned.caption
    described = SampleFacts(info.frames, info.height, info.width, info.fps, source.name, caption, motion)
    return NewSample(segment.key, result.data, described, extension, {"first_frame": segment.start})


# Videos out of what benchmarks keep frame by frame: folders of pictures (DAVIS) and raw YUV 4:2:0 (MCL-JCV, UVG).
# Nothing is lost: FFV1 in Matroska.


PICTURES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})
_YUV = re.compile(r"_(?P<width>\d+)x(?P<height>\d+)(?:_(?P<fps>\d+))?", re.IGNORECASE)


def sequences_below(folder: Path) -> list[Path]:
    """Every folder at or below `folder` with pictures in it, and every `.yuv` file, by name; DataError for none."""
    found = [Path(top) for top, _, names in os.walk(folder) if any(_is_picture(name) for name in names)]
    found += folder.rglob("*.yuv")
    if not found:
        raise DataError(
            f"{folder}: no folder of pictures ({', '.join(sorted(PICTURES))}) and no .yuv file below it"
            "; give a folder that has one of these"
        )
    return sorted(found)


def assemble(source: Path, target: Path, fps: float | None = None) -> int:
    """Write the frames of a folder of pictures, or of a raw file, as a lossless video; whole or not at all.

    Args:
        source: a folder whose pictures are the frames in order of their names (2 before 10); or
            `NAME_WIDTHxHEIGHT[_FPS].yuv`, planar 8-bit 4:2:0.
        target: ends in `.mkv`.
        fps: frames a second; None takes the raw file's own.

    Returns:
        Number of frames.

    Raises:
        DataError: no rate is known, the pictures have different sizes, or the raw file is not a whole number of frames.
    """
    import av
    from av.video.stream import VideoStream

    raw = source.is_file()
    rate = Fraction(fps or (_raw_shape(source)[2] if raw else 0)).limit_denominator(1001)
    if rate <= 0:
        raise DataError(f"{source}: its frames a second are not known; give --fps")
    temporary, stream, count = target.with_name(f".{target.name}.tmp"), None, 0
    try:
        with av.open(f"file:{temporary}", "w", format="matroska") as container:
            for frame in _raw_frames(source) if raw else _pictures(source):
                if stream is None:
                    stream = container.add_stream("ffv1", rate=rate)
                    assert isinstance(stream, VideoStream), "ffv1 is a video codec"
                    stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, frame.format.name
                frame.pts, frame.time_base = count, 1 / rate
                container.mux(stream.encode(frame))
                count += 1
            if stream is None:
                raise DataError(f"{source}: no frames; remove it, or add its frames")
            container.mux(stream.encode(None))
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return count


def _pictures(folder: Path) -> Iterator[VideoFrame]:
    import av
    from PIL import Image

    size = None
    for path in sorted((path for path in folder.iterdir() if _is_picture(path.name)), key=_place_in_sequence):
        try:
            with Image.open(path) as picture:
                shown = picture_to_rgb(picture)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise DataError(f"{path}: cannot be read as a picture: {error}; replace or remove the file") from error
        width_height = shown.shape[1::-1]
        if size not in (None, width_height):
            raise DataError(f"{path}: {width_height} pixels where those before are {size}; one size a folder")
        size = width_height
        yield av.VideoFrame.from_ndarray(shown, format="rgb24").reformat(format="bgr0")


def _place_in_sequence(path: Path) -> tuple[list[str | int], str]:
    """Key of a picture's place: by name, but numbers count as numbers, so that f2.png is before f10.png."""
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if at % 2 else part for at, part in enumerate(parts)], path.name


def _raw_frames(path: Path) -> Iterator[VideoFrame]:
    import av
    import numpy as np

    width, height, _ = _raw_shape(path)
    size = width * height * 3 // 2
    if path.stat().st_size % size:
        raise DataError(
            f"{path}: {path.stat().st_size} bytes are no whole number of {width} x {height} 4:2:0 frames"
            "; name the file after its true size, or copy it again"
        )
    with path.open("rb") as file:
        while data := file.read(size):
            yield av.VideoFrame.from_ndarray(
                np.frombuffer(data, np.uint8).reshape(height * 3 // 2, width), format="yuv420p"
            )


def _raw_shape(path: Path) -> tuple[int, int, int]:
    found = _YUV.search(path.stem)
    if found is None:
        raise DataError(f"{path}: the name of a raw file says its size: NAME_WIDTHxHEIGHT[_FPS].yuv")
    width, height = int(found["width"]), int(found["height"])
    if width % 2 or height % 2 or not width or not height:
        raise DataError(f"{path}: {width} x {height}: 4:2:0 needs even sides")
    return width, height, int(found["fps"] or 0)


def _is_picture(name: str) -> bool:
    return Path(name).suffix.lower() in PICTURES and not name.startswith(".")
